"""The pictures of the README: figures of the studies that come with ssl_ray, as `ssl-ray report --figures` draws them."""

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


def rows() -> dict[str, str]:
    """SVG by name."""
    with demo.opened() as studies, tempfile.TemporaryDirectory() as drawn:
        for study in PICTURES:
            report.write_figures(read_study(f"{studies}/{study}"), f"{drawn}/{study}")
        return {name: Path(drawn, study, f"{name}.svg").read_text() for study, names in PICTURES.items() for name in names}


def show(pictures: dict[str, str], *, as_json: bool) -> None:
    """Writes them to docs/pictures, in the place of all that is there, and prints their places; as JSON prints them."""
    if as_json:
        print(json.dumps(pictures))
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, svg in pictures.items():
        at = FOLDER / f"{name}.svg"
        at.write_text(svg)
        print(at)
