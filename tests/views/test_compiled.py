"""numba's cache: filled once, elsewhere where the package cannot be written, done without where nothing can, mended if broken."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import config, types

from ssl_ray.views.compiled import compiled

SOURCE = """
def twice(x, y):
    y[0] = 2 * x
"""
SIGNATURE = types.void(types.int64, types.int64[::1])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "arithmetic.py").write_text(SOURCE)
    return tmp_path


def answer(folder: Path, x: int = 21) -> tuple[int, int]:
    """2 x, and whether the cache had the code, as a process finds it that loads the module for the first time."""
    spec = importlib.util.spec_from_file_location("arithmetic", folder / "package" / "arithmetic.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["arithmetic"] = module  # numba's files name the module, which must be importable
    function = compiled(module.twice, SIGNATURE)
    result = np.zeros(1, np.int64)
    function(x, result)
    return int(result[0]), sum(function.stats.cache_hits.values())


def cached(folder: Path, pattern: str = "*.nb[ic]") -> list[Path]:
    return sorted(folder.rglob(pattern))


def unwritable(path: Path) -> None:
    """Even for root: a file is where the folder would be."""
    path.write_bytes(b"")


def test_code_is_kept_beside_its_file_and_found_again(folder):
    assert [answer(folder), answer(folder)] == [(42, 0), (42, 1)]
    assert {file.parent for file in cached(folder)} == {folder / "package" / "__pycache__"}


def test_a_package_that_cannot_be_written_has_its_code_in_the_users_cache(folder):
    unwritable(folder / "package" / "__pycache__")
    assert [answer(folder), answer(folder)] == [(42, 0), (42, 1)]
    assert len(cached(folder / "user")) == 2


@pytest.mark.parametrize("named", [False, True])
def test_a_cache_that_is_full_and_read_only_is_used(tmpfs, monkeypatch, named):
    place = tmpfs("size=4m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "user"))
    (place / "package").mkdir()
    (place / "package" / "arithmetic.py").write_text(SOURCE)
    if named:
        monkeypatch.setattr(config, "CACHE_DIR", str(place / "kept"))
    assert answer(place) == (42, 0)
    tmpfs("ro")
    assert answer(place) == (42, 1)


def test_a_cache_that_is_read_only_and_of_other_code_is_left_alone(tmpfs, monkeypatch, tmp_path):
    place = tmpfs("size=4m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (place / "package").mkdir()
    (place / "package" / "arithmetic.py").write_text(SOURCE)
    assert answer(place) == (42, 0)
    (place / "package" / "arithmetic.py").write_text(SOURCE.replace("2 * x", "2 * x + 1"))
    tmpfs("ro")
    assert [answer(place), answer(place)] == [(43, 0), (43, 1)]


def test_where_nothing_can_be_written_code_is_compiled_each_time(folder):
    unwritable(folder / "package" / "__pycache__")
    unwritable(folder / "user")
    assert [answer(folder), answer(folder)] == [(42, 0), (42, 0)]


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("rest", [b"", b"\x80\x04", b"not a pickle"])
def test_a_broken_file_is_removed_and_the_cache_filled_anew(folder, kind, rest):
    answer(folder)
    for file in cached(folder, kind):
        file.write_bytes(rest)
    assert [answer(folder), answer(folder), answer(folder)] == [(42, 0), (42, 0), (42, 1)]


def test_changed_code_is_compiled_anew(folder):
    answer(folder)
    (folder / "package" / "arithmetic.py").write_text(SOURCE.replace("2 * x", "2 * x + 1"))
    assert answer(folder) == (43, 0)


def test_what_is_wrong_with_the_code_itself_is_raised(folder):
    (folder / "package" / "arithmetic.py").write_text(SOURCE.replace("2 * x", "x.no_such_name"))
    with pytest.raises(Exception, match="no_such_name"):
        answer(folder)
