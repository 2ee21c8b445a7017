"""The studies that come with ssl_ray: they are whole, and every page has something to show of them."""

import json
import re
import signal
import urllib.request
from collections.abc import Iterator

import pytest
from harness import ROOT, finish, start

from ssl_ray.dashboard import demo, page
from ssl_ray.study import claims, paper
from ssl_ray.study.results import Study, read_study

PAPERS = ("paper", "paper-small")
SEARCHES = ("crops", "fastest", "fastest-small", "pareto-small")
STUDIES = (*(f"{folder}/{part}" for folder in PAPERS for part in sorted(paper.PARTS)), *SEARCHES)


@pytest.fixture(scope="module")
def studies() -> Iterator[dict[str, Study]]:
    with demo.opened() as folder:
        yield {name: read_study(f"{folder}/{name}") for name in STUDIES}


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_is_complete_and_every_figure_shows_some(studies, name: str):
    study = studies[name]
    assert {trial.state.status for trial in study.trials} == {"complete"}
    assert {trial.seed for trial in study.trials} == set(study.head.seeds)
    needs = {"pareto-cost": study.head.prices, "map-minutes": study.head.target_accuracy}
    if name == "crops":
        needs["beta"] = None  # of Barlow Twins alone
    for figure in set(page.FIGURES) - {name for name, given in needs.items() if given is None}:
        assert page.draw(study, figure)["data"], figure


@pytest.mark.parametrize("folder", PAPERS)
def test_the_claims_in_the_docs_are_those_of_its_studies(studies, folder: str):
    found = claims.claims(**{part: studies[f"{folder}/{part}"] for part in paper.PARTS})
    assert claims.as_markdown(found) in (ROOT / "docs" / "claims.md").read_text()


def test_the_claims_in_the_readme_are_lines_of_the_docs():
    lines = re.findall(r"^\| (?:shown|not shown|opposite) \|.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) > 3
    assert set(lines) <= set((ROOT / "docs" / "claims.md").read_text().splitlines())


def test_it_is_served():
    process = start("dashboard", "--demo", "--port", "0", "--json")
    try:
        address = re.match(r"http://\S+", process.stderr.readline())[0]
        with urllib.request.urlopen(f"{address}api/studies") as answer:
            found = json.load(answer)["studies"]
    finally:
        process.send_signal(signal.SIGINT)
    assert sorted(row["study"] for row in found) == sorted(STUDIES)
    assert finish(process)[0] == 130
