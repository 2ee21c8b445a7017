"""`map` over a cluster, through Ray Data: for work that items share nothing of, as packing, indexing and features."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ssl_ray import errors
from ssl_ray.config import check_label
from ssl_ray.each import Each
from ssl_ray.errors import ResourceError, SslRayError
from ssl_ray.train.capacity import selector
from ssl_ray.train.cluster import is_local, ray_session


@contextmanager
def over_cluster(otherwise: Each, *, label: str | None) -> Iterator[Each]:
    """A `map` whose calls are tasks of the cluster that RAY_ADDRESS names, of a CPU each, with results in order.

    otherwise: what to use where it names none.  label: of the nodes that the tasks may be on, KEY=VALUE; None: any.
    The function goes to each process once and may be large; with the items and results it must be picklable. A user error of
    a call is raised here; a call whose process or machine dies is made again. Raises ResourceError where no node has that label.
    """
    check_label("--label", label)
    if is_local():
        yield otherwise
        return
    with ray_session() as session:
        if not any(node.cpus and node.has(label) for node in session.capacity.most):
            raise ResourceError(f"--label {label}: the cluster has no node with CPUs and that label, nor may one be added.")
        yield functools.partial(_ray_map, label=label)


def _ray_map(call: Callable[[Any], Any], items: Sequence[Any], *, label: str | None) -> Generator[Any]:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its import sets it anew
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = selector(label) or None
    called: Any = _called
    numbers = ray.data.range(len(items), override_num_blocks=len(items))
    tasks = numbers.map_batches(called, batch_size=None, num_cpus=1, fn_kwargs={"reference": ray.put((call, items))})
    for batch in tasks.iter_batches(batch_size=1, prefetch_batches=0):
        result = batch["result"][0]
        if result.error is not None:
            raise getattr(errors, result.error)(result.value)
        yield result.value


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a call returned, as one value, whatever it is: Ray Data would make arrays of lists."""

    value: Any
    error: str | None = None
    """The class of a user error, whose message is the value: raised in a task, Ray would try again, and wrap it in its own."""


@functools.lru_cache(maxsize=1)
def _fetch(reference: Any) -> tuple[Callable[[Any], Any], Sequence[Any]]:
    import ray

    return ray.get(reference)


def _called(batch: Any, *, reference: Any) -> Any:
    call, items = _fetch(reference)
    results = np.empty(len(batch["id"]), object)
    for i, number in enumerate(batch["id"].tolist()):
        try:
            results[i] = _Result(call(items[number]))
        except SslRayError as error:
            results[i] = _Result(str(error), type(error).__name__)
    return {"result": results}
