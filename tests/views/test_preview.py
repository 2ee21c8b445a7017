import io

import numpy as np
import pytest
from PIL import Image

from ssl_ray.views import plain, preview
from ssl_ray.views.preview import GAP_PX


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "zoom"), [(4, 16), (28, 2), (32, 2), (40, 1), (96, 1)])
def test_a_row_is_the_plain_view_and_the_views_of_an_image(channels, size, zoom):
    rng = np.random.default_rng(size)
    images = [rng.integers(0, 256, (channels, *shape), dtype=np.uint8) for shape in ((30, 50), (97, 41), (8, 8))]
    views = rng.integers(0, 256, (3, 5, channels, size, size), dtype=np.uint8)
    picture = Image.open(io.BytesIO(preview(images, views)))
    cell = size * zoom + GAP_PX
    assert picture.format == "PNG"
    assert picture.mode == ("L" if channels == 1 else "RGB")
    assert picture.size == (6 * cell, 3 * cell)
    sheet = np.asarray(picture).reshape(3 * cell, 6 * cell, channels)
    for row, column in np.ndindex(3, 6):
        shown = sheet[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        expected = plain(images, size_px=size)[row] if column == 0 else views[row, column - 1]
        for dy, dx in np.ndindex(zoom, zoom):  # each pixel of a view is zoom x zoom equal ones
            assert np.array_equal(shown[dy : size * zoom : zoom, dx : size * zoom : zoom].transpose(2, 0, 1), expected)
        assert (shown[size * zoom :] == 255).all()
        assert (shown[:, size * zoom :] == 255).all()
