"""Which samples belong to a fraction or are held out: functions of a sample's 64-bit hash alone."""

import hashlib

import numpy as np

_SALT = b"ssl_ray sample v1\0"


def sample_hash(shard: str, key: str) -> int:
    """blake2b of 8 bytes, little endian, over a constant salt, the shard's name, a zero byte and the key."""
    text = _SALT + shard.encode("utf-8", "surrogateescape") + b"\0" + key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _bound(share: float) -> np.uint64:
    return np.uint64(min(int(share * 2.0**64), 2**64 - 1))


def in_fraction(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [n]: hash < fraction * 2**64; all of them at 1. Smaller fractions lie inside larger ones."""
    return np.full(len(hashes), True) if fraction >= 1 else hashes < _bound(fraction)


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: whether each sample is kept for evaluation; drawn apart from `in_fraction`, by a mix of the hash."""
    mixed = hashes.astype(np.uint64)  # splitmix64 (Steele et al., OOPSLA 2014); sums and products wrap
    mixed = mixed + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31)) < _bound(share)


def balanced_thresholds(hashes: np.ndarray, labels: np.ndarray, num_classes: int, fraction: float) -> np.ndarray:
    """uint64 [num_classes]: the bound below which a class's round(fraction * count) lowest hashes lie; 0 for none.

    hashes uint64 [n], labels int [n], -1 without one.  Smaller fractions lie inside larger ones.
    """
    order = np.lexsort((hashes, labels))
    first, stop = np.searchsorted(labels[order], [np.arange(num_classes), np.arange(1, num_classes + 1)])
    kept = np.rint(fraction * (stop - first)).astype(np.int64)
    bounds = np.zeros(num_classes, np.uint64)
    some = kept > 0
    bounds[some] = hashes[order[(first + kept - 1)[some]]] + np.uint64(1)
    return bounds
