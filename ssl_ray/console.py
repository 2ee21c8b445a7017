"""What a terminal shows: live progress on one, a tidy line a period elsewhere; results as short tables."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from ssl_ray.errors import in_line, shown

LINE_EVERY_S = 15.0
"""Seconds between two progress lines where there is no terminal."""


@contextlib.contextmanager
def stdout_for_the_result() -> Iterator[None]:
    """Sends whatever libraries print on stdout to stderr, so that stdout holds the result alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def error(message: str) -> None:
    print(f"ssl-ray: {shown(message)}", file=sys.stderr)


def _say(line: str) -> None:
    print(shown(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress callback (done, total or None) for a verb that walks over shards or images."""
    if quiet:
        yield lambda done, total: None
        return
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    begun = last = time.monotonic()

    def show(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            _say(f"[{last - begun:5.0f} s] {done:,}{'' if total is None else f'/{total:,}'} {what}")

    yield show


def _bar(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    # Narrow, so that the text of a run fits beside it in 80 columns.
    start = (TextColumn("{task.description}"), BarColumn(bar_width=14), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*start, *columns, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """The progress callback of a run: a live bar on a terminal, else a line every LINE_EVERY_S seconds."""
    if quiet:
        yield lambda kind, value: None
    elif sys.stderr.isatty():
        with _live() as show:
            yield show
    else:
        yield _lines()


def _start_line(value: dict[str, Any]) -> str:
    verb = "is complete" if value["complete"] else f"continues at step {value['step']}" if value["step"] else "begins"
    dropped = f", {value['dropped_per_epoch']} of them left out by turns" if value["dropped_per_epoch"] else ""
    return (
        f"{value['run']} {verb}: {value['total_steps']} steps, {value['steps_per_epoch']} an epoch "
        f"({value['images']} images{dropped})"
    )


def _evaluation_line(value: dict[str, Any]) -> str:
    at = "untrained" if value["step"] is None else f"step {value['step']}"
    lost = f"; {value['unreadable']} of the images could not be read" if value["unreadable"] else ""
    return f"{at}: " + ", ".join(f"{name} {_short(value[key])}" for name, key in _READOUTS if value[key] is not None) + lost


def _study_line(value: dict[str, Any]) -> str:
    """What a study is about to take."""
    currency = f" {value['currency']}" if value["currency"] else ""
    costs = "".join(f", {cost:.2f}{currency} ({name})" for name, cost in (value["cost"] or {}).items())
    minutes = f"{value['minutes']:.0f}" if value["minutes"] >= 10 else f"{value['minutes']:.1f}"
    return f"{value['study']}: {value['trials']} trials, {value['steps']:,} steps, {minutes} minutes of a trial's machine{costs}"


def _trial_line(value: dict[str, Any]) -> str:
    what = value["status"]
    if value["status"] == "complete":
        what += f": {value['objective']} {_short(value['result'])}"
    elif why := value.get("error") or value.get("reason"):
        lines = why.splitlines()  # an error of ours begins with what is wrong, a traceback ends with it
        what += f": {in_line(lines[0] if len(lines) <= 2 else lines[-1])}"
    return f"{value['name']} {what} ({value['ended']} of {value['trials']} ended)"


_READOUTS = (("linear", "linear_accuracy"), ("kNN", "knn_accuracy"), ("alpha", "alpha"), ("RankMe", "rankme"))


def _step_text(record: dict[str, Any], rate: float, wait: float) -> str:
    return f"loss {record['loss']:.4g}  lr {record['lr']:.2g}  {rate:,.0f} images/s  data wait {wait:.0%}"


class _Rate:
    """Images a second and the share of waiting over the last steps."""

    def __init__(self) -> None:
        self.images = self.seconds = self.wait_s = 0.0

    def add(self, record: dict[str, Any]) -> tuple[float, float]:
        fade = 0.95
        self.images = fade * self.images + record["images"]
        self.seconds = fade * self.seconds + record["seconds"]
        self.wait_s = fade * self.wait_s + record["data_wait_s"]
        return self.images / self.seconds, self.wait_s / self.seconds


def _lines() -> Callable[[str, dict[str, Any]], None]:
    rate, last, total, begun = _Rate(), 0.0, 0, time.monotonic()

    def show(kind: str, value: dict[str, Any]) -> None:
        nonlocal last, total
        match kind:
            case "start":
                total = value["total_steps"]
                _say(_start_line(value))
            case "stage" | "note":
                _say(value["text"])
            case "study":
                _say(_study_line(value))
            case "evaluation":
                _say(_evaluation_line(value))
            case "trial":
                _say(f"[{time.monotonic() - begun:5.0f} s] {_trial_line(value)}")
            case "step":
                speed, wait = rate.add(value)
                if time.monotonic() - last > LINE_EVERY_S or value["step"] + 1 == total:
                    last = time.monotonic()
                    _say(f"[{last - begun:5.0f} s] step {value['step'] + 1}/{total}  {_step_text(value, speed, wait)}")

    return show


@contextlib.contextmanager
def _live() -> Iterator[Callable[[str, dict[str, Any]], None]]:
    from rich.progress import TextColumn

    rate = _Rate()
    with _bar(TextColumn("{task.fields[text]}")) as bar:
        task = bar.add_task("preparing", total=None, text="")

        def show(kind: str, value: dict[str, Any]) -> None:
            match kind:
                case "start":
                    bar.console.print(shown(_start_line(value)), highlight=False, markup=False)
                    bar.update(task, total=value["total_steps"], completed=value["step"])
                case "stage" | "note":
                    what, _, more = value["text"].partition(": ")
                    if more:
                        bar.console.print(shown(value["text"]), highlight=False, markup=False)
                    bar.update(task, description=shown(what))
                case "study":
                    bar.console.print(shown(_study_line(value)), highlight=False, markup=False)
                case "evaluation":
                    bar.console.print(_evaluation_line(value), highlight=False)
                case "trial":
                    bar.console.print(shown(_trial_line(value)), highlight=False, markup=False)
                    bar.update(task, description="trials", total=value["trials"], completed=value["ended"])
                case "step":
                    speed, wait = rate.add(value)
                    text = f"loss {value['loss']:.4g}  {speed:,.0f} images/s  wait {wait:.0%}"
                    bar.update(task, description="training", completed=value["step"] + 1, text=text)

        yield show


# Results ------------------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else in_line(str(value))


def record(values: dict[str, Any]) -> None:
    """One `name  value` a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {_short(value)}")


def bundle(values: dict[str, Any]) -> None:
    """What a zip of `ssl-ray debug` holds."""
    _table(values["files"])
    print(f"\nWritten: {in_line(values['written'])} ({values['bytes'] / 1000:,.0f} kB). Look through it before you hand it on.")


def exported(values: dict[str, Any]) -> None:
    """The files of an export; `difference`: the largest of a feature from that of the run."""
    _table(values["files"])
    print(f"\nWritten: {in_line(values['written'])}, the encoder after {values['step']:,} steps")


def rows_or(nothing: str) -> Callable[[list[dict[str, Any]]], None]:
    """Shows a table with a line for each of the values, which have the same keys; `nothing` where there are none."""
    return lambda values: _table(values) if values else print(nothing)


def findings(values: list[dict[str, Any]]) -> None:
    """A line for each, and what to do below it."""
    width = max(len(row["check"]) for row in values)
    for row in values:
        print(f"{'ok' if row['ok'] else 'TO DO':<5}  {row['check']:<{width}}  {shown(row['found'])}")
        if row["do"]:
            print(f"{'':<5}  {'':<{width}}  {shown(row['do'])}")


def _table(values: list[dict[str, Any]]) -> None:
    names = list(values[0])
    cells = [names, *([_short(row[name]) for name in names] for row in values)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def yaml_text(values: dict[str, Any]) -> None:
    """A nested dictionary as YAML, one line a key."""
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, inner in value.items():
                print(f"  {name}: {_yaml(inner)}")
        else:
            print(f"{key}: {_yaml(value)}")


def _yaml(value: Any) -> str:
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def schema(values: list[dict[str, Any]]) -> None:
    """Each key with its default, type and meaning; those that may change when a run is continued are marked."""
    section = ""
    for row in values:
        if section != (section := row["key"].rpartition(".")[0]):
            print()
        free = "" if row["identity"] else "  (may change when a run is continued)"
        print(f"{row['key']}={_yaml(row['default'])}  [{_kind(row['type'])}]{free}")
        if row["help"]:
            print(f"    {row['help']}")


def _kind(annotation: str) -> str:
    """A type as a reader of YAML names it: `float | tuple[float, ...]` is `float or [float, ...]`."""
    text = annotation.replace("tuple[", "[").replace("None", "null").replace("Workers", "{min: int, max: int}")
    while "Literal[" in text:
        before, _, rest = text.partition("Literal[")
        choices, _, after = rest.partition("]")
        text = before + choices.replace("'", "").replace(", ", " or ") + after
    return text.replace(" | ", " or ")


def evaluation(values: dict[str, Any]) -> None:
    record({key: value for key, value in values.items() if key not in ("protocol", "spectrum")})


def protocols(values: list[dict[str, Any]]) -> None:
    """A line for each number of each protocol, with its interval."""
    rows = []
    for value in values:
        name, seeds = value["protocol"]["name"], len(value["seeds"])
        for shots in value.get("shots", ()):
            rows.append((name, f"{shots['images_per_class']} a class", shots, "%", seeds))
        for part in value.get("fractions", ()):
            rows.append((name, f"{100 * part['fraction']:g} % of labels", part["top1"], "%", seeds))
        measures = (("top-1", "top1", "%"), ("top-5", "top5", "%"), ("alpha", "alpha", ""), ("RankMe", "rankme", ""))
        for label, key, unit in (*measures, ("LiDAR", "lidar", "")):
            if value.get(key) is not None:
                rows.append((name, label, value[key], unit, seeds))
    if values:
        first = values[0]
        at = "untrained" if first["step"] is None else f"step {first['step']}"
        print(f"{at}, judged on {first['num_test']:,} images of {in_line(first['test']['uri'])}")
    _table([_protocol_row(*row) for row in rows])


def _protocol_row(name: str, label: str, number: dict[str, Any], unit: str, seeds: int) -> dict[str, Any]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %" if unit == "%" else f"{value:.4g}"

    def both(interval: list[float] | None) -> str:
        return "-" if interval is None else f"{text(interval[0])} to {text(interval[1])}"

    over_seeds = both(number.get("seed_interval"))
    return {
        "protocol": name,
        "measure": label,
        "value": text(number["value"]),
        "95 % interval": both(number["interval"]),
        "over seeds": over_seeds,
        "seeds": seeds or "-",
    }


def check(report: dict[str, Any]) -> None:
    for bad in report["bad_shards"]:
        print(in_line(f"bad shard   {bad['shard']}: {bad['reason']}"))
    for bad in report["bad_samples"]:
        print(in_line(f"bad sample  {bad['shard']} {bad['key']}: {bad['reason']}"))
    for note in report["notes"]:
        print(in_line(note))
    counts = f"{report['shards']} shards, {report['samples']} samples"
    if report["ok"]:
        print(f"{counts}: all good")
        return
    print(f"{counts}: {len(report['bad_shards'])} bad shards, {len(report['bad_samples'])} bad samples, as named above.")
    if report["bad_samples"]:
        print("Runs that begin from now on leave the bad samples out; check again after a repair.")


_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def _size(count: int) -> str:
    return next((f"{count / unit:.1f} {name}" for unit, name in _UNITS if count >= unit), f"{count} bytes")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plan(values: dict[str, Any]) -> None:
    """What a run would take: counts as they are, bytes and seconds in units that are easy to read."""
    lines = {}
    for name, value in values.items():
        if name.endswith("_bytes"):
            lines[name.removesuffix("_bytes")] = _size(value)
        elif name.endswith("_s"):
            lines[name.removesuffix("_s")] = _duration(value) if value >= 1 else f"{1000 * value:.0f} ms"
        else:
            lines[name] = value if isinstance(value, str) else f"{value:,}"
    record({name.replace("_", " "): value for name, value in lines.items()})


def profile(values: dict[str, Any]) -> None:
    """The stages of a step in milliseconds and as shares of it, and what was made beside it."""
    step_s = values["step_s"]

    def rows(seconds: dict[str, float]) -> None:
        for name, took in seconds.items():
            print(f"  {name:<12}{1000 * took:>10.2f} ms{took / step_s:>8.1%}")

    workers = values["workers"]
    whose = f"worker 0 of {workers}" if workers else "this process"
    print(f"a step of {whose}, mean of {values['steps']}: {1000 * step_s:.2f} ms")
    rows(values["stages_s"])
    print("of that, inside forward, loss and backward")
    rows({"all-reduce": values["all_reduce_s"]})
    print("views of a step, made " + ("beside it by its data tasks" if workers else "within its wait"))
    rows(values["making_s"])
    print(f"memory at its peak: {_size(values['peak_memory_bytes'])}")


def summary(values: dict[str, Any]) -> None:
    """The end of a run: what it took, what it gained, and where its results are."""
    print(
        f"{values['steps']:,} steps, {values['images']:,} images, {values['views']:,} views in {_duration(values['seconds'])}: "
        f"{values['images_per_s']:,.0f} images/s, {values['data_wait_share']:.0%} of the time waiting for data"
    )
    print(", ".join(f"{name} {_short(values[key])}" for name, key in _END))
    if values["linear_accuracy"] is not None:
        print(f"\nread-outs from {values['num_train']:,} labelled images, judged on {values['num_test']:,} held-out ones:")
        print(f"{'':8}{'untrained':>10}{'trained':>10}{'gain':>14}")
        for name, key in _READOUTS[:2]:
            before, after = values[f"{key}_untrained"], values[key]
            print(f"{name:8}{before:>10.1%}{after:>10.1%}{100 * (after - before):>+7.1f} points")
    else:
        print("\nno linear and kNN read-outs: the images have no labels")
    print(f"\nResults: {in_line(values['run'])} (summary.json, metrics/, evaluations/, checkpoints/)")


def study_summary(values: dict[str, Any]) -> None:
    """Predicted against real, and how the trials ended."""
    for name in ("predicted", "real"):
        said = [(key, value) for key, value in (values[name] or {}).items() if key != "cost"]
        said += [(f"cost ({price})", cost) for price, cost in ((values[name] or {}).get("cost") or {}).items()]
        print(f"{name:<10}" + ", ".join(f"{key} {_short(value)}" for key, value in said))
    print("trials    " + ", ".join(f"{count} {status}" for status, count in values["counts"].items()))


def claims(values: dict[str, Any]) -> None:
    """Two lines for each: the verdict and the claim, and what was measured."""
    for row in values["claims"]:
        print(f"{row['verdict']:<10} {row['claim']}")
        interval = f"{_short(row['effect'])} ({_short(row['low'])} to {_short(row['high'])}, {row['n']} seeds)"
        print(f"{'':<10} {row['measured']}: {interval}; the claim: above {_short(row['above'])}")
    print("trials     " + ", ".join(f"{count} {status}" for status, count in values["counts"].items()))


_END = (
    ("loss", "loss"),
    ("alpha", "alpha"),
    ("RankMe", "rankme"),
    ("bad samples", "bad_samples"),
    ("dropped samples", "dropped_samples"),
    ("restarts", "restarts"),
)
