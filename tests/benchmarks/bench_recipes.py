"""What the recipes that train on this machine reach: each with three seeds, as its users run it.

The digits come with scikit-learn; the images of Fashion-MNIST are to be prepared as its recipe says, in this folder. A quarter
of an hour.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile

RECIPES = ("digits", "fashion-mnist")
SEEDS = (0, 1, 2)
READ_OUTS = ("linear_accuracy_untrained", "linear_accuracy", "knn_accuracy_untrained", "knn_accuracy")


@dataclasses.dataclass(frozen=True)
class Trained:
    recipe: str
    seed: int
    seconds: float
    """Of training."""
    views: int
    accuracies: tuple[float, ...]
    """In the order of READ_OUTS."""


def rows() -> list[Trained]:
    return [_trained(recipe, seed) for recipe in RECIPES for seed in SEEDS]


def _trained(recipe: str, seed: int) -> Trained:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ssl_ray", "pretrain", "-c", recipe, f"seed={seed}", f"run={folder}/run", "--json"]
        print(" ".join(command[2:]), file=sys.stderr)
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return Trained(recipe, seed, found["seconds"], found["views"], tuple(found[name] for name in READ_OUTS))


def table(rows: list[Trained]) -> str:
    """Markdown: a line for each run, and the means of each recipe's."""
    lines = [
        "| recipe | seed | views | training | linear, untrained | linear, trained | kNN, untrained | kNN, trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        some = [one for one in rows if one.recipe == recipe]
        lines += [_line(recipe, str(one.seed), one.views, one.seconds, one.accuracies) for one in some]
        seconds, views = (statistics.mean(getattr(one, name) for one in some) for name in ("seconds", "views"))
        means = tuple(map(statistics.mean, zip(*(one.accuracies for one in some), strict=True)))
        lines.append(_line(recipe, "mean", round(views), seconds, means))
    return "\n".join(lines)


def _line(recipe: str, seed: str, views: int, seconds: float, accuracies: tuple[float, ...]) -> str:
    shown = " | ".join(f"{100 * value:.1f} %" for value in accuracies)
    return f"| {recipe} | {seed} | {views:,} | {seconds:.0f} s | {shown} |"
