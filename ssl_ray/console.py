"""What a terminal shows: live progress on one, a tidy line a period elsewhere; results as short tables."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

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
    print(f"ssl-ray: {message}", file=sys.stderr)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counting(what: str, *, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A progress callback (done, total or None) for a verb that walks over shards or images."""
    if quiet:
        yield lambda done, total: None
        return
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*start, *columns, console=Console(stderr=True), transient=True)


@contextlib.contextmanager
def progress(*, quiet: bool) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """The progress callback of a run: a live bar on a terminal, else a line every LINE_EVERY_S seconds."""
    if quiet:
        yield lambda kind, value: None
    elif sys.stderr.isatty():
        with _live() as shown:
            yield shown
    else:
        yield _lines()


def _start_line(value: dict[str, Any]) -> str:
    verb = f"continues at step {value['step']}" if value["step"] else "begins"
    dropped = f", {value['dropped_per_epoch']} of them left out by turns" if value["dropped_per_epoch"] else ""
    return (
        f"{value['run']} {verb}: {value['total_steps']} steps, {value['steps_per_epoch']} an epoch "
        f"({value['images']} images{dropped})"
    )


def _evaluation_line(value: dict[str, Any]) -> str:
    at = "untrained" if value["step"] is None else f"step {value['step']}"
    return f"{at}: " + ", ".join(f"{name} {_short(value[key])}" for name, key in _READOUTS if value[key] is not None)


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
            case "stage":
                _say(value["text"])
            case "evaluation":
                _say(_evaluation_line(value))
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
                    bar.console.print(_start_line(value), highlight=False)
                    bar.update(task, total=value["total_steps"], completed=value["step"])
                case "stage":
                    bar.update(task, description=value["text"])
                case "evaluation":
                    bar.console.print(_evaluation_line(value), highlight=False)
                case "step":
                    text = _step_text(value, *rate.add(value))
                    bar.update(task, description="training", completed=value["step"] + 1, text=text)

        yield show


# Results ------------------------------------------------------------------------------------------------------------


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def record(values: dict[str, Any]) -> None:
    """One `name  value` a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        print(f"{name:<{width}}  {_short(value)}")


def rows(values: list[dict[str, Any]]) -> None:
    """A table with a line for each of `values`, which have the same keys."""
    if not values:
        print("none")
        return
    names = list(values[0])
    cells = [names, *([_short(row[name]) for name in names] for row in values)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())


def yaml_text(values: dict[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(values, sort_keys=False), end="")


def schema(values: list[dict[str, Any]]) -> None:
    for row in values:
        print(f"{row['key']}: {row['type']} = {row['default']}" + (f"\n    {row['help']}" if row["help"] else ""))


def evaluation(values: dict[str, Any]) -> None:
    record({key: value for key, value in values.items() if key != "protocol"})


def check(report: dict[str, Any]) -> None:
    for bad in report["bad_shards"]:
        print(f"bad shard   {bad['shard']}: {bad['reason']}")
    for bad in report["bad_samples"]:
        print(f"bad sample  {bad['shard']} {bad['key']}: {bad['reason']}")
    for note in report["notes"]:
        print(note)
    print(f"{report['shards']} shards, {report['samples']} samples: " + ("all good" if report["ok"] else "see above"))


def summary(values: dict[str, Any]) -> None:
    """The end of a run: what it gained, and where its results are."""
    record({key: value for key, value in values.items() if key not in ("run", "hash")})
    for name, key in (("linear", "linear_accuracy"), ("kNN", "knn_accuracy")):
        trained, untrained = values[key], values[f"{key}_untrained"]
        if trained is not None:
            print(
                f"\n{name} read-out from {values['num_train']} labelled images: {trained:.1%} of {values['num_test']} "
                f"held-out images right, {untrained:.1%} before training ({100 * (trained - untrained):+.1f} points)",
                end="",
            )
    print(f"\n\nResults: {values['run']} (summary.json, metrics/, evaluations/, checkpoints/)")
