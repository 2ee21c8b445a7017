"""The page in a real browser: it follows a study, filters every figure, asks nothing of others, survives hostile texts."""

import asyncio
import contextlib
import csv
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from aiohttp import web
from synthetic import complete, running

from ssl_ray.dashboard import page, report, server
from ssl_ray.study import results, schema
from ssl_ray.study.schema import State

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::ResourceWarning")]
GRID = {"model.projector_dim": [64, 256], "loss.beta": [0.01, 0.04], "views.count": [2, 4], "data.fraction": [1.0, 0.5]}
TABS = ["trials", "projector", "training", "pareto", "map", "representation", "loss", "parameters", "compare", "gallery"]
HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>"
POLL_S = 0.5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here (apt install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextlib.contextmanager
def serving(uri: Path, *, poll_s: float = POLL_S) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.make_app(str(uri), poll_s=poll_s), access_log=None)

    async def start() -> int:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever)  # playwright has a loop in this one
    thread.start()
    port = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, **more: Any) -> Iterator[Any]:
    """A page at the address; at the end it has had no error and asked nobody but the server."""
    context = browser.new_context(**more)
    tab = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(address)
    yield tab
    here = address.partition("#")[0]
    assert [url for url in requests if not url.startswith((here, "data:", "blob:"))] == []
    assert not address.startswith("file:") or [url for url in requests if not url.startswith(("data:", "blob:"))] == [here]
    assert tab.evaluate("window.harmed === undefined")
    expected = "Failed to load resource: the server responded with a status of 503"  # of pictures whose data are not there
    assert [error for error in errors if expected not in error] == []
    context.close()


def until(tab: Any, script: str, *, within_s: float = 60) -> Any:
    """The value of the script once it is true; by asking, since the page lets nobody make code."""
    end = time.monotonic() + within_s
    while not (value := tab.evaluate(script)):
        assert time.monotonic() < end, f"not within {within_s} s: {script}"
        tab.wait_for_timeout(20)
    return value


DRAWN = """(() => { const all = [...document.querySelectorAll('.plot')];
  return !!all.length && all.every((each) => each._fullLayout && each.dataset.points !== undefined); })()"""
NUMBERS = """[...document.querySelectorAll('.plot')].map((plot) => plot.data.filter((trace) => trace.meta).map((trace) =>
  [trace.name ?? null, trace.x, trace.y, trace.z ?? null]))"""
SHOWN = """[...document.querySelectorAll('.plot')].map((plot) => [...new Set(plot.data
  .filter((trace) => trace.meta && (trace.customdata || trace.type === 'bar'))
  .flatMap((t) => t.customdata ? t.customdata.flat(2).map((i) => t.meta.trials[i]) : t.meta.trials))].sort())"""


def show(tab: Any, name: str, *, plots: bool) -> None:
    tab.click(f"#tab-{name}")
    if plots:
        until(tab, DRAWN)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 settings, two seeds; some run, failed, are stale or queued; one holds its spectrum."""
    at = tmp_path_factory.mktemp("browser") / "study"
    head = synthetic.head(32, grid=GRID, seeds=(0, 1))
    schema.write_study(str(at), head)
    now = time.time()
    odd = {3: running(heartbeat=now), 7: running(heartbeat=1.0), 11: State(status="failed", error="boom\nat line 3"), 15: None}
    for number, trial in enumerate(head.trials):
        synthetic.write_trial(str(at), head, trial, points=100, state=odd.get(number, complete()))
    file = Path(schema.trial_uri(str(at), head.trials[0].name)) / "evaluations" / "0000000100.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"spectrum": [[rank, 1 / rank] for rank in range(1, 65)]}))
    return at


def test_a_new_point_is_there_within_a_poll(browser: Any, tmp_path: Path):
    at = tmp_path / "study"
    head = synthetic.head(4, grid={"views.count": [2, 4]}, seeds=(0, 1))
    schema.write_study(str(at), head)
    trial = head.trials[0]
    synthetic.write_trial(str(at), head, trial, points=40, state=running(heartbeat=time.time()), every=20)
    with serving(at, poll_s=page.POLL_S) as address, opened(browser, f"{address}#study=.&tab=training") as tab:
        until(tab, DRAWN)
        polls: list[str] = []
        tab.on("request", lambda request: polls.append(request.url) if "/api/study?" in request.url else None)
        assert tab.evaluate("document.querySelector('.plot').data[0].y.length") == 3 + 1  # a null ends the curve
        run = Path(schema.trial_uri(str(at), trial.name))
        more = "".join(json.dumps(synthetic.record(step, m=2)) + "\n" for step in range(40, 60))
        (run / "metrics" / "0000000040-000002.jsonl").write_text(more)
        (run / "evaluations" / "0000000060.json").write_text(json.dumps(synthetic.readout(60, linear=0.77)))
        began = time.monotonic()
        polls.clear()
        until(tab, "document.querySelector('.plot').data.some((trace) => trace.y.includes(0.77))", within_s=30)
        print(f"a new point was there after {time.monotonic() - began:.2f} s, polls every {page.POLL_S} s")
        assert len(polls) == 1
        assert until(tab, "document.querySelector('.plot').data[0].line.dash") == "dash"
        assert "updated" in tab.inner_text("#fresh")
        (at / "study.json").rename(at / "study.moved")  # what was shown stays, and that it is old is said
        until(tab, "!document.getElementById('problem').hidden")
        assert tab.evaluate("document.querySelector('.plot').data.length") > 0


def test_a_filter_and_a_selection_change_every_figure(browser: Any, study: Path):
    names = [trial.name for trial in schema.read_head(str(study)).trials if trial.settings["views.count"] == 2]
    read = results.read_study(str(study))
    part = dataclasses.replace(read, trials=tuple(trial for trial in read.trials if trial.name in names))
    with serving(study) as address, opened(browser, f"{address}#study=.&tab=trials") as tab:
        until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 32")
        tab.click("#filters summary")
        tab.click("fieldset[data-key='views.count'] label:has-text('4')")
        until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 16")
        for name in ("projector", "training", "pareto", "map", "loss", "parameters"):
            show(tab, name, plots=True)
            until(tab, f"{SHOWN}.every((each) => each.length && each.every((name) => {json.dumps(names)}.includes(name)))")
        # Means and fronts are those of the chosen trials alone, as the module draws them.
        for name, figures in {"projector": ["dim", "beta"], "pareto": ["pareto-minutes"], "parameters": ["importance"]}.items():
            show(tab, name, plots=True)
            wanted: list[Any] = [json.loads(page.dumped(page.draw(part, figure))) for figure in figures]  # type: ignore[arg-type]
            expected = [[[t.get("name"), t.get("x"), t.get("y")] for t in each["data"] if "meta" in t] for each in wanted]
            until_equal(tab, f"{NUMBERS}.slice(-{len(figures)}).map((plot) => plot.map((trace) => trace.slice(0, 3)))", expected)
        address_now = tab.evaluate("location.href")
        assert "f.views.count" in address_now
    with serving(study) as address, opened(browser, address + "#" + address_now.partition("#")[2]) as tab:
        until(tab, DRAWN)  # the view is in the address
        until(tab, f"{SHOWN}.every((each) => each.length <= 16)")
        tab.click("#tab-trials")
        tab.click("table.trials tbody tr[data-row='0'] input")
        show(tab, "training", plots=True)
        until(tab, f"{SHOWN}[0].length === 1")


def until_equal(tab: Any, script: str, expected: Any, *, within_s: float = 30) -> None:
    end = time.monotonic() + within_s
    while (value := tab.evaluate(script)) != expected:
        if time.monotonic() > end:
            assert value == expected
        tab.wait_for_timeout(50)


def test_a_file_asks_nothing_and_has_the_numbers_of_the_live_page(browser: Any, study: Path, tmp_path: Path):
    file = tmp_path / "study.html"
    file.write_text(report.html(results.read_study(str(study)), now=time.time()))
    seen: dict[str, list] = {}
    with serving(study) as address:
        for source in (f"{address}#study=.", file.as_uri()):
            with opened(browser, source) as tab:
                until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 32")
                told = [tab.inner_text("table.trials tbody")]
                for name in ("projector", "training", "pareto", "map", "loss", "parameters"):
                    show(tab, name, plots=True)
                    told.append(tab.evaluate(NUMBERS))
                show(tab, "representation", plots=True)
                told.append(tab.evaluate(NUMBERS)[0])
                seen[source] = told
    live, held = seen.values()
    assert live == held


def test_a_filter_of_a_file_is_that_of_the_server_where_it_can_be(browser: Any, study: Path, tmp_path: Path):
    """Means over some of a point's trials, the best line and the front are computed in the page; here over one seed of two."""
    file = tmp_path / "study.html"
    read = results.read_study(str(study))
    file.write_text(report.html(read, now=time.time()))
    one = dataclasses.replace(read, trials=tuple(trial for trial in read.trials if trial.seed == 0))
    with opened(browser, f"{file.as_uri()}#tab=pareto&f.seed=%5B0%5D") as tab:
        until(tab, DRAWN)

        def points(traces: list[list]) -> dict[str, list]:
            return {t[0]: sorted([round(x, 9), round(y, 9)] for x, y in zip(t[1], t[2], strict=True)) for t in traces}

        for name, figure in (("pareto", "pareto-minutes"), ("projector", "dim")):
            show(tab, name, plots=True)
            mine = [[t["name"], t["x"], t["y"]] for t in page.draw(one, figure)["data"] if "meta" in t]  # type: ignore[arg-type]
            there = [trace[:3] for trace in tab.evaluate(NUMBERS)[0]]
            by_name = points([t for t in mine if t[0] in ("front", "best of each d")])
            assert {key: value for key, value in points(there).items() if key in by_name} == by_name
            all_points = [sorted(point for t in traces for point in points([t])[t[0]]) for traces in (there, mine)]
            assert all_points[0] == all_points[1]
        show(tab, "parameters", plots=True)
        assert "cannot compute it anew" in tab.inner_text("main")
    two = dataclasses.replace(read, trials=tuple(trial for trial in read.trials if trial.m == 2))
    with opened(browser, f"{file.as_uri()}#tab=projector&f.views.count=%5B2%5D") as tab:
        until(tab, DRAWN)
        there = tab.evaluate("document.querySelectorAll('.plot')[1].data.map((trace) => [trace.name, trace.x, trace.y])")
        mine = page.draw(two, "beta")["data"]
        for (name, x, y), trace in zip(there, mine, strict=True):
            assert trace["name"].startswith(name)
            assert x == pytest.approx(trace["x"])
            assert y == pytest.approx(trace["y"])


def test_two_trials_are_compared_by_their_whole_configurations(browser: Any, study: Path):
    first, second = (results.read_study(str(study)).trials[i] for i in (0, 9))
    with serving(study) as address, opened(browser, f"{address}#study=.&tab=compare&a={first.name}&b={second.name}") as tab:
        until(tab, "document.querySelectorAll('main table').length === 2")
        rows = [row.split("\t") for row in tab.inner_text("main table >> nth=0").splitlines()]
        given = [{"seed": trial.seed} | trial.settings for trial in (first, second)]
        assert [row[0] for row in rows[1:]] == sorted(key for key in given[0] if given[0][key] != given[1][key])
        assert all(row[1:] == [f"{one[row[0]]:g}" for one in given] for row in rows[1:])
        accuracy = [f"{100 * trial.result('linear_accuracy'):.2f}" for trial in (first, second)]
        assert ["linear accuracy (%)", *accuracy] in [r.split("\t") for r in tab.inner_text("main table >> nth=1").splitlines()]
        tab.click("text=show only these two")
        show(tab, "training", plots=True)
        until_equal(tab, f"{SHOWN}[0]", sorted([first.name, second.name]))


def test_the_table_is_saved_as_it_is_filtered_and_sorted(browser: Any, study: Path):
    read = results.read_study(str(study))
    with serving(study) as address, opened(browser, f"{address}#study=.&tab=trials&f.seed=[1]&sort=-linear_accuracy") as tab:
        until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 16")
        with tab.expect_download() as download:
            tab.click("text=CSV")
        rows = list(csv.DictReader(Path(download.value.path()).read_text().splitlines()))
        there = {trial.name: trial.result("linear_accuracy") for trial in read.trials if trial.seed == 1}
        assert {row["name"] for row in rows} == there.keys()
        values = [float(row["linear_accuracy"]) for row in rows if row["linear_accuracy"]]
        assert values == sorted((value for value in there.values() if value == value), reverse=True)
        with tab.expect_download() as download:
            tab.click("text=JSON")
        assert [row["name"] for row in json.loads(Path(download.value.path()).read_text())] == [row["name"] for row in rows]


def test_figures_are_written_as_pictures(study: Path, tmp_path: Path):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here (apt install chromium)")
    written = report.write_figures(results.read_study(str(study)), str(tmp_path / "figures"))
    assert {Path(file).name for file in written} == {f"{name}.{kind}" for name in page.FIGURES for kind in ("svg", "png")}
    for file in map(Path, written):
        data = file.read_bytes()
        assert data.startswith(b"<svg" if file.suffix == ".svg" else b"\x89PNG"), file
    assert "linear accuracy (% of test images)" in (tmp_path / "figures" / "dim.svg").read_text()


def test_hostile_texts_do_no_harm(browser: Any, tmp_path: Path):
    grid = {"model.encoder": [HOSTILE, "x" * 5000, "‮ü\u2028", "%{x}<a href='javascript:window.harmed=3'>"], "views.count": [2, 4]}
    at = tmp_path / "study"
    head = synthetic.head(8, grid=grid, seeds=(0,), name=HOSTILE, currency=HOSTILE, machine={HOSTILE: HOSTILE})
    trials = list(head.trials)
    trials[0] = dataclasses.replace(trials[0], name="<img src=x onerror='window.harmed=4'>")
    head = dataclasses.replace(head, trials=tuple(trials))
    schema.write_study(str(at), head)
    for number, trial in enumerate(head.trials):
        state = State(status="failed", error=HOSTILE) if number == 1 else complete()
        synthetic.write_trial(str(at), head, trial, points=50, state=state)
    file = tmp_path / "study.html"
    file.write_text(report.html(results.read_study(str(at)), now=time.time()))
    with serving(at) as address:
        for source in (f"{address}#study=.&tab=trials", file.as_uri(), f"{address}#tab=%3Cscript%3E&study=.&f.x=%5B&sel=%%"):
            with opened(browser, source) as tab:
                until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 8")
                assert HOSTILE in tab.inner_text("#title")
                for name in TABS:
                    show(tab, name, plots=name not in ("trials", "compare", "gallery"))
                    for plot in tab.query_selector_all(".plot"):
                        plot.hover()
                assert tab.query_selector("main img[src=x]") is None


def test_a_study_without_trials_and_one_without_results_are_shown(browser: Any, tmp_path: Path):
    schema.write_study(str(tmp_path / "empty"), synthetic.head(0))
    schema.write_study(str(tmp_path / "queued"), synthetic.head(3, target_accuracy=None, prices=None))
    with serving(tmp_path) as address, opened(browser, address) as tab:
        until(tab, "document.querySelectorAll('main tbody tr').length === 2")
        for name in ("empty", "queued"):
            tab.goto(f"{address}#study={name}&tab=trials")
            until(tab, f"document.getElementById('about').textContent.startsWith('{ {'empty': 0, 'queued': 3}[name] } trials')")
            for each in TABS:
                empty = name == "empty" and each == "representation"
                show(tab, each, plots=each not in ("trials", "compare", "gallery") and not empty)
        tab.click("#tab-studies")
        until(tab, "document.querySelectorAll('main tbody tr').length === 2")


def test_keys_reach_everything(browser: Any, study: Path):
    with serving(study) as address, opened(browser, f"{address}#study=.&tab=trials", color_scheme="dark") as tab:
        until(tab, "document.querySelectorAll('table.trials tbody tr[data-row]').length === 32")
        assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
        tab.focus("#tab-trials")
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate("document.activeElement.id") == "tab-projector"
        tab.keyboard.press("ArrowLeft")
        tab.focus("table.trials tbody tr[data-row='0']")
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Space")
        assert "sel=" in tab.evaluate("location.hash")
        assert until(tab, "document.activeElement.dataset.row") == "1"
        tab.keyboard.press("Enter")
        assert until(tab, "document.querySelector('main dl.facts') !== null")
        tab.click("#theme")
        assert tab.evaluate("[document.documentElement.dataset.theme, location.hash.includes('theme=light')]") == ["light", True]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_tab_is_wider_than_its_window(browser: Any, study: Path, width: int):
    with serving(study) as address, opened(browser, f"{address}#study=.", viewport={"width": width, "height": 800}) as tab:
        until(tab, "!!document.querySelector('table.trials')")
        for name in TABS:
            show(tab, name, plots=name not in ("trials", "compare", "gallery"))
            assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name


def test_a_large_study_is_quick(browser: Any, tmp_path: Path):
    at = tmp_path / "study"
    synthetic.write(str(at), 2000, 200)
    with serving(at) as address, opened(browser, f"{address}#study=.&tab=trials") as tab:
        began = time.monotonic()
        until(tab, "!!document.querySelector('table.trials tbody tr[data-row]')", within_s=200)
        print(f"\n2,000 trials of 200 steps: first reading and table {time.monotonic() - began:.2f} s")
        assert tab.evaluate("document.querySelectorAll('table.trials tbody tr').length") < 100
        for name in ("trials", "projector", "training", "pareto", "map", "loss", "parameters"):
            tab.goto("about:blank")
            began = time.monotonic()
            tab.goto(f"{address}#study=.&tab={name}")
            until(tab, "!!document.querySelector('table.trials tbody tr[data-row]')" if name == "trials" else DRAWN, within_s=200)
            first = time.monotonic() - began
            took = tab.evaluate("""async () => { const began = performance.now(); changeView({ f: { "views.count": ["2"] } });
              await new Promise((done) => requestAnimationFrame(() => setTimeout(done))); return performance.now() - began; }""")
            print(f"{name}: first paint {first:.2f} s, filter {took / 1000:.2f} s")
