"""224 px views of JPEG shards in a real S3 server on this machine: read cold, against a plain loop of ranged GETs, and in the
second epoch from the shard cache, against shards on the local disk. The server takes its part of both cores, for both sides.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import photographs
from timing import Row, alternate, named, use_cores

sys.path.append(str(Path(__file__).parents[1]))

import seaweedfs

from ssl_ray import plan, shards, storage, stream, views
from ssl_ray.config import build
from ssl_ray.shards.read import REMOTE_THREADS, REQUEST_BYTES
from ssl_ray.train.pretrain import open_data

COUNT = 2048
BATCH = 32
KEYS = ("views.size_px=224", "views.count=2", f"train.batch={BATCH}", "data.eval_fraction=0.01")


def rows() -> list[Row]:
    use_cores(2)
    views.load()
    with tempfile.TemporaryDirectory() as folder, seaweedfs.serve(_made(Path(folder) / "s3")) as server:
        os.environ |= server.environment()
        local = photographs.write_shards(Path(folder) / "local", count=COUNT, kind="jpeg", size=400, shard_bytes=2**25)
        remote = f"s3://{seaweedfs.BUCKET}/photographs"
        for path in Path(local.uri).rglob("*.*"):
            storage.upload(str(path), f"{remote}/{path.relative_to(local.uri)}")
        what = "image of 400 px read and made two views of 224 px"
        ours, count = _epoch(remote)
        peer = f"ranged GETs with {named('urllib3')}, {REMOTE_THREADS} threads"
        counts = {"ours": count, peer: COUNT}
        cold = alternate(
            f"{what}, from S3", ours, {peer: _plain_loop(server, local)}, unit="image", count=counts.__getitem__, cores=2
        )
        kept, _ = _epoch(remote, f"data.cache_dir={folder}/kept")
        on_disk, _ = _epoch(local.uri)
        peers = {"shards on the local disk": on_disk}
        return cold + alternate(f"{what}, from the cache", kept, peers, unit="image", count=count, cores=2)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _epoch(uri: str, *keys: str) -> tuple[Callable[[], None], int]:
    """Makes the batches of an epoch; how many images these have."""
    data, _ = open_data(build({"data": {"uri": uri}}, [*KEYS, *keys]))
    lanes, steps = plan.lanes_of(0, 1, data.plan.lanes), data.plan.steps_per_epoch

    def call() -> None:
        made = stream.local_batches(data, lanes=lanes, first_step=0, stop_step=steps)
        assert sum(len(batch.views) for batch in made) == steps * BATCH

    return call, steps * BATCH


def _plain_loop(server: seaweedfs.Server, manifest: shards.Manifest) -> Callable[[], None]:
    """Whole shards in ranges as long as ours, each of whole images; threads read ahead while the images are decoded."""
    import urllib3

    client, spec, ranges = server.client(), build({}, list(KEYS)).views, []
    for shard, name in enumerate(manifest.names.to_pylist()):
        given = {"Bucket": seaweedfs.BUCKET, "Key": f"photographs/{name}"}
        url = client.generate_presigned_url("get_object", Params=given, ExpiresIn=86400)
        rows = shards.index_rows(manifest, shard)
        offsets, sizes, hashes = (rows[column].to_numpy() for column in ("offset", "size", "hash"))
        for part in np.split(np.arange(len(offsets)), np.flatnonzero(np.diff(offsets // REQUEST_BYTES)) + 1):
            ranges.append((url, offsets[part] - offsets[part[0]], sizes[part], hashes[part], int(offsets[part[0]])))
    pool, http = ThreadPoolExecutor(REMOTE_THREADS), urllib3.PoolManager(maxsize=REMOTE_THREADS)

    def get(one: tuple) -> memoryview:
        url, offsets, sizes, _, first = one
        answer = http.request("GET", url, headers={"Range": f"bytes={first}-{first + offsets[-1] + sizes[-1] - 1}"})
        assert answer.status == 206
        return memoryview(answer.data)

    def call() -> None:
        made, least = 0, views.least_size(spec)
        for one, data in zip(ranges, pool.map(get, ranges), strict=True):
            encoded = [data[offset : offset + size] for offset, size in zip(one[1].tolist(), one[2].tolist(), strict=True)]
            for first in range(0, len(encoded), BATCH):
                some = slice(first, first + BATCH)
                images = views.decode_many(encoded[some], channels=spec.channels, least_size=least)
                made += len(views.make_views(images, one[3][some], spec=spec, seed=0, epoch=0))
        assert made == COUNT

    return call
