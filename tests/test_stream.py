"""The stream in this process: what threads and blocks do to it, which is nothing."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_ray import plan, shards, stream
from ssl_ray.config import build
from ssl_ray.train.pretrain import open_data


def write_tar(path: Path, *, count: int, bad: set[int]) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            sink = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(sink, "PNG")
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = 20 if i in bad else sink.tell()
            tar.addfile(info, io.BytesIO(sink.getvalue()[: info.size]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> stream.TrainingData:
    """Twelve steps of 14 images, some of which cannot be decoded."""
    folder = tmp_path_factory.mktemp("stream")
    write_tar(folder / "0.tar", count=170, bad={3, 40, 90, 120})
    keys = ["views.count=2", "views.size_px=8", "views.channels=1", "train.batch=14", "data.eval_fraction=0.01"]
    made, _ = open_data(build({"data": {"uri": shards.index(str(folder)).uri}}, keys))
    return made


@pytest.mark.parametrize(("threads", "steps"), [(2, 1), (3, 4), (40, 5)])
def test_threads_and_steps_of_a_block_change_no_byte(data, threads, steps):
    lanes = plan.lanes_of(0, 1, data.plan.lanes)
    expected = list(stream.local_batches(data, lanes=lanes, first_step=0, stop_step=data.plan.steps_per_epoch))
    assert sum(len(batch.bad) for batch in expected) > 1
    order, found = plan.epoch_order(data.plan, 0), []
    for work in plan.rounds_of(data.plan, 0, data.plan.steps_per_epoch):
        part = {"round": work.round, "first_k": work.first_k, "stop_k": work.stop_k}
        for block in stream.round_blocks(data, order, **part, lanes=lanes, steps=steps, threads=threads, reuse=True):
            assert len(block.bad) <= steps
            found += [(b.step, b.views.copy(), b.hashes, b.bad) for b in block.batches()]  # copied: the next block reuses it
    assert [step for step, *_ in found] == [batch.step for batch in expected]
    for (_, views, hashes, bad), batch in zip(found, expected, strict=True):
        assert np.array_equal(views, batch.views)
        assert np.array_equal(hashes, batch.hashes)
        assert bad == batch.bad
