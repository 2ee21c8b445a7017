"""How time and memory of a training step grow with views, batch, image size, data set and workers.

Each point is `ssl-ray profile` of a run of its own. The table goes to the terminal; docs/growth.md and docs/growth.png are
written anew.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import photographs
import timing

DOCS = timing.ROOT / "docs"
BASE = {"views.count": 4, "views.size_px": 32, "train.batch": 128, "images": 4096, "train.workers": 0}
AXES = {
    "views.count": [2, 4, 8, 16],
    "train.batch": [64, 128, 256, 512],
    "views.size_px": [32, 64, 128],
    "images": [1024, 4096, 65536],
    "train.workers": [0, 1, 2, 4],
}
"""What grows, one at a time from BASE; `images` are those of the data set, which has no key."""
GROWS = {"views.count": 1, "train.batch": 1, "views.size_px": 2, "images": 0, "train.workers": 0}
"""The power of each axis with which the work of a step grows."""
NAMES = {
    "views.count": "views of an image",
    "train.batch": "images in a step",
    "views.size_px": "pixels a side",
    "images": "images in the data set",
    "train.workers": "workers (0: without Ray)",
}
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Point:
    axis: str
    value: int
    step_s: float
    making_s: float
    """Of `step_s` without Ray; beside it in data tasks with."""
    peak_bytes: int
    """Of one worker."""


def rows() -> list[Point]:
    timing.use_cores(2)
    with tempfile.TemporaryDirectory() as folder:
        counts = AXES["images"]
        data = {n: photographs.write_shards(Path(folder) / str(n), count=n, kind="jpeg").uri for n in counts}
        return [_point(axis, value, BASE | {axis: value}, data) for axis, values in AXES.items() for value in values]


def show(points: list[Point], *, as_json: bool) -> None:
    """Prints the page and writes it with its plot; as JSON prints the points alone."""
    if as_json:
        print(json.dumps({"machine": timing.machine(), "points": [dataclasses.asdict(point) for point in points]}, indent=1))
        return
    text = page(points)
    print(text)
    (DOCS / "growth.md").write_text(text)
    plot(points, DOCS / "growth.png")


def _point(axis: str, value: int, keys: dict[str, int], data: dict[int, str]) -> Point:
    given = [f"{key}={at}" for key, at in keys.items() if key != "images"]
    command = [sys.executable, "-m", "ssl_ray", "profile", "digits", "--json", f"--steps={STEPS}"]
    command += ["optim.name=adam", "views.channels=3", f"data.uri={data[keys['images']]}", *given]
    print(" ".join(command[2:]), file=sys.stderr)
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return Point(axis, value, done["step_s"], sum(done["making_s"].values()), done["peak_memory_bytes"])


def page(points: list[Point]) -> str:
    """docs/growth.md."""
    base = ", ".join(f"{value:,} {NAMES[key]}" for key, value in BASE.items() if key != "train.workers")
    lines = [
        "# How a training step grows",
        "",
        f"One thing grows at a time, from {base}; the `small` encoder, without Ray but where workers grow.",
        f"Means of {STEPS} steps, each point a run of its own: `python tests/benchmarks growth` makes this page.",
        "",
        timing.machine_line(),
        "",
        "![time and memory of a step](growth.png)",
        "",
        "| what grows | value | a step | of that, or beside it: making views | memory of a worker |",
        "|---|---|---|---|---|",
    ]
    for point in points:
        times = f"{1000 * point.step_s:.0f} ms | {1000 * point.making_s:.1f} ms"
        lines.append(f"| {NAMES[point.axis]} | {point.value:,} | {times} | {point.peak_bytes / 2**20:,.0f} MiB |")
    return "\n".join(lines) + "\n"


def plot(points: list[Point], path: Path) -> None:
    """A column for each axis: time above, on logarithmic scales, memory below; dotted: in proportion to the work."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, cells = pyplot.subplots(2, len(AXES), figsize=(14, 5), layout="constrained", sharey="row")
    for (times, memory), (axis, power) in zip(cells.T, GROWS.items(), strict=True):
        mine = [point for point in points if point.axis == axis]
        x = [point.value for point in mine]
        times.plot(x, [1000 * point.step_s for point in mine], "o-", label="step")
        times.plot(x, [1000 * point.making_s for point in mine], "s--", label="making views")
        if power:
            due = [1000 * mine[0].step_s * (value / x[0]) ** power for value in x]
            times.plot(x, due, ":", color="black", linewidth=0.8, label="in proportion to the work")
        times.set_yscale("log")
        memory.plot(x, [point.peak_bytes / 2**20 for point in mine], "o-")
        memory.set_xlabel(NAMES[axis])
        for cell in (times, memory):
            if axis != "train.workers":
                cell.set_xscale("log", base=2)
            cell.set_xticks(x, [f"{value:,}" for value in x])
            cell.minorticks_off()
            cell.grid(alpha=0.3)
    cells[1][0].set_ylim(bottom=0)
    cells[0][0].set_ylabel("ms a step")
    cells[1][0].set_ylabel("MiB of a worker")
    cells[0][3].legend(*cells[0][0].get_legend_handles_labels(), frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)
