"""The pictures of the README: figures of the studies that come with ssl_ray, as `ssl-ray report --figures` draws them."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import timing

from ssl_ray.dashboard import demo, report
from ssl_ray.study.results import read_study

FOLDER = timing.ROOT / "docs" / "pictures"
PICTURES = {
    "paper/projector": ("dim", "beta"),
    "paper/views": ("training-minutes",),
    "pareto-small": ("pareto-minutes",),
    "fastest": ("parallel",),
}
"""Study: its figures."""


@dataclasses.dataclass(frozen=True)
class Picture:
    name: str
    png: bytes


def rows() -> list[Picture]:
    with demo.opened() as studies, tempfile.TemporaryDirectory() as drawn:
        for study in PICTURES:
            report.write_figures(read_study(f"{studies}/{study}"), f"{drawn}/{study}")
        return [
            Picture(name, Path(drawn, study, f"{name}.png").read_bytes()) for study, names in PICTURES.items() for name in names
        ]


def show(pictures: list[Picture], *, as_json: bool) -> None:
    """Writes them to docs/pictures, in the place of all that is there; as JSON prints their sizes alone."""
    if as_json:
        print(json.dumps({one.name: len(one.png) for one in pictures}))
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for one in pictures:
        (FOLDER / f"{one.name}.png").write_bytes(one.png)
        print(FOLDER / f"{one.name}.png")
