"""What the tests of this folder read: the digits in a dozen shards behind a proxy, and the batches that local files give."""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import proxy

from ssl_ray import plan, stream
from ssl_ray.config import build
from ssl_ray.shards import fetch
from ssl_ray.train.pretrain import open_data

KEYS = ("views.count=2", "views.size_px=8", "views.channels=1", "data.fraction=0.84", "train.batch=112")
"""An epoch leaves out none of the 1,344 images, so that the second has no others."""


def batches(uri: str, *keys: str, epochs: int = 1) -> Iterator[tuple[int, str, bytes]]:
    """Step, digest of the views and hashes of the samples of each batch, as the stream makes them in this process."""
    data, _ = open_data(build({"data": {"uri": uri}}, [*KEYS, *keys]))
    lanes, stop = plan.lanes_of(0, 1, data.plan.lanes), epochs * data.plan.steps_per_epoch
    for batch in stream.local_batches(data, lanes=lanes, first_step=0, stop_step=stop):
        assert batch.bad == []
        yield batch.step, hashlib.sha256(batch.views.tobytes()).hexdigest(), batch.hashes.tobytes()


@dataclasses.dataclass(frozen=True)
class Store:
    """The digits in a dozen small shards."""

    uri: str
    local: Path
    """The same shards on a local disk."""
    between: proxy.Proxy
    """What this process reads through."""
    truth: list[tuple[int, str, bytes]]
    """Two epochs of batches, from the local disk."""

    def requests(self, part: str = "") -> list[str]:
        """First lines of the requests since the log was cleared."""
        return [request.line for request in self.between.log if part in request.line]


def forget_clients() -> None:
    """Makes this process open its storages anew."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    for cached in (fetch._open, fetch._s3, fetch._session):
        cached.cache_clear()
