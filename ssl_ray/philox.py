"""Counter-based random numbers as arrays: Philox4x32-10 (Salmon et al., SC 2011), in numpy.

Every draw is a pure function of (key, counter): no state, no order, no process. The raw 32-bit words are the same on
every machine and numpy version, which numpy's own Generator methods do not promise.
"""

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)

# What a draw is for: the third counter word, so that no two uses share a counter.
CHUNK_ORDER, SAMPLE_ORDER, VIEW, READOUT_SPLIT, DROPOUT, PACK_ORDER, CHUNK_TURN = 1, 2, 3, 4, 5, 6, 7
BOOTSTRAP, CLASSIFIER_ORDER, FEW_SHOT, LABEL_SHARE = 8, 9, 10, 11


def philox(c0, c1, c2, c3, *, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four uint64 arrays, each holding a 32-bit word, of the broadcast shape of the counter words c0..c3 (< 2**32)."""
    x0, x1, x2, x3 = (np.asarray(c, dtype=np.uint64) for c in np.broadcast_arrays(c0, c1, c2, c3))
    k0, k1 = key
    for i in range(10):
        if i:
            k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
        p0, p1 = x0 * _M0, x2 * _M1
        x0, x1, x2, x3 = (p1 >> _32) ^ x1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ x3 ^ np.uint64(k1), p0 & _LOW
    return x0, x1, x2, x3


def uniform(word: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) from 32-bit words: (word + 1/2) / 2**32, never 0 or 1."""
    return (word.astype(np.float64) + 0.5) * 2.0**-32


def permutation(n: int, *, key: tuple[int, int], purpose: int, stream: int = 0) -> np.ndarray:
    """int64 [n]: a permutation of 0..n-1, a pure function of its arguments; n < 2**32.

    Sorts words whose low bits are the index: all distinct, so that every sort algorithm gives the same order.
    """
    bits = np.uint64(max(1, int(n - 1).bit_length()))
    blocks = np.arange((n + 1) // 2, dtype=np.uint64)
    w0, w1, w2, w3 = philox(blocks, stream & 0xFFFFFFFF, purpose, stream >> 32, key=key)
    words = np.stack([w0 << _32 | w1, w2 << _32 | w3], axis=1).reshape(-1)[:n]
    words = (words >> bits << bits) | np.arange(n, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
