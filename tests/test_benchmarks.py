"""The frame of the benchmarks: what its numbers mean, and what it says when asked for what there is not."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

FOLDER = Path(__file__).parent / "benchmarks"
_spec = importlib.util.spec_from_file_location("timing", FOLDER / "timing.py")
assert _spec is not None
assert _spec.loader is not None
timing = importlib.util.module_from_spec(_spec)
sys.modules["timing"] = timing  # dataclasses look it up
_spec.loader.exec_module(timing)


def test_a_row_has_medians_of_each_side_their_ratio_and_quartiles_of_the_turns():
    row = timing.row("w", [1.0, 2.0, 4.0], [10.0, 10.0, 24.0], peer="p 1.0", unit="view", cores=2)
    assert (row.ours_s, row.peer_s, row.ratio) == (2.0, 10.0, 5.0)
    assert row.spread == (5.0, 10.0)  # of 10, 5 and 6
    other = timing.row("w", [1.0, 2.0, 4.0], [1e-3, 1e-3, 1e-3], peer="q", unit="view", cores=2)
    cells = ("w", "2", "2 s per view", "p 1.0 10 s (5.00; 5.00 to 10), q 1 ms (0.00; 0.00 to 0.00)")
    assert timing.table([row, other]).splitlines()[2:] == [f"| {' | '.join(cells)} |"]


def test_sides_take_turns_after_one_that_does_not_count_and_seconds_are_for_a_unit(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def side(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            clock[0] += seconds if calls.count(name) > 1 else 1000.0

        return call

    peers = {"a": side("a", 8.0), "b": side("b", 3.0)}
    rows = timing.alternate("w", side("ours", 2.0), peers, unit="view", count={"ours": 4, "a": 1, "b": 2}.__getitem__, turns=3)
    assert calls == ["ours", "a", "b"] * 4
    assert [(row.peer, row.ours_s, row.peer_s, row.ratio) for row in rows] == [("a", 0.5, 8.0, 16.0), ("b", 0.5, 1.5, 3.0)]


def test_a_peer_that_is_not_there_is_a_row_that_says_so():
    row = timing.skipped("w", "ffcv", "No module named 'ffcv'", cores=2)
    assert timing.table([row]).splitlines()[-1] == "| w | 2 |  | ffcv: not run (No module named 'ffcv') |"


def test_a_section_takes_the_place_of_its_older_one_and_leaves_the_others():
    page = timing.with_section(timing.with_section("# All\n", "views", "old\n"), "loss", "of it\n")
    assert timing.with_section(page, "views", "new\n") == "# All\n\n## loss\n\nof it\n\n## views\n\nnew\n"


@pytest.mark.parametrize("heading", ["Start", "Fashion-MNIST", "How fast"])
def test_tables_and_outputs_in_the_readme_are_what_was_measured(heading: str):
    section = (ROOT / "README.md").read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    lines = [line for language, text in blocks if not language for line in text.splitlines() if line != "..."]
    lines += [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 3
    assert set(lines) <= set((ROOT / "docs" / "measured.md").read_text().splitlines())


@pytest.mark.parametrize("recipe", ["digits", "fashion-mnist"])
def test_a_recipe_says_to_expect_the_means_that_were_measured(recipe: str):
    row = next(line for line in (ROOT / "docs" / "measured.md").read_text().splitlines() if f"| {recipe} | mean |" in line)
    linear_before, linear, knn_before, knn = row.strip("| ").split(" | ")[-4:]
    head = (ROOT / "ssl_ray" / "recipes" / f"{recipe}.yaml").read_text()
    assert f"linear {linear_before} untrained, {linear} trained; kNN {knn_before}, {knn}." in head


@pytest.mark.parametrize("option", [["views", "vews"], ["vews"]])
def test_a_benchmark_that_does_not_exist_is_refused_with_what_there_is(option):
    done = subprocess.run([sys.executable, str(FOLDER), *option], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no benchmark vews. There are: " in done.stderr
    assert "views" in done.stderr
