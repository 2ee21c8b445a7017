import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssl_ray import plan as plans
from ssl_ray.errors import UsageError
from ssl_ray.philox import CHUNK_ORDER, CHUNK_TURN, SAMPLE_ORDER, permutation, philox
from ssl_ray.plan import Plan

SEED = st.integers(0, 2**32 - 1)


def naive_chunks(counts, rows, whole):
    """[(shard, first row, row after the last)]: cut one piece at a time."""
    chunks = []
    for shard, count in enumerate(counts):
        pieces = min(1, count) if whole[shard] else -(-count // rows)
        chunks += [(shard, i * count // pieces, (i + 1) * count // pieces) for i in range(pieces)]
    return chunks


def naive_order(plan: Plan, epoch):
    """The epoch's order as a list of (chunk, index in it), longer than what its steps use by the remainder."""
    chunks = permutation(len(plan.selected), key=(plan.seed, epoch), purpose=CHUNK_ORDER).tolist()
    return [(chunk, i) for chunk in chunks for i in range(int(plan.selected[chunk]))]


def naive_words(plan, epoch, chunk, i, purpose):
    low, high, _, _ = philox(i, chunk % 2**32, purpose, chunk >> 32, key=(plan.seed, epoch))
    return int(high), int(low)


def naive_lane(plan: Plan, epoch, dealt):
    """The (chunk, rank) of a lane in a round: each chunk's run in the order of a word of each, turned as a whole."""
    found = []
    for chunk, run in itertools.groupby(dealt, key=lambda sample: sample[0]):
        permuted = sorted((naive_words(plan, epoch, chunk, i, SAMPLE_ORDER), i) for _, i in run)
        turn = naive_words(plan, epoch, chunk, 0, CHUNK_TURN)[1]
        found += [(chunk, (i + turn) % int(plan.selected[chunk])) for _, i in permuted]
    return found


def naive_step(plan: Plan, order, epoch, s):
    """[L][G / L] of (chunk, rank): sample(e, s, l, j) = order_e[b K G + l c + (s - b K) G/L + j]."""
    K, G, L = plan.steps_per_round, plan.batch, plan.lanes
    b = s // K
    c, k, first = min(K, plan.steps_per_epoch - b * K) * G // L, s - b * K, b * K * G
    lanes = [naive_lane(plan, epoch, order[first + lane * c : first + (lane + 1) * c]) for lane in range(L)]
    return [lane[k * G // L : (k + 1) * G // L] for lane in lanes]


@st.composite
def a_plan(draw):
    counts = draw(st.lists(st.integers(0, 12) | st.integers(0, 1), min_size=1, max_size=25))
    rows = draw(st.integers(1, 7))
    whole = draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    density = draw(st.sampled_from([1.0, 0.7, 0.2]))
    mask = np.random.default_rng(draw(st.integers(0, 99))).random(sum(counts)) < density
    lanes = draw(st.integers(1, 7))
    batch = lanes * draw(st.integers(1, 3))
    assume(mask.sum() >= batch)
    chunks = plans.chunk_layout(np.array(counts), rows, whole=np.array(whole))
    shard = np.repeat(np.arange(len(counts)), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    of_chunk = plans.chunks_of_rows(chunks, shard[mask], row[mask])
    selected = np.bincount(of_chunk, minlength=chunks.num_chunks)
    steps_per_round = draw(st.integers(1, 9))
    seed = draw(SEED)
    return plans.make_plan(seed=seed, batch=batch, lanes=lanes, steps_per_round=steps_per_round, chunks=chunks, selected=selected)


def even_plan(*, chunks=50, rows=4, batch=8, lanes=4, steps_per_round=3, seed=1) -> Plan:
    layout = plans.chunk_layout(np.full(chunks, rows), rows)
    selected = np.full(chunks, rows)
    return plans.make_plan(seed=seed, batch=batch, lanes=lanes, steps_per_round=steps_per_round, chunks=layout, selected=selected)


def pairs(samples):
    """[steps, lanes, G / L, 2]."""
    return np.stack([samples.chunks, samples.ranks], axis=-1)


def stream(plan: Plan, lanes, first_step, stop_step):
    """{global step: [lanes, G / L, 2]} as a worker with these lanes meets them."""
    found = {}
    for work in plans.rounds_of(plan, first_step, stop_step):
        samples = pairs(plans.worker_round(plan, plans.epoch_order(plan, work.epoch), work.round, lanes))
        for k in range(work.first_k, work.stop_k):
            step = work.epoch * plan.steps_per_epoch + work.round * plan.steps_per_round + k
            assert step not in found
            found[step] = samples[k]
    return found


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 45), st.randoms(use_true_random=False))
def test_chunks_are_the_fewest_and_most_even_pieces_and_know_their_rows(counts, rows, random):
    whole = [random.random() < 0.2 for _ in counts]
    chunks = plans.chunk_layout(np.array(counts), rows, whole=np.array(whole))
    expected = naive_chunks(counts, rows, whole)
    assert chunks.num_chunks == len(expected)
    bounds = plans.chunk_bounds(chunks, np.arange(chunks.num_chunks))
    assert list(zip(*(bound.tolist() for bound in bounds), strict=True)) == expected
    for shard, count in enumerate(counts):
        lengths = [stop - first for s, first, stop in expected if s == shard]
        assert sum(lengths) == count
        assert whole[shard] or all(length <= rows for length in lengths)
        assert not lengths or max(lengths) - min(lengths) <= 1
    for chunk, (shard, first, stop) in enumerate(expected):
        run = np.arange(first, stop)
        assert set(plans.chunks_of_rows(chunks, np.full(len(run), shard), run).tolist()) == {chunk}


@settings(deadline=None, max_examples=60)
@given(a_plan(), st.integers(0, 3))
def test_an_epoch_uses_every_selected_sample_once_but_for_the_counted_remainder(plan, epoch):
    E = plan.steps_per_epoch
    steps = stream(plan, range(plan.lanes), epoch * E, (epoch + 1) * E)
    assert list(steps) == list(range(epoch * E, (epoch + 1) * E))
    used = [tuple(pair) for step in steps.values() for pair in step.reshape(-1, 2).tolist()]
    everything = {(chunk, rank) for chunk, count in enumerate(plan.selected.tolist()) for rank in range(count)}
    assert len(used) == len(set(used)) == E * plan.batch
    assert set(used) <= everything
    assert len(everything) - len(used) == plan.dropped == len(everything) % plan.batch < plan.batch


@settings(deadline=None, max_examples=60)
@given(a_plan(), st.integers(0, 3))
def test_any_number_of_workers_reads_in_each_step_what_the_formula_says(plan, epoch):
    E, order = plan.steps_per_epoch, naive_order(plan, epoch)
    expected = [naive_step(plan, order, epoch, s) for s in range(E)]
    for workers in range(1, plan.lanes + 1):
        shares = [
            stream(plan, plans.lanes_of(worker, workers, plan.lanes), epoch * E, (epoch + 1) * E) for worker in range(workers)
        ]
        assert all(len(share) == E for share in shares)
        for s in range(E):
            batch = np.concatenate([share[epoch * E + s] for share in shares])
            assert [[tuple(pair) for pair in lane] for lane in batch.tolist()] == expected[s]


@settings(deadline=None, max_examples=60)
@given(a_plan(), st.data())
def test_a_stream_may_begin_and_end_at_any_step(plan, data):
    E, lanes = plan.steps_per_epoch, range(plan.lanes)
    full = stream(plan, lanes, 0, 3 * E)
    assert list(full) == list(range(3 * E))
    first = data.draw(st.integers(0, 3 * E))
    stop = data.draw(st.integers(first, 3 * E))
    part = stream(plan, lanes, first, stop)
    assert list(part) == list(range(first, stop))
    assert all(np.array_equal(part[step], full[step]) for step in part)


@settings(deadline=None, max_examples=100)
@given(a_plan(), st.integers(0, 40), st.integers(0, 40))
def test_rounds_are_whole_but_where_the_stream_or_the_epoch_ends(plan, first_step, steps):
    works = list(plans.rounds_of(plan, first_step, first_step + steps))
    assert sum(work.stop_k - work.first_k for work in works) == steps
    for work in works:
        left = plan.steps_per_epoch - work.round * plan.steps_per_round
        assert 0 <= work.first_k < work.stop_k <= min(plan.steps_per_round, left)
    for before, after in itertools.pairwise(works):
        left = plan.steps_per_epoch - before.round * plan.steps_per_round
        assert before.stop_k == min(plan.steps_per_round, left)
        assert after.first_k == 0
        epoch_over = left <= plan.steps_per_round
        follows = (before.epoch + 1, 0) if epoch_over else (before.epoch, before.round + 1)
        assert (after.epoch, after.round) == follows


def test_rounds_of_a_long_run_are_not_listed_in_advance():
    rounds = plans.rounds_of(even_plan(), 10**15, 10**18)
    assert next(rounds).epoch == 10**15 // even_plan().steps_per_epoch


@pytest.mark.parametrize(("workers", "lanes"), [(1, 1), (1, 64), (3, 64), (64, 64), (7, 12), (5, 6)])
def test_workers_own_contiguous_blocks_of_lanes_that_differ_by_one_at_most(workers, lanes):
    blocks = [plans.lanes_of(worker, workers, lanes) for worker in range(workers)]
    assert [lane for block in blocks for lane in block] == list(range(lanes))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(UsageError, match=r"^train\.workers: got 9, but there are 8 lanes .* Use at most 8 workers"):
        plans.lanes_of(0, 9, 8)


def test_fewer_selected_samples_than_a_batch_are_refused():
    with pytest.raises(UsageError, match=r"train\.batch: got 128, but only 99 samples are selected .* Use a smaller"):
        even_plan(chunks=33, rows=3, batch=128, lanes=64)
    assert even_plan(chunks=32, rows=4, batch=128, lanes=64).steps_per_epoch == 1


@settings(deadline=None, max_examples=60)
@given(a_plan(), st.integers(0, 3))
def test_what_a_lane_has_of_a_chunk_lies_side_by_side(plan, epoch):
    order = plans.epoch_order(plan, epoch)
    for round in range(-(-plan.steps_per_epoch // plan.steps_per_round)):
        for lane in range(plan.lanes):
            samples = plans.worker_round(plan, order, round, range(lane, lane + 1))
            for chunk in np.unique(samples.chunks):
                count = int(plan.selected[chunk])
                had = np.zeros(count, bool)
                had[samples.ranks[samples.chunks == chunk]] = True
                begins = np.count_nonzero(had & ~np.roll(had, 1))  # of the chunk as a ring
                assert begins == 1 or had.all()


def test_the_order_is_pinned():
    plan = even_plan(chunks=5, rows=3, batch=4, lanes=2, steps_per_round=2, seed=7)
    steps = [step.reshape(-1, 2).tolist() for step in stream(plan, range(2), 0, 4).values()]
    assert steps == [
        [[4, 1], [4, 0], [1, 2], [1, 0]],
        [[4, 2], [1, 1], [0, 2], [0, 1]],
        [[0, 0], [3, 1], [3, 2], [3, 0]],
        [[3, 0], [3, 2], [0, 2], [0, 1]],
    ]


def test_another_seed_or_epoch_is_another_order():
    orders = []
    for seed, epoch in itertools.product([0, 1, 2], repeat=2):  # (1, 2) and (2, 1) too: no sums of seeds
        plan = even_plan(seed=seed)
        E = plan.steps_per_epoch
        steps = stream(plan, range(plan.lanes), epoch * E, (epoch + 1) * E)
        orders.append(np.stack(list(steps.values())).tobytes())
    assert len(set(orders)) == 9


def test_every_sample_comes_equally_often_to_every_position_and_is_left_out_equally_often():
    # 6 chunks of 4 samples, batches of 5: 20 positions are used, 4 samples left out.
    plan, epochs = even_plan(chunks=6, rows=4, batch=5, lanes=5, steps_per_round=4), 3000
    seen = np.zeros((20, 24))
    for epoch in range(epochs):
        samples = plans.worker_round(plan, plans.epoch_order(plan, epoch), 0, range(5))
        seen[np.arange(20), (samples.chunks * 4 + samples.ranks).ravel()] += 1
    # Epochs are independent, so each count is binomial. 480 cells: none should be 5 deviations off (3e-4 in all).
    p = 1 / 24
    assert np.abs(seen - epochs * p).max() < 5 * np.sqrt(epochs * p * (1 - p))
    left_out, p = epochs - seen.sum(axis=0), 4 / 24
    assert np.abs(left_out - epochs * p).max() < 5 * np.sqrt(epochs * p * (1 - p))


def test_orders_in_chunks_are_uniform_and_independent_of_their_neighbours():
    draws, size = 6000, 4
    plan = even_plan(chunks=draws, rows=size, batch=size, lanes=1, steps_per_round=draws, seed=3)
    samples = plans.worker_round(plan, plans.epoch_order(plan, 5), 0, range(1))
    flat = samples.ranks.reshape(draws, size)[np.argsort(samples.chunks[:, 0, 0])]
    number = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    which = np.array([number[tuple(order)] for order in flat.tolist()])
    counts = np.bincount(which, minlength=24)
    chi2 = np.sum((counts - draws / 24) ** 2) / (draws / 24)  # 23 degrees of freedom: deviation 6.8
    assert 23 - 5 * 6.8 < chi2 < 23 + 5 * 6.8
    joint = np.bincount(which[:-1] % 4 * 4 + which[1:] % 4, minlength=16)
    expected = (draws - 1) / 16
    chi2 = np.sum((joint - expected) ** 2) / expected  # at most 15 degrees of freedom: deviation 5.5
    assert chi2 < 15 + 5 * 5.5


def test_a_step_takes_at_least_as_many_chunks_as_lanes_when_a_lane_holds_several():
    plan = even_plan(chunks=4000, rows=10, batch=128, lanes=64, steps_per_round=64)
    samples = plans.worker_round(plan, plans.epoch_order(plan, 0), 1, range(64))
    distinct = [len(np.unique(step)) for step in samples.chunks]
    assert min(distinct) >= 60


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 10**10),
    st.floats(0.001, 1),
    st.floats(1, 1e8),
    st.integers(1, 64),
    st.integers(1, 128),
)
def test_sizes_keep_their_bounds(num_samples, fraction, mean_bytes, lanes, per_lane):
    batch, selected = lanes * per_lane, max(1, int(num_samples * fraction))
    rows, steps = plans.sizes(num_samples=num_samples, num_selected=selected, mean_bytes=mean_bytes, batch=batch, lanes=lanes)
    E = max(1, selected // batch)
    assert isinstance(rows, int)
    assert isinstance(steps, int)
    assert rows >= 1
    assert min(8, E) <= steps <= E
    assert -(-num_samples // rows) <= 2**23
    if num_samples <= 2**23:
        assert steps <= 64
    if steps > 8:  # encoded bytes of a round: about 5 chunks of 2 MiB, or of one image, a lane
        assert steps * batch * mean_bytes <= 1.6 * 5 * lanes * max(2**21, mean_bytes)


@pytest.mark.parametrize(
    ("samples", "mean_bytes", "batch", "rows", "steps"),
    [
        (1_797, 200, 128, 5, 14),  # digits: one round is the epoch
        (50_000, 3_000, 128, 25, 64),
        (1_281_167, 110_000, 256, 19, 24),
        (1_281_167, 110_000, 512, 19, 12),
        (10**9, 110_000, 4096, 120, 8),
        (10**9, 3_000, 256, 120, 150),  # longer than 64, or a lane would hold two chunks
    ],
)
def test_sizes_of_known_data_sets(samples, mean_bytes, batch, rows, steps):
    got = plans.sizes(num_samples=samples, num_selected=samples, mean_bytes=mean_bytes, batch=batch, lanes=64)
    assert got == (rows, steps)


@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.1])
def test_a_chunk_of_a_fraction_holds_about_as_many_selected_samples(fraction):
    rows, steps = plans.sizes(
        num_samples=1_000_000, num_selected=round(1_000_000 * fraction), mean_bytes=20_000, batch=256, lanes=64
    )
    assert steps == 64
    assert rows * fraction == pytest.approx(64 * 256 / (5 * 64), rel=0.1)


def test_a_gzip_shard_is_one_chunk_whatever_its_size():
    counts = np.array([50_000, 3, 0, 1000])
    chunks = plans.chunk_layout(counts, 10, whole=np.array([True, False, True, False]))
    assert np.diff(chunks.of_shard).tolist() == [1, 1, 0, 100]
    shard, first, stop = plans.chunk_bounds(chunks, np.arange(3))
    assert list(zip(shard, first, stop, strict=True)) == [(0, 0, 50_000), (1, 0, 3), (3, 0, 10)]


def test_the_plan_is_imported_without_torch_ray_or_arrow():
    check = "import sys, ssl_ray.plan; print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"
