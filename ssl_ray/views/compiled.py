"""Compiling with numba, once a machine."""

import contextlib
import inspect
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core import caching

_INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def inner(function: Callable[..., Any]) -> Any:
    """Decorates what only compiled functions call. Without the ways in from Python, which took a fifth of the time."""
    return njit(**_INNER)(function)


def compiled(function: Callable[..., Any], signature: Any) -> Callable[..., Any]:
    """`function` as machine code that holds no lock of Python's: from numba's cache (a fraction of a second), else compiled.

    The cache lies beside the function's file in __pycache__, or in the user's cache where that cannot be written;
    NUMBA_CACHE_DIR names another place. One that holds the code is used even where it cannot be written, as in the image of a
    container.  It is right as long as all that the function calls stands in the same file: numba
    compiles anew when that one changes.
    """
    return _from_read_only(function, signature) or _from_cache(function, signature) or njit(signature, nogil=True)(function)


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


_reading = threading.Lock()


def _from_read_only(function: Callable[..., Any], signature: Any) -> Callable[..., Any] | None:
    """None where no cache that holds the function is read-only, or it is of other code or another processor.

    numba takes no place that it cannot write to, and looks by writing a file (seen with 0.66).
    """
    file = inspect.getfile(function)
    places = [Path(file).parent / "__pycache__"]
    named: str = config.CACHE_DIR  # type: ignore[attr-defined]  # of NUMBA_CACHE_DIR
    if named:
        places.insert(0, Path(named) / caching.UserProvidedCacheLocator.get_suitable_cache_subpath(file))
    place = next((place for place in places if any(place.glob(_files(function)))), None)
    if place is None or os.access(place, os.W_OK):
        return None

    def there(locator: Any) -> None:
        if Path(locator.get_cache_path()) != place:
            raise OSError

    locator: Any = caching._CacheLocator
    with _reading:
        usual, locator.ensure_cache_path = locator.ensure_cache_path, there
        try:
            dispatcher = njit(nogil=True, cache=True)(function)
        finally:
            locator.ensure_cache_path = usual
    try:
        dispatcher.compile(signature)
    except Exception:  # it is broken, or holds other code and numba cannot write what it has compiled
        return None
    if not dispatcher.stats.cache_hits:  # compiled, and kept nowhere
        return None
    dispatcher.disable_compile()
    return dispatcher


def _files(function: Callable[..., Any]) -> str:
    """A pattern of the files of a cache that are this function's."""
    return f"{Path(inspect.getfile(function)).stem}.{function.__name__}-*.nb[ic]"


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
        for file in Path(dispatcher.stats.cache_path).glob(_files(function)):
            with contextlib.suppress(OSError):
                file.unlink()
        return None
    dispatcher.disable_compile()
    return dispatcher
