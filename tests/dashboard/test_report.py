"""The report: the same numbers as the page has, harmless texts, tables that say what they were made with."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import synthetic

from ssl_ray.cli import main
from ssl_ray.dashboard import page, report
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, read_study

GRID = {"model.projector_dim": [64, 256], "loss.form": ["mean", "<b>|_&%$#{x}\\"]}
HOSTILE = "</script><script>alert(1)</script><!-- [x](javascript:alert(2)) \\input{/etc/passwd} ‮ \n# y"
NOW = synthetic.NOW


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    at = str(tmp_path_factory.mktemp("report") / "study")
    base = synthetic.head(1).base
    base["data"]["uri"] = "/nowhere/shards"
    synthetic.write(at, 12, 100, grid=GRID, name=HOSTILE, base=base, machine={"cpu": "EPYC", "x": math.nan})
    return read_study(at)


def plain(value: dict) -> dict:
    """As JSON has it."""
    return json.loads(page.dumped(value))


def inlined(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_the_file_holds_what_the_server_says(study: Study):
    held = inlined(report.html(study, now=NOW))
    assert held["study"] == plain(page.studied(study, now=NOW))
    assert held["figures"] == {name: plain(page.draw(study, name)) for name in page.FIGURES}
    assert held["made"] == NOW


def test_the_file_loads_nothing_and_a_text_of_results_ends_no_script(study: Study):
    text = report.html(study, now=NOW)
    head = text[: text.index("<style>")]
    assert "default-src 'none'" in head
    assert len(re.findall(r"<script[ >]", text.replace(page.PLOTLY_JS.read_text(), ""))) == 1 + 1 + len(page.SCRIPTS)
    assert re.findall(r"(?:src|href)=(\S+)", head) == ['"data:,">']
    assert "</script><script>alert(1)" not in text
    assert "<!-- [x]" not in text


def test_the_gallery_says_why_it_is_not_there(study: Study):
    held = inlined(report.html(study, now=NOW))
    assert held["gallery"]["pictures"] == {}
    assert "/nowhere/shards" in held["gallery"]["reason"]


def test_a_cell_is_the_mean_over_the_complete_seeds(study: Study):
    trials = list(study.trials)
    trials[0] = dataclasses.replace(trials[0], state=dataclasses.replace(trials[0].state, status="failed", cost=9.0))
    cells = report.cells(dataclasses.replace(study, trials=tuple(trials)))
    assert [cell.result.n for cell in cells] == [2, 3, 3, 3]
    assert cells[0].result == analysis.mean_interval([trial.result("linear_accuracy") for trial in trials[1:3]])
    assert cells[0].cost == pytest.approx(0.083)


def test_the_markdown_table_has_a_row_a_cell_and_what_it_was_made_with(study: Study):
    text = report.markdown(study)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 4
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1  # as many cells everywhere
    first = report.cells(study)[0]
    half = first.result.high - first.result.mean
    assert rows[2].startswith(f"| 64 | mean | {100 * first.result.mean:.2f} | {100 * half:.2f} | 3 | ")
    assert study.head.hash in text
    for part in ("EPYC", "seeds: 0, 1, 2", f"ssl\\_ray: {study.head.ssl_ray}", "12 complete", "    model.encoder="):
        assert part in text
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert not [line for line in text.splitlines() if line.startswith("# y")]


def test_the_latex_table_is_escaped(study: Study):
    text = report.latex(study)
    body = text[text.index("\\begin{tabular}") :]
    assert body.startswith(
        "\\begin{tabular}{llrrrrr}\n\\toprule\nd & loss.form & linear (\\%), mean & $\\pm$ 95 \\% & n & minutes"
    )
    assert "$<$b$>$|\\_\\&\\%\\$\\#\\{x\\}\\textbackslash{} & " in body
    assert all(line.startswith("%") for line in text[: text.index("\\begin{tabular}")].splitlines())
    assert body.count("\\\\\n") == 1 + 4


def test_the_verb_writes_what_is_asked_for(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture):
    files = {name: tmp_path / name for name in ("x.html", "x.md", "x.tex")}
    arguments = ["-o", files["x.html"], "--markdown", files["x.md"], "--latex", files["x.tex"]]
    assert main(["report", study.uri, *map(str, arguments)]) == 0
    assert files["x.md"].read_text() == report.markdown(study)
    assert files["x.html"].read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files.values()]


def test_mistakes_of_the_verbs_end_in_two_lines(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "token").write_text("short")
    for code, part, *arguments in [
        (2, "nothing to write", "report", study.uri),
        (2, "apt install chromium", "report", study.uri, "--figures", str(tmp_path / "f")),
        (3, "no study here", "report", str(tmp_path), "-o", str(tmp_path / "x.html")),
        (2, "either", "dashboard"),
        (2, "part of the study", "report", study.uri, "-o", f"{study.uri}/study.json"),
        (2, "expected a file", "report", study.uri, "-o", "/dev/null"),
        (2, "expected a file", "report", study.uri, "-o", str(tmp_path)),
        (2, "expected a file", "report", study.uri, "--latex", str(tmp_path / "none" / "x.tex")),
        (2, "two texts", "report", study.uri, "--latex", str(tmp_path / "x"), "--markdown", str(tmp_path / "x")),
        (3, "no such folder", "dashboard", str(tmp_path / "none")),
        (2, "--token-file", "dashboard", str(tmp_path), "--host", "0.0.0.0"),
        (2, "16 or more", "dashboard", str(tmp_path), "--token-file", str(tmp_path / "token")),
        (2, "cannot be read", "dashboard", str(tmp_path), "--token-file", str(tmp_path / "none")),
    ]:
        assert main(arguments) == code, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 2, lines
        assert part in " ".join(lines)
