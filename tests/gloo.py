"""Runs a function in N real gloo processes, each with arguments of its own.

Four processes are started once per session (each imports torch, some seconds) and serve every call; for N < 4 the first
N of them take part, in a group of their own. Functions and arguments are pickled, so functions live at module level.
"""

import atexit
import datetime
import functools
import multiprocessing
import os
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

WORKERS = 4


def run(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """[function(group, *arguments[r]) as rank r of len(arguments) processes]; raises if any of them does."""
    pool = _pool()[: len(arguments)]
    for (_, connection), own in zip(pool, arguments, strict=True):
        connection.send_bytes(pickle.dumps((len(arguments), function, own)))
    replies = [pickle.loads(connection.recv_bytes()) for _, connection in pool]
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(replies) if not ok]
    if failures:
        # Groups do not survive a broken exchange: the next call starts anew.
        for process, _ in _pool():
            process.kill()
        _pool.cache_clear()
        raise AssertionError("\n".join(failures))
    return [value for _, value in replies]


@functools.cache
def _pool() -> list[tuple[BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    folder = tempfile.mkdtemp(prefix="gloo-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rendezvous = os.path.join(folder, "rendezvous")
    pool: list[tuple[BaseProcess, Connection]] = []
    for rank in range(WORKERS):
        ours, theirs = context.Pipe()
        # Daemons end with the test process.
        process = context.Process(target=_serve, args=(rank, rendezvous, theirs), daemon=True)
        process.start()
        theirs.close()
        pool.append((process, ours))
    return pool


def _serve(rank: int, rendezvous: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=WORKERS, timeout=timeout)
    groups = {n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, WORKERS + 1)}
    while True:
        try:
            n, function, own = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reply = (True, function(groups[n], *own))
        except BaseException:
            reply = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(reply))
