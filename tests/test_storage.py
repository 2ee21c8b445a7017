"""Files on local disks and in a memory file system, and how failures are told."""

import errno
import os
import pickle
import threading

import pytest

from ssl_ray import storage
from ssl_ray.errors import DataError, ResourceError, UsageError


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    return str(tmp_path / "place") if request.param == "local" else f"memory://{tmp_path.name}/place"


def test_what_is_written_is_read_listed_and_removed(place):
    at = storage.join(place, "a", "b.txt")
    assert not storage.exists(at)
    assert storage.list_names(place) == []
    storage.write_atomic(at, b"one")
    storage.write_atomic(at, b"two")
    storage.write_atomic(storage.join(place, "a.txt"), b"")
    assert storage.read_bytes(at) == b"two"
    assert storage.exists(at)
    assert storage.list_names(place) == ["a", "a.txt"]
    assert storage.list_names(storage.join(place, "a")) == ["b.txt"]
    storage.remove(storage.join(place, "a"))
    storage.remove(storage.join(place, "a"))
    assert storage.list_names(place) == ["a.txt"]


def test_a_local_file_is_uploaded_whole(place, tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "local").write_bytes(data)
    storage.upload(str(tmp_path / "local"), storage.join(place, "there", "file"))
    assert storage.read_bytes(storage.join(place, "there", "file")) == data
    with pytest.raises(DataError, match=r"(gone|file): not there"):
        storage.upload(str(tmp_path / "gone"), storage.join(place, "there", "file"))


@pytest.mark.parametrize("name", ["a::b", "[x]*?", "a#b%41", "with space", "ü日本", "~", "file:x", "-r", ".dot"])
def test_odd_names_are_names(tmp_path, name):
    at = str(tmp_path / name / name)
    storage.write_atomic(at, b"x")
    (tmp_path / "x").write_text("stays")
    assert storage.read_bytes(at) == b"x"
    assert storage.list_names(str(tmp_path / name)) == [name]
    assert os.listdir(tmp_path / name) == [name]
    storage.remove(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["x"]


def test_paths_are_absolute_and_uris_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b/") == str(tmp_path / "b")
    assert storage.absolute(f"file://{tmp_path}/b") == str(tmp_path / "b")
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.join("/", "b") == "/b"
    assert storage.join("/") == "/"
    assert storage.is_local("a") == storage.is_local("file:///a") == (not storage.is_local("s3://a"))


@pytest.mark.parametrize("uri", ["", "nosuch://bucket/x"])
def test_what_is_no_uri_is_a_usage_error(uri):
    with pytest.raises(UsageError, match="path"):
        storage.read_bytes(uri)


def test_a_file_that_is_replaced_is_never_seen_half(tmp_path):
    at, stop = str(tmp_path / "x"), threading.Event()
    storage.write_atomic(at, b"0" * 2**20)
    seen = set()

    def look():
        while not stop.is_set():
            seen.add(storage.read_bytes(at))
            assert storage.list_names(str(tmp_path)) == ["x"]

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(40):
        storage.write_atomic(at, b"%d" % (i % 10) * 2**20)
    stop.set()
    reader.join()
    assert {len(data) for data in seen} == {2**20}
    assert all(len(set(data)) == 1 for data in seen)
    assert os.listdir(tmp_path) == ["x"]


def test_an_absent_file_is_an_error_and_an_absent_folder_is_empty(tmp_path):
    with pytest.raises(DataError, match=r"gone: not there \(reading\)\. Check the path\."):
        storage.read_bytes(str(tmp_path / "gone"))
    assert storage.list_names(str(tmp_path / "gone")) == []
    (tmp_path / "file").write_text("")
    assert storage.list_names(str(tmp_path / "file")) == []
    assert storage.list_names(str(tmp_path / "file" / "below")) == []
    assert not storage.exists(str(tmp_path / "file" / "below"))


def test_what_cannot_be_written_leaves_nothing_and_says_where(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    for at in (tmp_path / "file" / "below", tmp_path / "file" / "below" / "deep", tmp_path / "folder"):
        with pytest.raises(DataError, match=rf"{at}: not a place for it \(writing.*Use another path") as caught:
            storage.write_atomic(str(at), b"x")
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, r"u: no space left \(doing\)"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceError, "no space left"),
        (OSError(errno.EROFS, "Read-only file system"), DataError, "read-only"),
        (OSError(errno.EIO, "Input/output error"), DataError, "doing failed: .*Input/output error. Check"),
        (PermissionError(errno.EACCES, "Permission denied"), DataError, "no permission.*Permission denied"),
        (PermissionError("Forbidden\n<xml>"), DataError, "no permission.*Forbidden <xml>"),
        (TimeoutError(), DataError, "TimeoutError"),
    ],
)
def test_failures_of_the_system_say_what_and_where_in_one_line_and_can_be_pickled(error, kind, message):
    with pytest.raises(kind, match=message) as caught, storage.storage_errors("u", "doing"):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_mistakes_in_the_program_are_not_taken_for_failures_of_the_storage():
    with pytest.raises(KeyError), storage.storage_errors("u", "doing"):
        raise KeyError("bug")


def test_a_scratch_folder_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with storage.scratch_folder("test") as folder:
        assert os.path.dirname(folder) == str(tmp_path)
        storage.write_atomic(f"{folder}/deep/x", b"1")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="mine"), storage.scratch_folder("test"):
        raise ValueError("mine")
    assert os.listdir(tmp_path) == []
