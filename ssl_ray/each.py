"""Going through items that share nothing, in this process; ray_map does it over a cluster."""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Each = Callable[[Callable[[Any], Any], Sequence[Any]], Generator[Any]]
"""As `map`: calls a function with each item, in whatever process, and gives the results in order. Closed, it calls no more."""
THREADS = 4


def in_turn(call: Callable[[Any], Any], items: Sequence[Any]) -> Generator[Any]:
    """An Each: one after the other, in this thread."""
    yield from map(call, items)


def in_threads(call: Callable[[Any], Any], items: Sequence[Any]) -> Generator[Any]:
    """An Each: a few at a time, in this process."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(items), 64):  # bounded: results wait for their turn
            yield from pool.map(call, items[start : start + 64])
