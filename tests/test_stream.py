"""The stream: threads and blocks change none of its bytes, and it waits for a trainer that is slow."""

import io
import json
import subprocess
import sys
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


_SLOW = """
import json, os, sys, time
from ssl_ray import plan, stream
from ssl_ray.config import build
from ssl_ray.train import cluster
from ssl_ray.train.pretrain import open_data

uri, share, keys = json.loads(sys.argv[1])
data, _ = open_data(build({"data": {"uri": uri}}, keys))
lanes = plan.lanes_of(0, 1, data.plan.lanes)
with cluster.ray_session():
    import ray
    from ssl_ray import ray_stream
    store = stream.store_bytes(data, len(lanes), share=share)
    reference, used = ray.put(data), []
    total = ray.cluster_resources()["object_store_memory"]
    found = ray_stream.ray_stream(reference, lanes=lanes, first_step=0, stop_step=10**7, cpus=1.0, store=store)
    batches = ray_stream.ray_batches(found.iterator().iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    for _ in range(40):
        next(batches)
        for _ in range(4):
            time.sleep(0.1)
            used.append(total - ray.available_resources()["object_store_memory"])
    # The tasks of other rounds come too, before all are counted, which would take a day.
    for _ in range(3 * data.plan.steps_per_epoch):
        next(batches)
    block = stream.steps_in_block(data, len(lanes), store=store) * stream.step_bytes(data, len(lanes))
    print(json.dumps([store, block, used]), flush=True)
    batches.close()
    os._exit(0)  # the stream's threads would outlive Ray
"""


@pytest.mark.long
def test_no_more_views_wait_for_a_slow_trainer_than_are_allowed(tmp_path):
    write_tar(tmp_path / "0.tar", count=4500, bad=set())
    shards.index(str(tmp_path))
    keys = ["views.count=8", "views.size_px=64", "train.batch=64"]
    command = [sys.executable, "-c", _SLOW, json.dumps([str(tmp_path), 100 * 2**20, keys])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    store, block, used = json.loads(done.stdout.splitlines()[-1])
    assert max(used) <= store + 3 * block, used  # two that the trainer fetches ahead, and the one it is at
    assert max(used) > 2 * block  # it works ahead


LARGE = """
import sys
from ssl_ray.config import build
from ssl_ray import stream
from ssl_ray.evaluate import images
from ssl_ray.train.pretrain import open_data

def peak_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))

config = build({"data": {"uri": sys.argv[1]}}, ["train.batch=16", "views.count=2", "views.size_px=16", "data.eval_fraction=0.3"])
data, _ = open_data(config)
(first,) = stream.local_batches(data, lanes=range(1), first_step=0, stop_step=1)  # of one image
before = peak_mb()
made = sum(len(batch.views) for batch in stream.local_batches(data, lanes=range(16), first_step=0, stop_step=1))
chosen, _ = images.choose(data.manifest, None, held_out=0.3, max_images=16)
read = len(images.plain_images(chosen, slice(0, 16), channels=3, size_px=16)[0])
print(made, read, peak_mb() - before)
"""


def test_few_images_are_decoded_at_a_time(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (3000, 2000), (9, 99, 199)).save(image, "PNG")  # 18 MB of pixels in 53 kB
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(40):
            about = tarfile.TarInfo(f"{i:03d}.png")
            about.size = len(image.getvalue())
            tar.addfile(about, io.BytesIO(image.getvalue()))
    shards.index(str(tmp_path))
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=True)
    made, read, grown_mb = map(int, done.stdout.split())
    assert (made, read) == (16, 16)
    assert grown_mb < 100  # all at once: 290 MB
