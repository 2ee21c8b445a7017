"""What stays of a study: its page as one file that needs no server, tables for a paper, pictures of its figures.

The file holds the page's scripts, styles and data; it asks nothing of any network and may be sent to others. Pictures are drawn
by a Chromium that is installed, from the same figures.
"""

import base64
import dataclasses
import json
import math
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ssl_ray import storage
from ssl_ray.dashboard import page
from ssl_ray.dashboard.drawing import SHORT, is_number, number
from ssl_ray.dashboard.gallery import gallery, looks
from ssl_ray.dashboard.spectrum import eigenspectrum, read_spectra
from ssl_ray.errors import DataError, ResourceError, SslRayError, UsageError, in_line, shown
from ssl_ray.study import analysis
from ssl_ray.study.results import Study, Trial, counts

PICTURES = 4
"""At most so many different galleries are in the file: each is some 100 kB."""
SPECTRA = 20
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRAWN_WITHIN_S = 300
WIDTH_PX, HEIGHT_PX = 1000, 600


# Page ----------------------------------------------------------------------------------------------------------------


def html(study: Study, *, now: float) -> str:
    """The page of the study as one file. now: unix seconds, which it says it is as of."""
    held = {
        "made": now,
        "study": page.studied(study, now=now),
        "figures": {name: page.draw(study, name) for name in page.FIGURES},
        "spectra": _spectra(study),
        "gallery": _galleries(study),
    }
    return page.render(title=study.head.name, live=False, inlined=held)


def _best_first(study: Study) -> list[Trial]:
    """All trials, those with the best results first."""
    objective, head = study.head.objective, study.head
    good = analysis.goodness([trial.result(objective) for trial in study.trials], head.mode, head.target).tolist()
    order = sorted(range(len(good)), key=lambda i: (not math.isfinite(good[i]), -good[i] if math.isfinite(good[i]) else 0.0))
    return [study.trials[i] for i in order]


def _spectra(study: Study) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for trial in _best_first(study)[:SPECTRA]:
        spectra = read_spectra(study.uri, trial.name) if len(trial.readouts.step) else []
        if spectra:
            found[trial.name] = eigenspectrum(spectra)
    return found


def _galleries(study: Study) -> dict[str, Any]:
    """Pictures as data URIs by trial, one for each different look; or the reason why there are none."""
    pictures: dict[str, str] = {}
    seen: set[str] = set()
    reason = None
    for trial in _best_first(study):
        look = json.dumps(looks(study, trial), sort_keys=True)
        if look in seen or len(pictures) >= PICTURES:
            continue
        seen.add(look)
        try:
            pictures[trial.name] = "data:image/png;base64," + base64.b64encode(gallery(study, trial)).decode()
        except SslRayError as error:
            reason = shown(str(error))
            break  # of the same data: so would the others
    return {"pictures": pictures, "reason": reason}


# Tables --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """Complete trials that differ in the seed only."""

    settings: dict[str, Any]
    result: analysis.Interval
    minutes: float
    """Mean of their training."""
    cost: float
    """Mean; NaN where one has none."""


def cells(study: Study) -> list[Cell]:
    """In the order of the study; settings without a complete trial are there too, with n = 0."""
    made = []
    for group in analysis.groups(trial.settings for trial in study.trials):
        mine = [study.trials[i] for i in group]
        done = [trial for trial in mine if trial.state.status == "complete"]
        result = analysis.mean_interval([trial.result(study.head.objective) for trial in done])
        minutes = analysis.mean_interval([float(trial.curve.minutes[-1]) for trial in done if len(trial.curve.minutes)])
        costs = [math.nan if trial.state.cost is None else trial.state.cost for trial in done]
        cost = sum(costs) / len(costs) if costs else math.nan
        made.append(Cell(mine[0].settings, result, minutes.mean, cost))
    return made


def _rows(study: Study, *, plus_minus: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of texts, not escaped."""
    objective = study.head.objective
    percent = objective.endswith("accuracy")

    def value(of: float) -> str:
        if not math.isfinite(of):
            return "-"
        return f"{100 * of:.2f}" if percent else number(of)

    title = {"linear_accuracy": "linear (%)", "knn_accuracy": "kNN (%)", "alpha": "alpha", "rankme": "RankMe"}[objective]
    keys = list(study.head.swept)
    heads = [*(SHORT.get(key, key) for key in keys), f"{title}, mean", f"{plus_minus} 95 %", "n", "minutes"]
    heads.append(f"cost ({study.head.currency or 'no currency'})")
    rows = []
    for cell in cells(study):
        given = [_setting(cell.settings.get(key)) for key in keys]
        half = cell.result.high - cell.result.mean
        minutes, cost = (number(each) if math.isfinite(each) else "-" for each in (cell.minutes, cell.cost))
        rows.append([*given, value(cell.result.mean), value(half), str(cell.result.n), minutes, cost])
    return heads, rows


def _setting(value: Any) -> str:
    return number(value) if is_number(value) else value if isinstance(value, str) else json.dumps(value)


def facts(study: Study) -> list[tuple[str, str]]:
    """What the results were made with."""
    head = study.head
    costs = [trial.state.cost for trial in study.trials if trial.state.cost is not None]
    said: list[tuple[str, Any]] = [
        ("study", f"{head.name}, {study.uri}"),
        ("hash", head.hash),
        ("begun", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(head.created, 0), 2**35)))),
        ("ssl_ray", head.ssl_ray),
        ("objective", f"{head.objective}, {head.mode}{'' if head.target is None else f' {head.target:g}'}"),
        ("swept", ", ".join(head.swept)),
        ("seeds", ", ".join(map(str, head.seeds))),
        ("budget of a trial", head.budget),
        ("trials", ", ".join(f"{n} {status}" for status, n in counts(study, now=time.time()).items())),
        ("wall-clock of all trials", f"{number(sum(trial.state.seconds for trial in study.trials) / 60)} minutes"),
        ("cost", f"{number(sum(costs))} {head.currency or ''}".strip() if costs else None),
        ("prices of an hour of a trial", head.prices),
        ("machine", head.machine or None),
    ]
    return [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in said if value is not None]


_INTERVALS = "Means over complete seeds with Student's 95 % interval; n is their number; minutes are of training."


def markdown(study: Study) -> str:
    heads, rows = _rows(study, plus_minus="±")
    lines = [f"# {_md(study.head.name)}", ""]
    for row in (heads, ["---:" if i >= len(study.head.swept) else "---" for i in range(len(heads))], *rows):
        lines.append(f"| {' | '.join(cell if row is not heads and set(cell) <= set('-:') else _md(cell) for cell in row)} |")
    lines += ["", _INTERVALS, "", *(f"- {_md(key)}: {_md(value)}" for key, value in facts(study))]
    base = [f"    {key}={in_line(json.dumps(value))}" for key, value in _base(study).items()]
    return "\n".join([*lines, "", "The configuration that the settings of a trial change:", "", *base, ""])


def _base(study: Study) -> dict[str, Any]:
    from ssl_ray.config import flatten

    return flatten(study.head.base)


def _md(text: str) -> str:
    """A text as Markdown shows it, in one line."""
    escaped = "".join(f"\\{each}" if each in "\\`*_[]|#~" else each for each in in_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def latex(study: Study) -> str:
    """A table of the booktabs package."""
    heads, rows = _rows(study, plus_minus="$\\pm$")
    columns = "l" * len(study.head.swept) + "r" * (len(heads) - len(study.head.swept))
    notes = [f"% {in_line(key)}: {in_line(value)}" for key, value in facts(study)]
    notes += [f"% {key}={in_line(json.dumps(value))}" for key, value in _base(study).items()]
    lines = [" & ".join(_tex(cell) for cell in row) + " \\\\" for row in (heads, *rows)]
    table = [f"\\begin{{tabular}}{{{columns}}}", "\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule", "\\end{tabular}"]
    return "\n".join([*notes, f"% {_INTERVALS}", *table, ""])


_TEX = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "β": "$\\beta$", "<": "$<$", ">": "$>$"}


def _tex(text: str) -> str:
    if text == "$\\pm$ 95 %":
        return "$\\pm$ 95 \\%"
    return "".join(_TEX.get(each, f"\\{each}" if each in "&%$#_{}" else each) for each in in_line(text))


# Pictures ------------------------------------------------------------------------------------------------------------


def browser() -> str:
    """The Chromium that draws pictures. Raises UsageError if there is none."""
    found = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise UsageError(
            "--figures: pictures are drawn by Chromium, which was not found.\n"
            "Install it (apt install chromium), or name it in BROWSER_PATH; the HTML page saves each figure, too."
        )
    return found


def write_figures(study: Study, folder: str) -> list[str]:
    """Each figure that shows something as FOLDER/NAME.svg and .png; their places."""
    drawn = {name: page.draw(study, name) for name in page.FIGURES}
    pictures = _pictures({name: figure for name, figure in drawn.items() if figure["data"]}, browser())
    written = []
    for name, kinds in pictures.items():
        for kind, data in kinds.items():
            written.append(storage.join(folder, f"{name}.{kind}"))
            storage.write_atomic(written[-1], base64.b64decode(data))
    return written


_DRAW = """
const figures = JSON.parse(document.getElementById("data").textContent);
(async () => {
  const made = {};
  for (const [name, figure] of Object.entries(figures)) {
    const layout = { ...figure.layout, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" };
    const size = { width: WIDTH, height: figure.layout.height ?? HEIGHT };
    made[name] = {};
    for (const format of ["svg", "png"]) {
      const scale = format === "png" ? 2 : 1;
      const text = await Plotly.toImage({ data: figure.data, layout }, { format, scale, ...size, imageDataOnly: true });
      made[name][format] = format === "svg" ? btoa(unescape(encodeURIComponent(text))) : text;
    }
  }
  document.getElementById("out").textContent = JSON.stringify(made);
})().catch((error) => { document.getElementById("out").textContent = JSON.stringify({ error: String(error) }); });
"""


def _pictures(figures: dict[str, Any], command: str) -> dict[str, dict[str, str]]:
    """For each figure its SVG and PNG as base64, drawn by a page in the browser, which writes them down in itself."""
    draw = _DRAW.replace("WIDTH", str(WIDTH_PX)).replace("HEIGHT", str(HEIGHT_PX))
    script = page.PLOTLY_JS.read_text(encoding="utf-8").replace("</script", "<\\/script")
    text = (
        "<!doctype html><meta charset=utf-8><meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:\"><pre id=out></pre>"
        f"<script type='application/json' id=data>{page.in_script(figures)}</script>"
        f"<script>{script}</script><script>{draw}</script>"
    )
    with tempfile.TemporaryDirectory(prefix="ssl-ray-figures-", ignore_cleanup_errors=True) as folder:
        at = Path(folder, "figures.html")
        at.write_text(text, encoding="utf-8")
        options = [
            "--headless",
            "--disable-gpu",
            f"--user-data-dir={folder}/browser",
            "--virtual-time-budget=600000",
            "--dump-dom",
        ]
        if os.geteuid() == 0:  # it refuses to sandbox itself as root, and this page is ours
            options.append("--no-sandbox")
        try:
            done = subprocess.run([command, *options, at.as_uri()], capture_output=True, timeout=DRAWN_WITHIN_S, check=False)
        except OSError as error:
            raise UsageError(f"{command}: cannot be run ({error.strerror}).\nName a Chromium in BROWSER_PATH.") from error
        except subprocess.TimeoutExpired as error:
            raise ResourceError(f"{command} drew nothing within {DRAWN_WITHIN_S} s.\nTry again on an idle machine.") from error
    told = done.stdout.decode(errors="replace").partition('<pre id="out">')[2].partition("</pre>")[0]
    try:
        made = json.loads(told)
    except ValueError as error:
        last = done.stderr.decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise DataError(
            f"{command} drew no pictures (code {done.returncode}): {last[:300]}\nTry it by hand: {command} --version"
        ) from error
    if "error" in made:
        raise DataError(f"{command} could not draw the figures: {made['error']}\nThe HTML page can save each of them.")
    return made
