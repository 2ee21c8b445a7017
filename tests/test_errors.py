import ast
import copy
import inspect
import pickle
from pathlib import Path

import pytest

from ssl_ray import errors
from ssl_ray.config import build

EXIT_CODES = {
    "SslRayError": 1,
    "UsageError": 2,
    "RunMismatchError": 2,
    "DataError": 3,
    "ResourceError": 4,
    "TrainingError": 1,
    "Stopped": 130,
}
CLASSES = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_the_tree_of_errors_and_its_exit_codes():
    assert {name: kind.exit_code for name, kind in CLASSES.items()} == EXIT_CODES
    assert all(issubclass(kind, errors.SslRayError) for kind in CLASSES.values())
    assert issubclass(errors.RunMismatchError, errors.UsageError)


@pytest.mark.parametrize("name", EXIT_CODES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(name, protocol):
    error = CLASSES[name]("data.uri: no manifest under s3://b/train.\nMake one.")
    error.add_note("on worker 1")
    for other in (pickle.loads(pickle.dumps(error, protocol)), copy.deepcopy(error)):
        assert type(other) is CLASSES[name]
        assert str(other) == str(error)
        assert other.args == error.args
        assert other.exit_code == EXIT_CODES[name]
        assert other.__notes__ == ["on worker 1"]


def test_the_docstring_shows_every_error():
    words = set(errors.__doc__.split())
    assert set(EXIT_CODES) <= words


SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://user:{SECRET}@bucket/x: no permission",
        f"https://host/a.tar?X-Amz-Date=1&X-Amz-Signature={SECRET}&b=2: not there",
        f"https://host/a?token={SECRET}",
        f"abfs://c@a/x?sv=1&sig={SECRET}' failed",
        f"the key {SECRET} was refused",
        f"p@ss in s3://a:p@{SECRET}@host/y",
    ],
)
def test_a_message_is_shown_without_secrets(text, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    shown = errors.shown(text)
    assert SECRET not in shown
    assert "***" in shown
    assert shown.split()[-1] in text or "***" in shown.split()[-1]  # the rest stays


def test_paths_of_secrets_and_short_values_are_shown(monkeypatch):
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token-of-aws")
    monkeypatch.setenv("SOME_TOKEN", "true")
    text = "/var/run/token-of-aws: not there; it is true, s3://bucket/a@b and http://host:8333/a@b are"
    assert errors.shown(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb\x07", "a\\x1b[2Jb\\x07"),
        ("key \u202egnp.exe", "key \\u202egnp.exe"),
        ("\udcff.tar", "\\udcff.tar"),
        ("one\ntwo", "one\ntwo"),
        ("1\n2\n3\n4\n5", "1\n2\n3\\n4\\n5"),
        ("é 漢 .. /etc", "é 漢 .. /etc"),
    ],
)
def test_a_message_commands_no_terminal_and_has_three_lines_at_most(text, shown):
    assert errors.shown(text) == shown


def test_a_long_line_is_shown_by_its_head_and_its_end():
    shown = errors.shown("a" * 10_000 + ". Do this.")
    assert len(shown) <= 1000
    assert shown.startswith("aaa")
    assert shown.endswith(". Do this.")


@pytest.mark.parametrize("key", ["run", "data.uri", "data.eval_uri", "train.init_from"])
def test_a_place_with_a_password_in_it_is_refused_and_not_repeated(key):
    for uri in (f"s3://user:{SECRET}@bucket/x", f"https://host/x?X-Amz-Signature={SECRET}"):
        with pytest.raises(errors.UsageError, match=f"{key}: got .*, expected no password") as caught:
            build({}, [f"{key}={uri}"])
        assert SECRET not in str(caught.value)


_UNSAFE = {"pickle", "cPickle", "dill", "marshal", "shelve", "cloudpickle", "joblib"}


def test_nothing_is_unpickled_evaluated_or_unpacked_from_a_tar():
    root = Path(errors.__file__).parents[1]
    files = [*(root / "ssl_ray").rglob("*.py"), *(root / "jobs").rglob("*.py")]
    assert len(files) > 40
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            unsafe = {name.partition(".")[0] for name in names} & _UNSAFE
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                unsafe |= {call} & {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system"}
                unsafe |= {call} if call.endswith((".extract", ".extractall")) else set()
                unsafe |= {call} if any(word.arg in ("allow_pickle", "shell") for word in node.keywords) else set()
            found += [f"{path}:{node.lineno}: {name}" for name in unsafe]
    assert found == []
