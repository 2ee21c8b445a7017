import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_ray.philox import permutation, philox, uniform

WORD = st.integers(0, 2**32 - 1)
PAIR = st.tuples(WORD, WORD)


# The known answers of Random123 (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_words_are_the_known_answers_of_random123(counter, key, answer):
    c = [int(word, 16) for word in counter.split()]
    k0, k1 = (int(word, 16) for word in key.split())
    assert [int(word) for word in philox(*c, key=(k0, k1))] == [int(word, 16) for word in answer.split()]


def one_block(counter, key):
    """Philox4x32-10 in plain integers, from the paper."""
    (a, b, c, d), (k, q) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (right >> 32) ^ b ^ k, right % 2**32, (left >> 32) ^ d ^ q, left % 2**32
        k, q = (k + 0x9E3779B9) % 2**32, (q + 0xBB67AE85) % 2**32
    return a, b, c, d


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=8), PAIR)
def test_an_array_of_counters_gives_the_words_of_each(counters, key):
    words = philox(*np.array(counters, np.uint64).T, key=key)
    assert all(word.dtype == np.uint64 for word in words)
    assert [tuple(map(int, row)) for row in zip(*words, strict=True)] == [one_block(c, key) for c in counters]


def test_counter_words_are_broadcast():
    words = philox(np.arange(3)[:, None], np.arange(5), 7, 8, key=(1, 2))
    assert [word.shape for word in words] == [(3, 5)] * 4
    assert [int(word[2, 4]) for word in words] == [int(word) for word in philox(2, 4, 7, 8, key=(1, 2))]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3000), PAIR, WORD, st.integers(0, 2**64 - 1))
def test_a_permutation_holds_every_number_once_and_repeats_itself(n, key, purpose, stream):
    order = permutation(n, key=key, purpose=purpose, stream=stream)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, permutation(n, key=key, purpose=purpose, stream=stream))


@settings(deadline=None, max_examples=30)
@given(PAIR, WORD, st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(0, 31))
def test_another_key_purpose_or_stream_is_another_permutation(key, purpose, stream, stream_bit, bit):
    orders = [
        permutation(200, key=key, purpose=purpose, stream=stream),
        permutation(200, key=(key[0] ^ (1 << bit), key[1]), purpose=purpose, stream=stream),
        permutation(200, key=(key[0], key[1] ^ (1 << bit)), purpose=purpose, stream=stream),
        permutation(200, key=key, purpose=purpose ^ (1 << bit), stream=stream),
        permutation(200, key=key, purpose=purpose, stream=stream ^ (1 << stream_bit)),
    ]
    assert len({order.tobytes() for order in orders}) == 5


def test_permutations_are_pinned():
    assert permutation(10, key=(1, 2), purpose=3).tolist() == [5, 0, 4, 6, 3, 9, 2, 7, 8, 1]
    assert permutation(9, key=(2**32 - 1, 7), purpose=1, stream=2**40 + 5).tolist() == [7, 2, 8, 1, 4, 5, 3, 6, 0]


def test_every_place_gets_every_number_equally_often():
    n, draws = 12, 6000
    orders = np.stack([permutation(n, key=(5, 6), purpose=1, stream=i) for i in range(draws)])
    counts = np.stack([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    chi2 = np.sum((counts - draws / n) ** 2) / (draws / n)
    # (n - 1)^2 degrees of freedom: mean 121, standard deviation 15.6.
    assert 121 - 5 * 15.6 < chi2 < 121 + 5 * 15.6


def test_uniform_is_inside_0_and_1_and_exact():
    words = np.array([0, 1, 2**31, 2**32 - 1], np.uint64)
    assert uniform(words).tolist() == [2.0**-33, 1.5 * 2.0**-32, 0.5 + 2.0**-33, 1 - 2.0**-33]
    assert 0 < uniform(words).min() < uniform(words).max() < 1


def test_words_are_uniform_and_do_not_hang_together():
    u = np.stack([uniform(word) for word in philox(np.arange(100_000), 0, 0, 0, key=(1, 2))])
    for row in u:
        counts = np.bincount((row * 100).astype(int), minlength=100)
        chi2 = np.sum((counts - 1000.0) ** 2) / 1000  # 99 degrees of freedom: mean 99, standard deviation 14.1
        assert 99 - 5 * 14.1 < chi2 < 99 + 5 * 14.1
    columns = np.vstack([u, np.roll(u, 1, axis=1)])  # the other words, and the neighbours' words
    correlation = np.corrcoef(columns) - np.eye(8)
    assert np.abs(correlation).max() < 5 / np.sqrt(100_000)
