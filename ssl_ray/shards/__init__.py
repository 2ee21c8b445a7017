"""WebDataset shards at rest: made from images, indexed, checked, and read by ranges."""

from ssl_ray.shards.builtin import located
from ssl_ray.shards.cache import Cache, cache_at
from ssl_ray.shards.check import check, order_note, stats
from ssl_ray.shards.index import index
from ssl_ray.shards.manifest import Manifest, bad_digest, bad_samples, index_rows, iter_index, load_manifest
from ssl_ray.shards.pack import pack
from ssl_ray.shards.read import Samples, read_samples
from ssl_ray.shards.select import balanced_thresholds, held_out, in_fraction
from ssl_ray.shards.sources import Source, open_source

__all__ = [
    "Cache",
    "Manifest",
    "Samples",
    "Source",
    "bad_digest",
    "bad_samples",
    "balanced_thresholds",
    "cache_at",
    "check",
    "held_out",
    "in_fraction",
    "index",
    "index_rows",
    "iter_index",
    "load_manifest",
    "located",
    "open_source",
    "order_note",
    "pack",
    "read_samples",
    "stats",
]
