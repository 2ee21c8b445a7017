"""Compiling with numba, once a machine."""

import contextlib
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

_INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Callable[..., Any]) -> Any:
    """Decorates what only compiled functions call. Without the ways in from Python, which took a fifth of the time."""
    return njit(**_INNER)(function)


def compiled(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """`function` as machine code that holds no lock of Python's: from numba's cache (a fraction of a second), else compiled.

    The cache lies beside the function's file in __pycache__, or in the user's cache where that cannot be written;
    NUMBA_CACHE_DIR names another place.  It is right as long as all that the function calls stands in the same file: numba
    compiles anew when that one changes.
    """
    return _from_cache(function, signature) or njit(signature, nogil=True)(function)


def loader(function: Callable[..., Any], signature: Any) -> Callable[[], Callable[..., Any]]:
    """A function that gives `function` as machine code, made by `compiled` when it is first called. Safe in threads."""
    lock = threading.Lock()
    loaded: Callable[..., Any] | None = None

    def load() -> Callable[..., Any]:
        nonlocal loaded
        if loaded is None:
            with lock:
                loaded = loaded or compiled(function, signature)
        return loaded

    return load


def _from_cache(function: Callable[..., Any], signature: Any) -> Callable[..., Any] | None:
    """None where no place can be written, the disk is full or a file of the cache is broken, which is then removed."""
    try:
        dispatcher = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder for it
        return None
    try:
        dispatcher.compile(signature)
    except Exception:  # of broken pickles any kind; what is wrong in the function is raised by the second try, without a cache
        assert dispatcher.stats.cache_path is not None
        name = f"{Path(inspect.getfile(function)).stem}.{function.__name__}-*.nb[ic]"
        for file in Path(dispatcher.stats.cache_path).glob(name):
            with contextlib.suppress(OSError):
                file.unlink()
        return None
    dispatcher.disable_compile()
    return dispatcher
