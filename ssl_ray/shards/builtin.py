"""The built-in data set, packed once into the user's cache."""

import os
import uuid
from pathlib import Path

from ssl_ray import storage
from ssl_ray.shards.pack import pack
from ssl_ray.shards.sources import open_source


def located(uri: str) -> str:
    """Where the shards of `uri` are: itself, made absolute; for `digits` a folder in the cache, packed on first use."""
    if uri != "digits":
        return storage.absolute(uri)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_ray" / "digits-2"
    if not (cache / "manifest.parquet").exists():
        making = cache.with_name(f"digits-2-{uuid.uuid4().hex[:8]}")
        pack(open_source("digits"), str(making), shard_bytes=2**19)
        with storage.storage_errors(str(cache), "packing the digits"):
            try:
                making.rename(cache)
            except OSError:
                storage.remove(str(making))
                if not (cache / "manifest.parquet").exists():  # else another process was first
                    raise
    return str(cache)
