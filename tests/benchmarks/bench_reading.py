"""Decoded 32 px samples from shards on a local disk, with labels, in order."""

import logging
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import photographs
from timing import Row, alternate, named, skipped, use_cores

from ssl_ray import shards, views

COUNT = 8192
AT_ONCE = 1024
"""Samples that ours reads and decodes at a time."""
KINDS = {"jpeg": "jpeg", "png": "png", "arrays": "png as `data pack` stores arrays"}


def rows() -> list[Row]:
    views.load()
    with tempfile.TemporaryDirectory() as folder:
        manifests = {
            kind: photographs.write_shards(Path(folder) / kind, count=COUNT, kind=kind, shard_bytes=2**22) for kind in KINDS
        }
        against_ray = _on_two_cores(manifests)
        use_cores(1)
        return [row for kind, manifest in manifests.items() for row in _on_one_core(manifest, kind, Path(folder))] + against_ray


def _on_one_core(manifest: shards.Manifest, kind: str, scratch: Path) -> list[Row]:
    what, extension = f"samples of 32 px read and decoded, {KINDS[kind]}", photographs.EXTENSIONS[kind]
    peers = {}
    missing = []
    try:
        import webdataset

        def read_webdataset() -> None:
            stream = webdataset.WebDataset(_files(manifest), shardshuffle=False, empty_check=False)
            found = stream.decode("rgb8").to_tuple(extension, "cls")
            assert sum(image.shape == (32, 32, 3) for image, _ in found) == COUNT

        peers[named("webdataset")] = read_webdataset
    except ImportError:
        missing.append(skipped(what, "webdataset", "not installed"))
    try:
        import streaming

        local = scratch / f"mds-{kind}"
        _write_mds(manifest, local, kind)

        def read_streaming() -> None:
            found = streaming.StreamingDataset(local=str(local), shuffle=False, batch_size=1)
            assert sum(np.asarray(sample["image"]).shape == (32, 32, 3) for sample in found) == COUNT

        peers[named("mosaicml-streaming")] = read_streaming
    except ImportError:
        missing.append(skipped(what, "mosaicml-streaming", "not installed"))
    return alternate(what, _ours(manifest, threads=1), peers, unit="sample", count=COUNT) + missing


def _on_two_cores(manifests: dict[str, shards.Manifest]) -> list[Row]:
    """Ray Data's tasks in two processes, its batches taken by this one; ours in two threads of this process."""
    import ray

    use_cores(2)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel("ERROR")
        found = []
        for kind, manifest in manifests.items():
            what = f"samples of 32 px read and decoded, {KINDS[kind]}; two threads against two processes"
            peers = {f"read_webdataset of {named('ray')}": _ray_data(manifest, photographs.EXTENSIONS[kind])}
            found += alternate(what, _ours(manifest, threads=2), peers, unit="sample", count=COUNT, cores=2)
        return found
    finally:
        ray.shutdown()


def _ray_data(manifest: shards.Manifest, extension: str) -> Callable[[], None]:
    import ray

    def read() -> None:
        count = 0
        for batch in ray.data.read_webdataset(_files(manifest)).iter_batches(batch_size=AT_ONCE):
            assert batch[extension].shape[1:] == (32, 32, 3)
            count += len(batch["cls"])
        assert count == COUNT

    return read


def _files(manifest: shards.Manifest) -> list[str]:
    return [f"{manifest.data_uri}/{name}" for name in manifest.names.to_pylist()]


def _ours(manifest: shards.Manifest, *, threads: int) -> Callable[[], None]:
    runs = [
        (shard, np.arange(first, min(first + AT_ONCE, count)))
        for shard, count in enumerate(manifest.counts.tolist())
        for first in range(0, count, AT_ONCE)
    ]
    pool = ThreadPoolExecutor(threads)

    def read(run: tuple[int, np.ndarray]) -> int:
        shard, own = run
        samples = shards.read_samples(manifest, np.full(len(own), shard), own)
        images = views.decode_many(samples.images, channels=3)
        return sum(image.shape == (3, 32, 32) and label >= 0 for image, label in zip(images, samples.labels, strict=True))

    def call() -> None:
        assert sum(pool.map(read, runs) if threads > 1 else map(read, runs)) == COUNT

    return call


def _write_mds(manifest: shards.Manifest, local: Path, kind: str) -> None:
    import io

    from PIL import Image
    from streaming import MDSWriter

    everything = np.nonzero(np.arange(manifest.counts.max()) < manifest.counts[:, None])
    samples = shards.read_samples(manifest, *(axis.astype(np.int64) for axis in everything))
    with MDSWriter(out=str(local), columns={"image": "jpeg" if kind == "jpeg" else "png", "label": "int"}) as writer:
        for data, label in zip(samples.images, samples.labels.tolist(), strict=True):
            writer.write({"image": Image.open(io.BytesIO(data)), "label": label})
