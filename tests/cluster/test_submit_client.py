"""What `submit` makes of the answers of a dashboard: over real connections, to a server that answers as Ray's does.

That Ray's does answer so is tested in test_submit.py, on a cluster.
"""

import asyncio
import importlib.metadata
import io
import json
import logging
import os
import signal
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from command import ssl_ray
from harness import ROOT, finish, start, wait_until

from ssl_ray import submit
from ssl_ray.errors import ResourceError, UsageError

LOG = "one\ntwo\nthree\n"
OF_RAY = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")
"""What Ray gives aiohttp when it follows a log in this process."""
RUN = ["pretrain", "run=s3://bucket/runs/a", "train.workers=2", "seed=1"]


class Dashboard:
    def __init__(self) -> None:
        self.jobs: dict[str, dict] = {}
        self.packages: dict[str, bytes] = {}
        self.submissions = 0
        self.tails: list[str] = []
        """What befalls the next connections to a log: 502, closed without an answer, cut within the log; then all is well."""
        self.overtaken_by: str | None = None
        """The command of another client whose job is there just before the next one is submitted."""
        self.is_silent = False
        """Submissions get no answer."""
        self.port = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def end_all(self) -> None:
        for job in self.jobs.values():
            job["status"] = "SUCCEEDED"

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**27)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{name}", self._job),
                web.get("/api/jobs/{name}/logs/tail", self._tail),
                web.get("/api/packages/gcs/{name}", self._package),
                web.put("/api/packages/gcs/{name}", self._upload),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        return runner

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": importlib.metadata.version("ray")})

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.jobs[request.match_info["name"]])

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.submissions += 1
        if self.is_silent:
            await asyncio.sleep(600)
        if self.overtaken_by is not None:
            self._add({**asked, "entrypoint": self.overtaken_by})
            self.overtaken_by = None
        name = asked["submission_id"]
        if name in self.jobs:  # the agent says 400, of which the head makes this
            text = f"RuntimeError: Request failed with status code 400: ValueError: Job with submission_id {name} already exists."
            return web.Response(status=500, text=text)
        self._add(asked)
        return web.json_response({"job_id": name, "submission_id": name})

    def _add(self, asked: dict) -> None:
        shown = {key: asked[key] for key in ("submission_id", "entrypoint", "runtime_env")}
        self.jobs[asked["submission_id"]] = {"type": "SUBMISSION", "status": "RUNNING", **shown}

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        fault = self.tails.pop(0) if self.tails else None
        assert request.transport is not None
        if fault == "502":
            return web.Response(status=502)
        if fault == "closed":
            request.transport.close()
            return web.Response()
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if fault == "cut":
            await socket.send_str(LOG[:6])
            request.transport.close()
            return socket
        await socket.send_str(LOG[:4])
        await socket.send_str(LOG[4:])
        self.jobs[request.match_info["name"]]["status"] = "SUCCEEDED"
        await socket.close()
        return socket

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()


@pytest.fixture
def dashboard(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # no token of whoever runs the tests
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    level = logging.getLogger("ray").level
    made, loop = Dashboard(), asyncio.new_event_loop()
    runner = loop.run_until_complete(made.start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        logging.getLogger("ray").setLevel(level)


def submitted(dashboard: Dashboard, command: list[str], folder: Path | None = None, *, follow: bool = False) -> str:
    """What is said, and what the job prints."""
    said: list[str] = []
    where = None if folder is None else str(folder)
    runs = [word.partition("=")[2] for word in command if word.removeprefix("--").startswith("run=")]
    submit.submit(
        command,
        run=runs[-1] if runs and runs[-1] != "null" else None,
        address=dashboard.address,
        working_dir=where,
        uv=False,
        follow=follow,
        show=lambda text: said.append(f"{text}\n"),
        write=said.append,
    )
    return "".join(said)


def name_in(said: str) -> str:
    return next(word for word in said.split() if word.startswith("ssl-ray-"))


def test_a_connection_that_is_lost_is_made_anew_and_every_line_comes_once(dashboard):
    dashboard.tails = ["502", "closed", "cut", "502"]
    done = ssl_ray({}, "submit", *RUN, "--address", dashboard.address, "--json").ok()
    assert done.json["status"] == "SUCCEEDED"
    assert done.err.endswith(LOG)
    assert done.err.count("one\n") == 1
    assert dashboard.tails == []


@OF_RAY
def test_a_connection_that_is_lost_for_good_is_an_error_that_names_the_job(dashboard, monkeypatch):
    monkeypatch.setattr(submit, "POLL_S", 0)
    dashboard.tails = ["502", "closed"] * 100
    with pytest.raises(ResourceError, match=r"cannot be reached any more .*\n.*\n.*ray job stop .* ssl-ray-pretrain-"):
        submitted(dashboard, RUN, follow=True)


@OF_RAY
def test_one_that_is_lost_now_and_then_is_never_given_up(dashboard, monkeypatch):
    monkeypatch.setattr(submit, "POLL_S", 0)
    dashboard.tails = ["cut"] * 100
    assert submitted(dashboard, RUN, follow=True).endswith(f"\n{LOG}")


@pytest.mark.parametrize("error", [aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError("cut")])
def test_what_aiohttp_says_of_a_connection_is_an_error_of_ours(error):
    with pytest.raises(ResourceError, match="http://there"), submit.errors_of("http://there"):
        raise error


def test_what_is_counted_is_what_ray_uploads(dashboard, tmp_path, monkeypatch):
    for name in (".git/objects", ".venv", "venv", "deep/__pycache__", "ignored", "kept"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"x")
    os.truncate(tmp_path / ".git" / "objects" / "file", 101 * 2**20)
    (tmp_path / ".gitignore").write_text("ignored\n")
    assert sorted(submit.packed(str(tmp_path), uv=False)) == [".gitignore", "kept/file"]
    assert f"uploading {tmp_path}: 2 files, 0.0 MiB\n" in submitted(dashboard, RUN, tmp_path)
    (uploaded,) = dashboard.packages.values()
    files = [name for name in zipfile.ZipFile(io.BytesIO(uploaded)).namelist() if not name.endswith("/")]
    assert sorted(files) == [".gitignore", "kept/file"]
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert "ignored/file" in submit.packed(str(tmp_path), uv=False)
    monkeypatch.setenv("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", "")
    with pytest.raises(UsageError, match=r"101.0 MiB.*\.git/objects/file"):
        submit.packed(str(tmp_path), uv=False)


def test_the_same_run_has_one_job_at_a_time_whatever_the_line(dashboard):
    name = name_in(submitted(dashboard, RUN))
    verb, run, workers, seed = RUN
    assert submitted(dashboard, [verb, seed, f"--{run}", workers]).startswith(f"{name} runs already\n")
    for other in ([verb, run, "train.workers=1", seed], [verb, f"{run}/", workers, seed]):
        with pytest.raises(ResourceError) as refused:
            submitted(dashboard, other)
        said = f"{name} runs already, with another command: python -m ssl_ray {' '.join(RUN)}\n"
        assert str(refused.value).startswith(said)
        assert f"ray job stop --address {dashboard.address} {name}" in str(refused.value)
    assert dashboard.submissions == 1
    dashboard.end_all()
    assert name_in(submitted(dashboard, [verb, run, "train.workers=1", seed])) == f"{name[:-1]}2"
    assert name_in(submitted(dashboard, [verb, "run=s3://bucket/runs/b", workers, seed]))[:-1] != name[:-1]


def test_a_run_that_the_recipe_names_is_the_same_one(dashboard, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.yaml").write_text("run: s3://bucket/runs/a\n")
    name = name_in(submitted(dashboard, RUN))
    line = ["submit", "pretrain", "-c", "small.yaml", "--working-dir", str(tmp_path / "mine"), "--address", dashboard.address]
    ssl_ray({}, *line).refused(4, f"{name} runs already, with")
    dashboard.end_all()
    assert f"{name[:-1]}2 submitted" in ssl_ray({}, *line, "--no-follow").ok().err


@pytest.mark.parametrize("place", [None, "runs/one", "file://one"])
@pytest.mark.parametrize(("verb", "key"), [(["pretrain"], "run="), (["study", "run", "views"], "-o ")])
def test_results_in_the_copy_of_a_folder_are_refused_before_it_is_uploaded(dashboard, tmp_path, verb, key, place):
    line = ["submit", *verb, "--working-dir", str(tmp_path), "--address", dashboard.address, "--no-follow"]
    given = [] if place is None else [f"{key}{place}"] if key == "run=" else [key.strip(), place]
    said = f"{key}{place} is a relative path" if place else f"{key.strip()} is not given"
    ssl_ray({}, *line, *given).refused(2, said, f"Give {key}s3://", "all machines see")
    assert (dashboard.packages, dashboard.submissions) == ({}, 0)


def test_a_run_in_a_folder_that_all_machines_see_is_submitted_with_files(dashboard, tmp_path):
    line = ["--working-dir", str(tmp_path), "--address", dashboard.address, "--no-follow"]
    ssl_ray({}, "submit", "pretrain", f"run={tmp_path / 'runs' / 'one'}", *line).ok()
    ssl_ray({}, "submit", "pretrain", "run=runs/one", *line[2:]).ok()  # of an image, whose own folders are its maker's affair


@pytest.mark.parametrize(("verb", "name"), [(["pretrain", "-c"], "run="), (["study", "run"], "-o")])
def test_a_file_that_the_job_would_not_find_is_refused_before_it_is_uploaded(dashboard, tmp_path, monkeypatch, verb, name):
    inside, beside = tmp_path / "mine" / "deep" / "in.yaml", tmp_path / "beside.yaml"
    inside.parent.mkdir(parents=True)
    for file in (inside, beside):
        file.write_text("seed: 1\n")
    monkeypatch.chdir(tmp_path)
    kept = ["run=s3://bucket/runs/a"] if name == "run=" else [name, "s3://bucket/studies/a"]
    line = ["--working-dir", "mine", "--address", dashboard.address, "--no-follow", *kept]
    for file in (str(inside), "mine/deep/in.yaml"):
        ssl_ray({}, "submit", *verb, file, *line).refused(2, f"{file}: not where the job looks", "Write deep/in.yaml.")
    for file in (str(beside), "beside.yaml", "../beside.yaml"):
        ssl_ray({}, "submit", *verb, file, *line).refused(2, f"{file}: not where the job looks", "Put it into mine and")
    ssl_ray({}, "submit", *verb, "none.yaml", *line).refused(2, "none.yaml: no such")
    assert (dashboard.packages, dashboard.submissions) == ({}, 0)
    ssl_ray({}, "submit", *verb, "deep/in.yaml", *line).ok()
    assert dashboard.submissions == 1


def test_without_a_run_the_order_of_keys_makes_no_other_job_but_that_of_places_does(dashboard):
    name = name_in(submitted(dashboard, ["pretrain", "-c", "digits", "seed=1", "views.count=4"]))
    assert f"{name} runs already" in submitted(dashboard, ["pretrain", "views.count=4", "-c", "digits", "seed=1"])
    assert name_in(submitted(dashboard, ["pretrain", "-c", "digits", "seed=1", "seed=2"])) != name_in(
        submitted(dashboard, ["pretrain", "-c", "digits", "seed=2", "seed=1"])
    )
    assert name_in(submitted(dashboard, ["data", "pack", "a", "b"])) != name_in(submitted(dashboard, ["data", "pack", "b", "a"]))
    a, b = (["pretrain", "-c", "s3://bucket/runs/a", "run=null", seed] for seed in ("seed=1", "seed=2"))
    assert name_in(submitted(dashboard, a)) != name_in(submitted(dashboard, b))


def test_a_folder_that_was_changed_while_its_job_runs_is_refused_and_uploaded_by_the_next(dashboard, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("seed: 1\n")
    line = [*RUN, "-c", "mine.yaml"]
    name = name_in(submitted(dashboard, line, tmp_path).partition("\n")[2])
    again = submitted(dashboard, line, tmp_path)
    assert again.startswith(f"{name} runs already\n")  # and nothing is uploaded
    recipe.write_text("seed: 2\n")
    for folder in (tmp_path, None):
        with pytest.raises(ResourceError, match=f"{name} runs already, with other files of --working-dir\n.*ray job stop"):
            submitted(dashboard, line, folder)
    assert len(dashboard.packages) == 1
    dashboard.end_all()
    assert f"{name[:-1]}2 submitted" in submitted(dashboard, line, tmp_path)
    assert len(dashboard.packages) == 2


def test_of_two_clients_at_once_the_second_finds_the_job_of_the_first(dashboard):
    dashboard.overtaken_by = f"python -m ssl_ray {' '.join(RUN)}"
    assert "-1 runs already\n" in submitted(dashboard, RUN)
    assert dashboard.submissions == 1
    dashboard.end_all()
    dashboard.overtaken_by = f"python -m ssl_ray {' '.join(RUN)} loss.beta=.1"
    with pytest.raises(ResourceError, match=r"-2 runs already, with another command: .* loss.beta=.1\n"):
        submitted(dashboard, RUN)


def test_ctrl_c_before_the_answer_says_that_the_job_may_run(dashboard):
    dashboard.is_silent = True
    left = start("submit", *RUN, "--address", dashboard.address)
    assert wait_until(lambda: dashboard.submissions == 1, left, "a submission")
    left.send_signal(signal.SIGINT)
    code, _, err = finish(left)
    assert code == 130
    assert "may run or not" in err
    assert f"ray job status --address {dashboard.address} ssl-ray-pretrain-" in err


def test_commands_of_ray_that_are_told_use_the_token_that_was_found(dashboard):
    home = Path(os.environ["HOME"])
    line = ["submit", *RUN, "--address", dashboard.address, "--no-follow"]
    assert " ray job stop" in ssl_ray({}, *line).ok().err
    assert "RAY_AUTH_MODE" not in ssl_ray({}, *line).ok().err
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("0" * 64)
    assert "RAY_AUTH_MODE=token ray job stop" in ssl_ray({}, *line).ok().err


@pytest.mark.parametrize("job", ["pretrain", "evaluate", "pack", "study"])
def test_the_line_at_the_head_of_a_job_is_one_of_the_shell(job):
    text = (ROOT / "jobs" / f"{job}.py").read_text()
    line = text.partition('"""')[2].partition("\n\n")[0]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    words = printed.splitlines()
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(submit.STOP_S)}
    }
    assert f"jobs/{job}.py" in words
