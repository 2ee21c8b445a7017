"""The study of the paper's claims: four studies one after the other, each in a folder of its own, and what they show."""

import functools
from collections import Counter
from typing import Any

from ssl_ray import storage
from ssl_ray.config import Config
from ssl_ray.study import run
from ssl_ray.study.claims import MARGIN, as_markdown, as_rows, claims
from ssl_ray.study.prepare import prepare
from ssl_ray.study.spec import Spec
from ssl_ray.train import runs
from ssl_ray.train.trackers import Trackers

PARTS = ("projector", "views", "fraction", "recipe")
FORMAT_VERSION = 1


def run_parts(uri: str, parts: dict[str, tuple[Spec, Config]], *, progress: run.Progress, trackers: Trackers) -> dict[str, Any]:
    """Runs the studies of PARTS below `uri` from wherever they stand, and writes claims.json and claims.md there.

    Returns {claims: a row for each, counts: of the trials of all by status}. Raises as run.run does.
    """
    studies, counts = {}, Counter[str]()
    for name in PARTS:
        spec, base = parts[name]
        at = storage.join(uri, name)
        begin = functools.partial(prepare, at, spec, base, progress=progress)
        progress("stage", {"text": f"the study of {name}, {PARTS.index(name) + 1} of {len(PARTS)}"})
        studies[name] = run.run(at, begin=begin, progress=progress, trackers=trackers)
        counts.update((studies[name].summary or {})["counts"])
    judged = claims(**studies)
    found = as_rows(judged)
    runs.write_json(storage.join(uri, "claims.json"), {"format_version": FORMAT_VERSION, "margin": MARGIN, "claims": found})
    storage.write_atomic(storage.join(uri, "claims.md"), as_markdown(judged).encode())
    return {"claims": found, "counts": dict(counts)}
