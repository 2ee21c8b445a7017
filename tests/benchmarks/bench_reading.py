"""Decoded 32 px samples from shards on a local disk, with labels, in order."""

import tempfile
from pathlib import Path

import numpy as np
import photographs
from timing import Row, alternate, named, skipped, use_cores

from ssl_ray import shards, views

COUNT = 8192
AT_ONCE = 2048


def rows() -> list[Row]:
    use_cores(1)
    views.load()
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jpeg", "png"):
            manifest = photographs.write_shards(Path(folder) / kind, count=COUNT, kind=kind)
            made += _against(manifest, kind, Path(folder))
    return made


def _against(manifest: shards.Manifest, kind: str, scratch: Path) -> list[Row]:
    what = f"samples of 32 px read and decoded, {kind}"
    peers = {}
    missing = []
    try:
        import webdataset

        files = [f"{manifest.data_uri}/{name}" for name in manifest.names.to_pylist()]

        def read_webdataset() -> None:
            stream = webdataset.WebDataset(files, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple(kind, "cls")
            assert sum(image.shape == (32, 32, 3) for image, _ in stream) == COUNT

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

    def ours() -> None:
        assert sum(image.shape == (3, 32, 32) for image in _decoded(manifest)) == COUNT

    return alternate(what, ours, peers, unit="sample", count=COUNT) + missing


def _decoded(manifest: shards.Manifest):
    for shard, count in enumerate(manifest.counts.tolist()):
        for first in range(0, count, AT_ONCE):
            some = np.arange(first, min(first + AT_ONCE, count))
            for data in shards.read_samples(manifest, np.full(len(some), shard), some).images:
                yield views.decode(data, channels=3)


def _write_mds(manifest: shards.Manifest, local: Path, kind: str) -> None:
    import io

    from PIL import Image
    from streaming import MDSWriter

    everything = np.nonzero(np.arange(manifest.counts.max()) < manifest.counts[:, None])
    samples = shards.read_samples(manifest, *(axis.astype(np.int64) for axis in everything))
    with MDSWriter(out=str(local), columns={"image": kind, "label": "int"}) as writer:
        for data, label in zip(samples.images, samples.labels.tolist(), strict=True):
            writer.write({"image": Image.open(io.BytesIO(data)), "label": label})
