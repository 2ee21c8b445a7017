"""Imports go one way between the rooms (DESIGN, section 1), and a room loads only what its work needs."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ssl_ray

PACKAGE = Path(ssl_ray.__file__).parent

# A room may import those of layers above it (smaller numbers) and, without a circle, those of its own.
LAYERS = {
    "__init__": 0,
    "config": 0,
    "deadline": 0,
    "each": 0,
    "errors": 0,
    "masking": 0,
    "philox": 0,
    "storage": 0,
    "shards": 1,
    "model": 1,
    "losses": 1,
    "plan": 2,
    "views": 2,
    "stream": 3,
    "ray_stream": 3,
    "ray_map": 5,
    "train": 4,
    "evaluate": 4,
    "loading": 5,
    "model_card": 5,
    "export": 6,
    "study": 5,
    "dashboard": 6,
    "doctor": 6,
    "submit": 6,
    "debug": 6,
    "console": 7,
    "cli": 7,
    "__main__": 7,
}

READERS = [
    "study.schema",
    "study.results",
    "study.analysis",
    "dashboard.figures",
    "dashboard.page",
    "dashboard.report",
    "dashboard.server",
]
WITHOUT_RAY = [
    "views",
    "losses",
    "model",
    "plan",
    "shards",
    "evaluate",
    "stream",
    "train.loop",
    "train.pretrain",
    "export",
    *READERS,
]
WITHOUT_TORCH = ["config", "errors", "philox", "storage", "plan", "shards", "views", "stream", "train.runs", *READERS, "cli"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of ours in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the room"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "ssl_ray":
                room = rest.partition(".")[0]
                yield node.lineno, room if room in LAYERS else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_layer():
    assert {room_of(path) for path in FILES} <= LAYERS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_no_room_below_its_own(path):
    wrong = [f"line {line}: {room}" for line, room in imported_rooms(path) if LAYERS[room] > LAYERS[room_of(path)]]
    assert not wrong


def test_no_rooms_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room_of(path), set()).update(room for _, room in imported_rooms(path))
    TopologicalSorter({room: others - {room} for room, others in graph.items()}).prepare()  # raises CycleError


_FRESH = """
import contextlib, importlib, io, json, os, sys

blocked, preloaded, calls = json.loads(sys.argv[1])
for name in blocked:
    sys.modules[name] = None  # an import of it now raises ImportError
for name in preloaded:
    importlib.import_module(name)
assert not any(name.partition(".")[0] == "ssl_ray" for name in sys.modules)
for call in calls:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if isinstance(call, str):
                    importlib.import_module(call)
                else:
                    from ssl_ray.cli import main
                    try:
                        code = main(call)
                    except SystemExit as ended:
                        code = ended.code
                    assert code == 0, f"exit code {code}"
            told = sorted(name for name in sys.modules if name.startswith("ssl_ray"))
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as file:
        print(file.read())
"""


def fresh(calls: list, *, blocked: list[str], preloaded: tuple[str, ...] = ()) -> list:
    """For each module name or command line: our modules it loaded, or its error, in a process that had loaded none.

    They are forks of one process that has only the libraries `preloaded`, since importing torch takes seconds.
    """
    told = json.dumps([blocked, preloaded, calls])
    command = [sys.executable, "-W", "error", "-c", _FRESH, told]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_loaded(names: list[str], results: list) -> None:
    for name, loaded in zip(names, results, strict=True):
        assert isinstance(loaded, list), f"{name}: {loaded}"
        rooms = {module.split(".")[1] for module in loaded if "." in module}
        assert all(LAYERS[room] <= LAYERS[name.partition(".")[0]] for room in rooms), f"{name} loads {rooms}"


def test_rooms_import_without_ray_and_load_no_room_below():
    libraries = ("torch", "torchvision", "pyarrow.parquet", "sklearn.linear_model", "fsspec")
    assert_loaded(WITHOUT_RAY, fresh([f"ssl_ray.{name}" for name in WITHOUT_RAY], blocked=["ray"], preloaded=libraries))


VERBS = [
    ["pretrain"],
    ["evaluate"],
    ["export"],
    ["embed"],
    ["neighbours"],
    ["plan"],
    ["profile"],
    ["data", "pack"],
    ["data", "index"],
    ["data", "check"],
    ["data", "stats"],
    ["data", "preview"],
    ["config", "show"],
    ["config", "schema"],
    ["config", "diff"],
    ["runs", "list"],
    ["dashboard"],
    ["doctor"],
    ["debug"],
    ["report"],
]


def test_rooms_and_what_reads_no_weights_work_without_torch_and_ray():
    blocked = ["torch", "torchvision", "ray"]
    libraries = ("numpy", "pyarrow.parquet", "jsonargparse", "yaml", "fsspec", "PIL.Image")
    rooms = [f"ssl_ray.{name}" for name in WITHOUT_TORCH]
    assert_loaded(WITHOUT_TORCH, fresh(rooms, blocked=blocked, preloaded=libraries))
    # What Ray's actors load that make the streams, of which a run starts several.
    makers = ["ray_stream", "train.ray_train"]
    assert_loaded(
        makers, fresh([f"ssl_ray.{name}" for name in makers], blocked=["torch", "scipy.ndimage"], preloaded=("pandas",))
    )
    lines = [["--help"], ["--version"], *([*verb, "--help"] for verb in VERBS)]
    lines += [["config", "show", "views.count=8"], ["config", "schema"], ["config", "diff", "digits", "folder"], ["runs", "list"]]
    results = fresh(lines, blocked=blocked, preloaded=libraries)
    assert [(line, told) for line, told in zip(lines, results, strict=True) if isinstance(told, str)] == []


def test_the_package_itself_loads_nothing_and_exposes_its_version():
    code = "import sys; before = set(sys.modules); import ssl_ray; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["ssl_ray"]
    assert [name for name in vars(ssl_ray) if not name.startswith("__")] == [] or "ssl_ray.config" in sys.modules
    assert ssl_ray.__version__
