"""Ours and peers by turns in one process tree, and the table that says what came out."""

import dataclasses
import datetime
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measured.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; times are medians of the turns, in seconds for one `unit`."""

    what: str
    unit: str
    peer: str
    """Its name and version, or why it was not run."""
    cores: int
    ours_s: float | None = None
    peer_s: float | None = None
    ratio: float | None = None
    """peer_s / ours_s: how many times faster ours is."""
    spread: tuple[float, float] | None = None
    """Quartiles of the ratios of the turns."""


def skipped(what: str, peer: str, reason: str, *, unit: str = "", cores: int = 1) -> Row:
    """A row for a peer that this machine cannot run."""
    return Row(what, unit, f"{peer}: not run ({reason})", cores)


def alternate(
    what: str,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    unit: str,
    count: int | Callable[[str], int],
    cores: int = 1,
    turns: int = 7,
) -> list[Row]:
    """A row for each of `peers`, by name and version. One turn calls ours, then every peer, each once, after a first turn
    that is not counted.

    count: units of work in a call, the same for all or a function of the name ("ours" or a peer's).
    """
    work = {"ours": ours} | peers
    for call in work.values():
        call()
    units = {name: count if isinstance(count, int) else count(name) for name in work}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(turns):
        for name, call in work.items():
            begun = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - begun) / units[name])
    return [row(what, seconds["ours"], seconds[name], peer=name, unit=unit, cores=cores) for name in peers]


def row(what: str, ours: list[float], theirs: list[float], *, peer: str, unit: str, cores: int = 1) -> Row:
    """The comparison of seconds a unit, taken by turns."""
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    a, b = statistics.median(ours), statistics.median(theirs)
    return Row(what, unit, peer, cores, a, b, b / a, (quartiles[0], quartiles[2]))


def named(package: str) -> str:
    """`package version`."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package


def use_cores(count: int) -> None:
    """Keeps this process and what it starts on `count` of its cores, and torch, OpenCV and BLAS on as many threads."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def machine() -> dict[str, str]:
    """Where and with what a table was made."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
            break
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", "ssl_ray", "tests"):
        commit += "-dirty"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "load": f"{os.getloadavg()[0]:.1f}",
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": named("torch").partition(" ")[2],
    }


def machine_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for what was compared on so many cores, its peers side by side."""
    lines = ["| what | cores | ours | peers: time (times ours; quartiles of the turns) |", "|---|---|---|---|"]
    for (what, cores), group in itertools.groupby(rows, key=lambda one: (one.what, one.cores)):
        some = list(group)
        ours = next((f"{_time(one.ours_s)} per {one.unit}" for one in some if one.ours_s is not None), "")
        lines.append(f"| {what} | {cores} | {ours} | {', '.join(map(_peer, some))} |")
    return "\n".join(lines)


def _peer(one: Row) -> str:
    if one.peer_s is None or one.ratio is None or one.spread is None:
        return one.peer
    return f"{one.peer} {_time(one.peer_s)} ({_short(one.ratio)}; {_short(one.spread[0])} to {_short(one.spread[1])})"


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _time(seconds: float) -> str:
    for scale, unit in ((1e-6, "us"), (1e-3, "ms"), (1.0, "s")):
        if seconds < 1000 * scale or unit == "s":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def with_section(page: str, name: str, text: str) -> str:
    """`page` with `text`, lines, below the heading `name`, in the place of what stood there, or in that of the alphabet."""
    head, *parts = page.split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts) | {name: f"\n{text}"}
    return "\n## ".join([head, *(f"{title}\n{sections[title]}" for title in sorted(sections))])


def run(name: str, *, as_json: bool) -> None:
    """Runs one benchmark and prints what came out, as JSON or for people, for whom it is kept in docs/, too. One that is no
    comparison has a `table` of its own, one that has a page of its own a `show`."""
    module = importlib.import_module(f"bench_{name}")
    rows = module.rows()
    if hasattr(module, "show"):
        module.show(rows, as_json=as_json)
    elif as_json:
        print(json.dumps({"machine": machine(), "rows": [dataclasses.asdict(one) for one in rows]}, indent=1))
    else:
        _keep(name, getattr(module, "table", table)(rows))


def _keep(name: str, text: str) -> None:
    """Prints a table with the machine that it was made on, and makes it the section `name` of docs/measured.md."""
    whole = f"{machine_line()}\n\n{text}\n"
    print(whole)
    PAGE.write_text(with_section(PAGE.read_text(), name, whole))
