"""The batches of one worker through Ray Data: made in tasks, rounds ahead of training, in the order of the plan.

One task only counts rounds; a task for each round does the work of stream.round_blocks. A block of some steps crosses
processes as one row of an Arrow table: its bytes are copied into the object store, and read there.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata

from ssl_ray import errors, plan
from ssl_ray.errors import SslRayError
from ssl_ray.plan import EpochOrder
from ssl_ray.stream import BadSample, Batch, Block, TrainingData, round_blocks, step_bytes, steps_in_block

PAUSE_S = 0.1
"""Between two turns of Ray Data's scheduling loop, while finished blocks wait for the trainer."""
BLOCKS_AHEAD = 8
"""So many blocks of a task may wait for the scheduling loop, which comes by every .2 s, before the task does."""
CLAIM = 0.75
"""Of a stream's CPUs, for a task: more than half, so that the second of two waits for the first unless other CPUs are free.
Both at a time on one core would take turns, and end together."""
COUNTED_ROUNDS = 8
"""So many rounds are counted before they are needed: Ray spends 5 ms of CPU on each."""


def to_table(block: Block) -> pa.Table:
    """One row of two columns, as few as possible, since each costs Ray time; the views' bytes are not copied."""
    bad = [[dataclasses.asdict(sample) for sample in bad] for bad in block.bad]
    about = {"first_step": block.first_step, "shape": block.views.shape, "bad": bad}
    about |= {"hashes": block.hashes.tolist(), "seconds": block.seconds.tolist()}
    return _row(about, pa.py_buffer(block.views))


def _row(about: dict[str, Any], views: pa.Buffer) -> pa.Table:
    offsets = pa.py_buffer(np.array([0, views.size], np.int64))
    data = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, views])
    return pa.table({"about": pa.array([json.dumps(about)]), "views": data})


def _error_table(error: SslRayError) -> pa.Table:
    return _row({"error": [type(error).__name__, str(error)]}, pa.py_buffer(b""))


def from_table(table: pa.Table) -> Iterator[Batch]:
    """The batches in a table's rows; raises the user error that a row may hold instead."""
    for i in range(table.num_rows):
        row = table.slice(i, 1).combine_chunks()
        about, cell = json.loads(row["about"][0].as_py()), row["views"].chunk(0)
        if "error" in about:
            name, message = about["error"]
            raise getattr(errors, name)(message)
        start = np.frombuffer(cell.buffers()[1], np.int64)[cell.offset]
        made = np.frombuffer(cell.buffers()[2], np.uint8, count=math.prod(about["shape"]), offset=start).reshape(about["shape"])
        hashes, seconds = np.array(about["hashes"], np.uint64), np.array(about["seconds"])
        bad = [[BadSample(**sample) for sample in samples] for samples in about["bad"]]
        yield from Block(about["first_step"], made, hashes, bad, seconds).batches()


@functools.lru_cache(maxsize=2)
def fetch(reference: Any) -> TrainingData:
    return ray.get(reference)


@functools.lru_cache(maxsize=2)
def fetch_order(reference: Any, epoch: int) -> EpochOrder:
    return plan.epoch_order(fetch(reference).plan, epoch)


def _count_rounds(reference: Any, first_step: int, stop_step: int) -> Iterator[pa.Table]:
    for work in plan.rounds_of(fetch(reference).plan, first_step, stop_step):
        yield pa.table({key: [value] for key, value in dataclasses.asdict(work).items()})


def _work_round(table: pa.Table, *, reference: Any, lanes: range, steps: int, threads: int) -> Iterator[pa.Table]:
    work = {key: values[0] for key, values in table.to_pydict().items()}
    try:
        order = fetch_order(reference, work.pop("epoch"))
        data = fetch(reference)
        for block in round_blocks(data, order, **work, lanes=lanes, steps=steps, threads=threads, reuse=True):
            yield to_table(block)  # which Ray has copied when it asks for the next
    except SslRayError as error:
        # Raised here, Ray would try the task again and wrap the message in its own.
        yield _error_table(error)


class _Rounds(Datasource):
    """The rounds of a run, a row each, counted in one task: a task a round would take 2 ms each before the first begins."""

    def __init__(self, count: Callable[[], Iterator[pa.Table]]):
        self.count = count

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(self.count, unknown)]


def _counts(operator: Any) -> bool:
    return operator.name.startswith("Read")


class _CountWhenNeeded(BackpressurePolicy):
    """Lets rounds be counted as the tasks that make them begin."""

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        waiting = sum(self._topology[after].total_enqueued_input_blocks() for after in op.output_dependencies)
        return 0 if _counts(op) and waiting >= COUNTED_ROUNDS else None


class _Scheduling(ExecutionCallback):
    """What Ray Data's scheduling loop needs to serve several streams beside training (seen with Ray 2.60)."""

    def before_execution_starts(self, executor: Any) -> None:
        """Each stream takes the CPUs that it was given. Ray would deal what is free in whole numbers: of two CPUs, one of
        them the trainers', two streams would get none, and one task at a time where no other runs.

        And of its memory nothing is kept for the task that counts rounds: without that, the task of a round might have to
        wait until all rounds are counted.
        """
        executor._resource_manager._get_total_resources = ray.data.ExecutionResources.for_limits
        # What is asked of the autoscaler is the trainer's to say: Ray Data would ask for a node more of each kind that there is
        # while they are busy, whichever the stream may use.
        executor._cluster_autoscaler.try_trigger_scaling = lambda: None
        counting = _CountWhenNeeded(executor._data_context, executor._topology, executor._resource_manager)
        executor._backpressure_policies.append(counting)
        for operator in filter(_counts, executor._topology):
            operator.throttling_disabled = lambda: True

    def on_execution_step(self, executor: Any) -> None:
        """Lets the loop rest. It runs in a thread of the training process: while finished blocks wait for the trainer it would
        go round without a pause, more than a millisecond each time, and take half of the interpreter's time from it."""
        _, output = executor._output_node
        if output.output_queue.num_blocks:
            time.sleep(PAUSE_S)


def ray_stream(
    reference: Any,
    *,
    lanes: range,
    first_step: int,
    stop_step: int,
    cpus: float,
    store: int,
    selector: dict[str, str] | None = None,
):
    """A Ray Dataset of the batches of one worker; `reference` holds the TrainingData in the object store.

    cpus, store: this stream's share of the cluster. A round is made in a task with a thread for each of `cpus`, while the
    task of the next round waits; views wait for the trainer in `store` bytes of the object store, more or less a block.
    selector: labels of the nodes that the tasks may be on.
    """
    data, counting = fetch(reference), 0.01
    steps = steps_in_block(data, len(lanes), store=store)
    step = step_bytes(data, len(lanes))
    context = ray.data.DataContext.get_current()
    context.custom_execution_callback_classes = [_Scheduling]
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a trainer may be at one block for long: its own watchdog sees what hangs
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = selector or None
    context.target_max_block_size = 1  # each row that a task yields is a block of its own
    # Ray Data keeps a quarter of the store for finished blocks; what two tasks have ready must fit the rest, or one waits.
    context._max_num_blocks_in_streaming_gen_buffer = max(1, min(BLOCKS_AHEAD, 3 * store // (8 * steps * step)))
    # What a second task makes cannot go before the first is done: there must be room for all of it.
    tasks = 2 if store >= 2 * data.plan.steps_per_round * step else 1
    count = functools.partial(_count_rounds, reference, first_step, stop_step)
    rounds = ray.data.read_datasource(_Rounds(count), override_num_blocks=1, num_cpus=counting)
    stream = rounds.map_batches(
        _work_round,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=CLAIM * (cpus - counting),
        compute=ray.data.TaskPoolStrategy(size=tasks),
        fn_kwargs={"reference": reference, "lanes": lanes, "steps": steps, "threads": max(1, int(cpus))},
    )
    # Of CPUs more than enough: how many tasks there are is said above, and Ray Data keeps some of a limit for counting.
    stream.context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=8 * cpus, object_store_memory=store)
    return stream


def ray_batches(tables: Iterable[pa.Table]) -> Iterator[Batch]:
    """The batches that a `ray_stream` delivers as Arrow tables."""
    for table in tables:
        yield from from_table(table)
