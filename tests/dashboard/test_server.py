"""The server by its answers: who may ask, what it says, what it keeps. No browser."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import seaweedfs
import synthetic
from aiohttp import CookieJar
from aiohttp.test_utils import TestClient, TestServer
from synthetic import complete, running

from ssl_ray import storage
from ssl_ray.cli import main
from ssl_ray.dashboard import page
from ssl_ray.dashboard import server as serving
from ssl_ray.errors import DataError, UsageError
from ssl_ray.study import schema

GRID = {"model.projector_dim": [64, 256], "loss.beta": [0.01, 0.04]}
TOKEN = "0123456789abcdef0123"
HOSTILE = "</script><script>alert(1)</script>‮<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("studies")
    synthetic.write(str(at / "first"), 12, 100, grid=GRID, name=HOSTILE)
    synthetic.write(str(at / "second"), 2, 50, grid=GRID)
    return at


def with_client(uri: Path | str, use: Callable[[TestClient], Awaitable[Any]], **more: Any) -> Any:
    async def main() -> Any:
        app = serving.make_app(str(uri), **more)
        jar = CookieJar(unsafe=True)  # cookies of an address, too
        async with TestClient(TestServer(app), cookie_jar=jar) as client:
            return await use(client)

    return asyncio.run(main())


async def got(client: TestClient, path: str, **more: Any) -> tuple[int, Any, Any]:
    async with client.get(path, **more) as answer:
        body = await answer.read()
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, answer.headers, json.loads(body) if is_json else body.decode(errors="replace")


# What it says --------------------------------------------------------------------------------------------------------


def test_the_studies_below_a_folder_are_listed_and_each_is_told_whole(folder: Path):
    async def use(client: TestClient) -> None:
        _, _, said = await got(client, "/api/studies")
        assert [row["study"] for row in said["studies"]] == ["first", "second"]
        assert said["studies"][0]["name"] == HOSTILE
        _, _, study = await got(client, "/api/study?study=first")
        columns = {each["key"]: each["values"] for each in study["columns"]}
        assert len(study["settings"]) == 12
        assert set(columns["status"]) == {"complete"}
        assert columns["linear_accuracy"][0] == pytest.approx(study_of(folder / "first").trials[0].result("linear_accuracy"))
        assert columns["n"] == [3] * 12

    with_client(folder, use)


def plain(value: Any) -> Any:
    """As JSON has it."""
    return json.loads(page.dumped(value))


def study_of(at: Path) -> Any:
    from ssl_ray.study.results import read_study

    return read_study(str(at))


def test_every_figure_is_that_of_the_module_and_of_a_selection_that_of_its_trials(folder: Path):
    study = study_of(folder / "first")

    async def use(client: TestClient) -> None:
        for name in page.FIGURES:
            status, _, drawn = await got(client, f"/api/figure?study=first&figure={name}")
            assert (status, drawn) == (200, plain(page.draw(study, name)))
        _, _, some = await got(client, "/api/figure?study=first&figure=dim&only=BwA")  # bits 0, 1, 2
        assert some == plain(page.draw(page.chosen(study, "BwA"), "dim"))
        assert {name for trace in some["data"] for name in trace.get("meta", {}).get("trials", [])} == {
            trial.name for trial in study.trials[:3]
        }
        _, _, moved = await got(client, "/api/figure?study=first&figure=training-minutes&target=0.5")
        assert "target 50 %" in {trace["name"] for trace in moved["data"]}

    with_client(folder, use)


def test_what_has_not_changed_is_not_sent_again(tmp_path: Path):
    head = synthetic.write(str(tmp_path), 3, 50, grid=GRID)
    last = head.trials[-1]
    schema.write_state(str(tmp_path), last.name, running())

    async def use(client: TestClient) -> None:
        for path in ("/api/study?study=.", "/api/figure?study=.&figure=dim", "/api/studies"):
            _, headers, _ = await got(client, path)
            status, _, _ = await got(client, path, headers={"If-None-Match": headers["ETag"]})
            assert status == 304
        _, before, first = await got(client, "/api/study?study=.")
        figure = (await got(client, "/api/figure?study=.&figure=dim"))[1]["ETag"]
        schema.write_state(str(tmp_path), last.name, complete())
        client.server.app[serving.SHELF].studies["."].read_at = -1e9  # as if a second had passed
        status, after, now = await got(client, "/api/study?study=.", headers={"If-None-Match": before["ETag"]})
        assert status == 200
        assert after["ETag"] != before["ETag"]
        assert now["version"] != first["version"]
        status, _, _ = await got(client, "/api/figure?study=.&figure=dim", headers={"If-None-Match": figure})
        assert status == 200

    with_client(tmp_path, use)


def test_a_heartbeat_draws_no_figure_anew(tmp_path: Path):
    head = synthetic.write(str(tmp_path), 2, 50, grid=GRID)
    versions = []
    for beat in (1.0, 2.0):
        schema.write_state(str(tmp_path), head.trials[0].name, running(heartbeat=beat))
        versions.append(page.version(study_of(tmp_path)))
    assert versions[0] == versions[1]


def test_mistakes_and_damage_are_answered_with_their_reason(folder: Path, tmp_path: Path):
    async def use(client: TestClient) -> None:
        for path, part in [
            ("/api/study?study=../first", "no such study"),
            ("/api/study?study=third", "no such study"),
            ("/api/figure?study=first&figure=none", "no such figure"),
            ("/api/figure?study=first&figure=dim&target=x", "expected a share"),
            ("/api/figure?study=first&figure=dim&target=nan", "expected 0 to 1"),
            ("/api/figure?study=first&figure=dim&only=!!", "no selection"),
            ("/api/spectrum?study=first&trial=../../second", "no such trial"),
            ("/api/gallery?study=first&trial=none", "no such trial"),
        ]:
            status, _, said = await got(client, path)
            assert status == 404, path
            assert part in said["error"]
        for path in ("/assets/server.py", "/assets/..%2fserver.py", "/assets/page.html", "/etc/passwd"):
            assert (await got(client, path))[0] == 404, path

    with_client(folder, use)
    synthetic.write(str(tmp_path / "bad"), 2, 50, grid=GRID)
    (tmp_path / "bad" / "study.json").write_text("{")

    async def damaged(client: TestClient) -> None:
        _, _, said = await got(client, "/api/studies")
        assert "it is not JSON" in said["studies"][0]["error"]
        status, _, said = await got(client, "/api/study?study=bad")
        assert (status, "damaged" in said["error"]) == (503, True)

    with_client(tmp_path, damaged)


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "STUDIES", 2)
    monkeypatch.setattr(serving, "FIGURE_BYTES", 50_000)
    for name in "abc":
        synthetic.write(str(tmp_path / name), 2, 50, grid=GRID)

    async def use(client: TestClient) -> None:
        for name in "abc":
            for figure in page.FIGURES:
                assert (await got(client, f"/api/figure?study={name}&figure={figure}"))[0] == 200
        shelf = client.server.app[serving.SHELF]
        assert list(shelf.studies) == ["b", "c"]
        assert sum(map(len, shelf.figures.values())) <= 50_000

    with_client(tmp_path, use)


def test_the_spectrum_is_shown_where_read_outs_hold_it_and_its_absence_is_said(tmp_path: Path):
    head = synthetic.write(str(tmp_path), 2, 80, grid=GRID)
    first, second = head.trials
    for step in (40, 80):
        at = Path(schema.trial_uri(str(tmp_path), first.name)) / "evaluations" / f"{step:010d}.json"
        spectrum = [[rank, 3 * rank**-1.5] for rank in range(1, 65)]
        at.write_text(json.dumps(json.loads(at.read_text()) | {"alpha": 1.5, "spectrum": spectrum}))

    async def use(client: TestClient) -> None:
        _, _, drawn = await got(client, f"/api/spectrum?study=.&trial={first.name}")
        lines = {trace["name"]: trace for trace in drawn["data"]}
        assert lines.keys() == {f"{of}step {s}, alpha 1.5 (ranks 3 to 64)" for s in (40, 80) for of in ("", "fit of ")}
        fit = lines["fit of step 80, alpha 1.5 (ranks 3 to 64)"]
        assert fit["x"] == [3, 64]
        assert fit["y"] == pytest.approx([3 * rank**-1.5 for rank in (3, 64)])
        _, _, drawn = await got(client, f"/api/spectrum?study=.&trial={second.name}")
        assert drawn["data"] == []
        assert "do not store the eigenspectrum" in drawn["layout"]["annotations"][0]["text"]

    with_client(tmp_path, use)


def test_the_gallery_is_a_picture_of_the_trial_s_views_or_the_reason_why_not(folder: Path, tmp_path: Path):
    base = json.loads((folder / "second" / "study.json").read_text())["base"]
    base["data"]["uri"] = str(tmp_path / "gone")
    head = synthetic.write(str(tmp_path / "study"), 1, 50, grid=GRID, base=base)

    async def use(client: TestClient) -> None:
        status, _, said = await got(client, f"/api/gallery?study=.&trial={head.trials[0].name}")
        assert status == 503
        assert str(tmp_path / "gone") in said["error"]

    with_client(tmp_path / "study", use)

    async def drawn(client: TestClient) -> None:
        name = study_of(folder / "second").trials[0].name
        async with client.get("/api/gallery", params={"study": "second", "trial": name}) as answer:
            assert answer.status == 200
            assert answer.content_type == "image/png"
            assert (await answer.read()).startswith(b"\x89PNG")

    with_client(folder, drawn)


def test_studies_on_s3_are_served_and_reported_as_those_on_a_disk(
    tmp_path: Path, server: seaweedfs.Server, monkeypatch: pytest.MonkeyPatch
):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    local, uri = tmp_path / "study", f"s3://{seaweedfs.BUCKET}/{tmp_path.name}"
    synthetic.write(str(local), 3, 30, grid=GRID)
    for path in local.rglob("*.json*"):
        storage.write_atomic(storage.join(uri, "study", str(path.relative_to(local))), path.read_bytes())

    async def use(client: TestClient) -> None:
        assert [row["study"] for row in (await got(client, "/api/studies"))[2]["studies"]] == ["study"]
        _, _, study = await got(client, "/api/study?study=study")
        assert study["columns"] == plain(page.studied(study_of(local), now=time.time()))["columns"]
        _, _, drawn = await got(client, "/api/figure?study=study&figure=dim")
        assert drawn == plain(page.draw(study_of(local), "dim"))

    with_client(uri, use)
    assert main(["report", f"{uri}/study", "--markdown", f"{uri}/table.md"]) == 0
    assert b"| 64 | 0.01 |" in storage.read_bytes(f"{uri}/table.md")
    fsspec.filesystem("s3").clear_instance_cache()


# Who may ask ---------------------------------------------------------------------------------------------------------


def test_only_reading_is_answered(folder: Path):
    async def use(client: TestClient) -> None:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            async with client.request(method, "/api/studies") as answer:
                assert answer.status == 405
        async with client.head("/") as answer:
            assert answer.status == 200

    with_client(folder, use)


def test_another_name_that_leads_here_reads_nothing(folder: Path):
    async def use(client: TestClient) -> None:
        for host in ("evil.example", "evil.example:8270", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1].evil"):
            status, _, said = await got(client, "/api/studies", headers={"Host": host})
            assert status in (400, 421), host
            assert "studies" not in said
        for host in ("localhost:1", "127.0.0.1", "[::1]:8270", "LOCALHOST"):
            assert (await got(client, "/api/studies", headers={"Host": host}))[0] == 200, host

    with_client(folder, use)


def test_a_page_from_elsewhere_may_lead_here_but_have_nothing_made(folder: Path):
    async def use(client: TestClient) -> None:
        headers = {"Sec-Fetch-Site": "cross-site"}
        assert (await got(client, "/", headers=headers))[0] == 200
        assert (await got(client, "/api/gallery?study=first&trial=x", headers=headers))[0] == 403
        assert (await got(client, "/api/studies", headers={"Sec-Fetch-Site": "same-origin"}))[0] == 200

    with_client(folder, use)


def test_every_answer_forbids_scripts_and_requests_from_elsewhere(folder: Path):
    async def use(client: TestClient) -> None:
        for path in ("/", "/assets/page.js", "/assets/plotly.min.js", "/api/studies", "/api/study?study=x", "/nothing"):
            _, headers, _ = await got(client, path)
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self';"), path
            assert "script-src" not in policy
            assert "unsafe-eval" not in policy
            assert "frame-ancestors 'none'" in policy
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Referrer-Policy"] == "no-referrer"

    with_client(folder, use)


def test_the_page_holds_no_inline_script_and_nothing_from_results(folder: Path):
    async def use(client: TestClient) -> None:
        _, _, text = await got(client, "/")
        assert "alert(" not in text
        assert text.count("<script") == text.count('<script src="assets/') == 1 + len(page.SCRIPTS)
        assert "http" not in text.replace("http-equiv", "")

    with_client(folder, use)


def test_with_a_token_nothing_is_read_without_it(folder: Path):
    async def use(client: TestClient) -> None:
        for path in ("/", "/assets/page.js", "/api/studies", "/?token=", "/?token=0123456789abcdef0124"):
            assert (await got(client, path))[0] == 401, path
        wrong = {"Authorization": f"Bearer {TOKEN}x"}
        assert (await got(client, "/api/studies", headers=wrong))[0] == 401
        assert (await got(client, "/api/studies", headers={"Authorization": f"Bearer {TOKEN}"}))[0] == 200
        assert (await got(client, "/api/studies"))[0] == 401  # the header is of one request
        status, headers, _ = await got(client, f"/?token={TOKEN}")
        assert status == 200
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert (await got(client, "/api/studies"))[0] == 200  # by the cookie

    with_client(folder, use, host="0.0.0.0", token=TOKEN)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_machines_need_a_token(host: str):
    with pytest.raises(UsageError, match="--token-file"):
        serving.make_app("x", host=host)
    serving.make_app("x", host=host, token=TOKEN)


@pytest.mark.parametrize("token", ["", "short", "with a line\nbreak of its own", "ä" * 20])
def test_a_token_that_can_be_guessed_or_not_sent_is_refused(token: str):
    with pytest.raises(UsageError, match="16 or more"):
        serving.make_app("x", token=token)


def test_a_folder_that_is_not_there_and_a_port_that_is_taken_are_said(tmp_path: Path):
    with pytest.raises(DataError, match="no such folder"):
        serving.serve(str(tmp_path / "none"), host="127.0.0.1", port=0, token=None, ready=print)

    async def main() -> None:
        blocker = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        async with blocker:
            port = blocker.sockets[0].getsockname()[1]
            app = serving.make_app(str(tmp_path))
            with pytest.raises(UsageError, match=f"port {port}"):
                await serving._serve(app, "127.0.0.1", port, print)

    asyncio.run(main())
