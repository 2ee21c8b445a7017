"""Damaged shards are never indexed: cut, changed and other files, each refused by name."""

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import picture, samples, write_tar

from ssl_ray import shards
from ssl_ray.errors import DataError

WHOLE = samples(3, label=lambda i: i)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_tar_cut_before_its_end_mark_is_never_accepted(form, data):
    long = [("é" * 60 + f"/{name}", content) for name, content in WHOLE]  # headers of two kinds, in more blocks
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "x.tar", long, format=form)
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
        cut = data.draw(st.integers(0, end + 511) | st.integers(0, end // 512).map(lambda block: block * 512))
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(DataError, match=r"x\.tar: (truncated|no image)") as caught:
            shards.index(folder)
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_gzip_cut_anywhere_is_never_accepted(data):
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "x.tgz", WHOLE)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(DataError, match=r"x\.tgz: truncated"):
            shards.index(folder)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_gzip_with_a_changed_byte_is_refused_or_holds_the_same_images(data):
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "x.tgz", WHOLE)
        whole = bytearray(path.read_bytes())
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(whole)
        try:
            manifest = shards.index(folder)
        except DataError as error:
            assert "x.tgz" in str(error)  # noqa: PT017
        else:  # the header of a gzip has bytes that mean nothing for the content
            images = shards.read_samples(manifest, np.zeros(3, np.int64), np.arange(3)).images
            assert [bytes(image) for image in images if image is not None] == [picture(i) for i in range(3)]


def test_a_header_that_is_damaged_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", WHOLE)
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.tar: truncated or damaged"):
        shards.index(str(tmp_path))


@pytest.mark.parametrize("name", ["x.tar", "x.tgz"])
@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, b"\0" * 512])
def test_other_files_with_the_name_of_a_shard_are_errors(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: (truncated|no image)"):
        shards.index(str(tmp_path))


@pytest.mark.parametrize("place", ["", "gone", "file"])
def test_a_place_without_shards_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"no shards here \(\*\.tar"):
        shards.index(str(tmp_path / place))
