"""Fractions are nested and of the right size, balanced ones class by class, and what is held out does not depend on them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ssl_ray import shards

HASHES = np.random.default_rng(0).integers(0, 2**64, 200_000, np.uint64)
SHARE = st.floats(0, 1)


@given(small=SHARE, large=SHARE)
def test_a_smaller_fraction_lies_inside_a_larger_one(small, large):
    small, large = sorted((small, large))
    hashes = HASHES[:2000]
    assert not (shards.in_fraction(hashes, small) & ~shards.in_fraction(hashes, large)).any()


@given(fraction=SHARE)
def test_a_fraction_is_of_its_size(fraction):
    got = shards.in_fraction(HASHES, fraction).mean()
    assert abs(got - fraction) <= 5 * np.sqrt(fraction * (1 - fraction) / len(HASHES)) + 1e-5


def test_the_bound_is_the_hash_over_two_to_the_64():
    hashes = np.array([0, 2**62 - 1, 2**62, 2**63, 2**64 - 1], np.uint64)
    assert shards.in_fraction(hashes, 0.25).tolist() == [True, True, False, False, False]
    assert shards.in_fraction(hashes, 1.0).all()
    assert not shards.in_fraction(hashes, 0.0).any()


@given(share=SHARE)
def test_what_is_held_out_is_of_its_size_and_nested(share):
    got = shards.held_out(HASHES, share)
    assert abs(got.mean() - share) <= 5 * np.sqrt(share * (1 - share) / len(HASHES)) + 1e-5
    assert not (got & ~shards.held_out(HASHES, min(1, share * 1.5))).any()


@given(fraction=st.sampled_from([0.01, 0.1, 0.5, 0.9]), share=st.sampled_from([0.05, 0.2, 0.5]))
def test_what_is_held_out_is_independent_of_the_fraction(fraction, share):
    inside = shards.in_fraction(HASHES, fraction)
    rest = shards.held_out(HASHES, share)
    expected = fraction * share
    assert abs((inside & rest).mean() - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(HASHES))


def test_a_held_out_sample_stays_so_in_every_data_set():
    mixed = [0x123456789ABCDEF]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64 in Python's own integers
        value = mixed[-1] + (0x9E3779B97F4A7C15 if shift == 30 else 0)
        mixed.append((value ^ (value % 2**64 >> shift)) * factor % 2**64)
    value = (mixed[-1] ^ (mixed[-1] >> 31)) / 2**64
    one = np.array([mixed[0]], np.uint64)
    assert not shards.held_out(one, value * (1 - 1e-9))[0]
    assert shards.held_out(one, value * (1 + 1e-9))[0]


LABELS = st.lists(st.integers(-1, 4), min_size=1, max_size=200)


@given(labels=LABELS, fraction=SHARE, seed=st.integers(0, 99))
def test_a_balanced_fraction_has_the_rounded_share_of_each_class_and_none_without(labels, fraction, seed):
    labels = np.array(labels)
    hashes = np.random.default_rng(seed).integers(0, 2**64 - 1, len(labels), np.uint64)
    bounds = shards.balanced_thresholds(hashes, labels, 5, fraction)
    for label in range(5):
        own = hashes[labels == label]
        kept = own[own < bounds[label]]
        assert len(kept) == round(fraction * len(own))
        assert sorted(kept.tolist()) == sorted(own.tolist())[: len(kept)]


@given(labels=LABELS, small=SHARE, large=SHARE)
def test_balanced_fractions_are_nested(labels, small, large):
    small, large = sorted((small, large))
    hashes = HASHES[: len(labels)]
    lower, upper = (shards.balanced_thresholds(hashes, np.array(labels), 5, fraction) for fraction in (small, large))
    assert (lower <= upper).all()
