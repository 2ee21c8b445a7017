"""Every mistake of a user ends in one or two lines that say what, where and what to do, with the right exit code."""

import shutil

import numpy as np
import pytest
from cli_harness import SMALL, png, write_tar

from ssl_ray.storage import list_names

# Configuration: refused before anything is read or written -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["views.cuont=8"], ["views.cuont: no such key (command line). Did you mean views.count?"]),
        (["views=8"], ["views: no such key", "for example views.count"]),
        (["views.count"], ["views.count: not understood", "KEY=VALUE"]),
        (["views.count=eight"], ["views.count: got 'eight', expected a whole number."]),
        (["train.bf16=perhaps"], ["train.bf16: got 'perhaps', expected true or false."]),
        (["train.steps=all"], ["train.steps: got 'all', expected a whole number, or null."]),
        (["data.fraction=1.5"], ["data.fraction: got 1.5, expected a number above 0, up to 1."]),
        (["optim.lr=nan"], ["optim.lr: got 'nan'"]),
        (["loss.form=classic"], ["Set views.count=2, or loss.form=pairs"]),
        (["train.batch=100", "train.lanes=64"], ["train.lanes: got 64, expected a divisor of train.batch=100, for example 50"]),
        (["train.batch=8", "train.workers=9"], ["train.workers: got 9", "dealt in 8 lanes", "Use fewer workers"]),
        (["-c", "digit"], ["digit: no such recipe, file or run. Did you mean digits?"]),
        (["-c", "nothing-like-it"], ["no such recipe, file or run. There are: cifar10, digits,"]),
        (["--no-such-option"], ["not understood: --no-such-option", "--help"]),
    ],
)
def test_a_wrong_configuration_is_named_with_what_was_expected(cli, arguments, parts):
    for verb in ("pretrain", "plan", "config show"):
        cli(*verb.split(), *arguments).refused(2, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("views: {cuont: 8}", ["views.cuont: no such key (", "Did you mean views.count?"]),
        ("views: {count: eight}", ["views.count: got 'eight', expected a whole number."]),
        ("1: 2", ["1: no such key"]),
        ("- views", ["got list, expected keys and values"]),
        ("views: {count: [1", ["not YAML (line 1, column 18: "]),
        ("views: \0", ["not YAML"]),
        ("train: {batch: 8}\nviews: {count: 2}\ntrain: {steps: 9}", ["not YAML (line 3, column 1: the key train again)"]),
    ],
)
def test_a_wrong_recipe_is_named_with_its_file(cli, tmp_path, text, parts):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    done = cli("config", "show", "-c", recipe).refused(2, *parts)
    assert "mine.yaml" in done.err or parts[0].startswith("views.count:")


def test_a_recipe_that_is_empty_or_holds_empty_sections_gives_the_defaults(cli, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("# nothing set\n")
    shown = cli("config", "show", "--json", "-c", recipe).ok().json
    recipe.write_text("data:\nviews: {}\n")
    assert cli("config", "show", "--json", "-c", recipe).ok().json == shown
    assert cli("config", "show", "--json", "data.uri=digits").ok().json == shown


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["pretrian"], ["no verb 'pretrian', did you mean pretrain?"]),
        (["data", "chek"], ["no verb 'chek', did you mean check?"]),
        (["evaluate"], ["the following arguments are required: RUN"]),
        (["data", "preview", "x", "-o", "y.png", "--images", "0"], ["--images: got 0, expected a whole number of 1 or more"]),
        (["data", "preview", "digits", "-o", "y.jpg"], ["got y.jpg, expected a name that ends in .png"]),
        (["data", "pack", "digits", "x", "--split", "valid"], ["--split: digits has train, got valid."]),
        (["data", "pack", "no-such-folder", "x"], ["no-such-folder: no such source. Give one of digits, fashion-mnist"]),
        (["data", "pack", "cifar10", "x"], ["--root FOLDER"]),
        (["data", "pack", "digits", "x", "--shard-mb", "0"], ["--shard-mb: got 0, expected 0.0625 or more"]),
        (["runs", "list", "none://x"], ["none://x", "Protocol not known: none", "s3://, http:// and https://"]),
    ],
)
def test_a_wrong_command_line_says_what_there_is(cli, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    cli(*arguments).refused(2, *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "code", "parts"),
    [
        (["train.batch=128"], 2, ["train.batch: got 128, but only", "Use a smaller train.batch"]),
        (["model.encoder=resnet19"], 2, ["model.encoder: got resnet19", "Did you mean resnet18?"]),
        (["train.init_from=nothing"], 3, ["nothing: no checkpoint here"]),
        (["data.eval_uri=nothing"], 3, ["nothing: there is no such folder", "ssl-ray data pack"]),
    ],
)
def test_what_does_not_fit_is_refused_before_the_run_is_made(pretrain, packed, tmp_path, keys, code, parts):
    uri = tmp_path / "run"
    pretrain(f"data.uri={packed}", f"run={uri}", *keys).refused(code, *parts)
    assert not uri.exists()  # else the corrected command would be refused as another run


def test_more_workers_than_the_machine_has_cpus_for_are_refused_before_the_run_is_made(cli, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = cli("pretrain", *SMALL, f"data.uri={packed}", f"run={tmp_path / 'run'}", "train.workers=5")
    advice = "; the cluster has 2 free. Set train.workers=4 or fewer, or add nodes."
    done.refused(4, "ssl-ray: train.workers=5 needs 2.5 free CPUs", advice)
    assert not (tmp_path / "run").exists()


def test_a_complete_run_needs_no_cpus(pretrain, packed, trained, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    keys = (f"data.uri={packed}", f"run={trained}", "train.workers=5")
    assert pretrain(*keys).ok().json["steps"] == 4


def test_weights_of_another_encoder_are_refused_before_the_run_is_made(pretrain, packed, trained, tmp_path):
    uri = tmp_path / "run"
    keys = (f"data.uri={packed}", f"run={uri}", f"train.init_from={trained}")
    pretrain(*keys, "views.channels=3").refused(2, "train.init_from", "does not fit this encoder", "expected [32, 3, 3, 3]")
    assert not uri.exists()
    pretrain(*keys, "model.projector_dim=24").ok()  # the projector's may differ


# Data ---------------------------------------------------------------------------------------------------------------


def test_without_a_manifest_the_command_that_makes_one_is_named(pretrain, cli, copied):
    (copied / "manifest.parquet").unlink()
    for done in (pretrain(f"data.uri={copied}"), cli("data", "check", copied), cli("data", "stats", copied)):
        done.refused(3, "no manifest.parquet here", f"ssl-ray data index {copied}")
    cli("data", "index", copied).ok()
    cli("data", "check", copied).ok()


def test_a_server_that_is_not_there_is_not_taken_for_missing_data(cli):
    for place in ("http://127.0.0.1:9/train", "ftp://127.0.0.1:9/train"):
        done = cli("data", "stats", place).refused(3, place, "failed: ", "Check the storage and the network")
        assert "no manifest" not in done.err


def test_indexing_the_same_shards_again_keeps_the_names_of_their_classes(cli, copied, tmp_path):
    before = cli("data", "stats", copied, "--json").ok().json
    assert set(before["classes"]) == {"class-0", "class-1", "class-2"}
    cli("data", "index", copied, "-o", tmp_path / "elsewhere").ok()
    assert cli("data", "stats", tmp_path / "elsewhere", "--json").ok().json["classes"] == before["classes"]
    cli("data", "index", copied).ok()
    assert cli("data", "stats", copied, "--json").ok().json == before
    sorted(copied.glob("*.tar"))[0].unlink()  # now they are others, whose numbers may mean anything
    cli("data", "index", copied).ok()
    assert set(cli("data", "stats", copied, "--json").ok().json["classes"]) == {"0", "1", "2"}


def test_an_empty_or_absent_folder_is_said_to_hold_nothing(pretrain, cli, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pretrain(f"data.uri={empty}").refused(3, "no manifest.parquet here")
    pretrain(f"data.uri={tmp_path / 'absent'}").refused(3, f"{tmp_path / 'absent'}: there is no such folder")
    for place in (empty, tmp_path / "absent"):
        cli("data", "index", place).refused(3, f"{place}: no shards here")
    cli("data", "pack", empty, tmp_path / "packed").refused(3, f"{empty}: no image below it")


def test_a_tar_without_images_is_named(cli, tmp_path):
    write_tar(tmp_path / "train" / "a.tar", {"x.txt": b"1"})
    cli("data", "index", tmp_path / "train").refused(3, "a.tar: no image in it", "Leave this file out")


@pytest.mark.parametrize("label", ["-1", "99999999999"])
def test_a_label_out_of_range_is_named(cli, tmp_path, label):
    write_tar(tmp_path / "train" / "a.tar", {"x.png": png(0, label=0), "x.cls": label.encode()})
    cli("data", "index", tmp_path / "train").refused(3, "a.tar: x: label out of range", label, "expected 0 to")


def test_balanced_classes_need_labels(pretrain, cli, tmp_path):
    train = tmp_path / "train"
    write_tar(train / "a.tar", {f"{i}.png": png(i, label=0) for i in range(40)})
    cli("data", "index", train).ok()
    keys = (f"data.uri={train}", f"run={tmp_path / 'run'}")
    pretrain(*keys, "data.balanced=true", "data.fraction=0.9").refused(2, "data.balanced", "no labels")
    summary = pretrain(*keys).ok().json  # and without labels there is no read-out by labels
    assert summary["linear_accuracy"] is summary["knn_accuracy"] is None
    assert summary["rankme"] > 0


def test_shards_that_are_there_are_not_replaced_unasked(cli, images, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    cli("data", "pack", images, copied).refused(2, "there are shards already", "--overwrite")
    assert {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before
    cli("data", "pack", images, copied, "--overwrite").ok()


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def change(path):
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT") + 4
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "reason", "shard_reason"),
    [
        (lambda path: path.unlink(), "the shard is missing", "not there"),
        (cut, "the shard is shorter than its index says", "bytes, the manifest says"),
        (change, "its bytes changed since they were indexed", "its bytes changed since the manifest was made"),
    ],
    ids=["missing", "truncated", "changed"],
)
def test_a_harmed_shard_ends_the_run_and_is_named(pretrain, cli, copied, tmp_path, harm, reason, shard_reason):
    shard = sorted(copied.glob("*.tar"))[1]
    harm(shard)
    keys = (f"data.uri={copied}", f"run={tmp_path / 'run'}", "train.steps=5")
    pretrain(*keys).refused(3, shard.name, reason, "ssl-ray data check")
    done = cli("data", "check", copied)
    assert done.code == 3
    assert any(shard.name in line and shard_reason in line for line in done.out.splitlines()), done.out
    assert cli("data", "check", copied, "--json").json["bad_shards"][0]["shard"] == shard.name


def test_an_undecodable_image_ends_the_run_unless_allowed(pretrain, cli, with_bad_image, tmp_path):
    data = shutil.copytree(with_bad_image, tmp_path / "train")
    uri = tmp_path / "run"
    one_epoch = (f"data.uri={data}", "train.steps=5")
    pretrain(*one_epoch, f"run={uri}").refused(3, "broken_png: cannot be decoded", "data.max_bad_samples=0", "data check")

    summary = pretrain(*one_epoch, f"run={uri}", "data.max_bad_samples=1").ok().json  # the same run goes on
    assert (summary["bad_samples"], summary["steps"]) == (1, 5)
    summary = pretrain(*one_epoch, f"run={tmp_path / 'allowed'}", "data.max_bad_samples=1").ok().json
    assert (summary["bad_samples"], summary["steps"]) == (1, 5)
    assert "broken_png" in (tmp_path / "allowed" / "quarantine.jsonl").read_text()

    done = cli("data", "check", data)
    assert done.code == 3
    assert "broken_png: cannot be decoded" in done.out
    assert "leave the bad samples out" in done.out
    assert cli("data", "stats", data, "--json").ok().json["bad_samples"] == 1
    assert cli("plan", "--no-probe", *SMALL, *one_epoch).ok().out.splitlines()[1].split() == ["left", "out", "as", "bad", "1"]
    summary = pretrain(*one_epoch, f"run={tmp_path / 'left-out'}").ok().json
    assert summary["bad_samples"] == 0
    # That the sample is left out makes it another run.
    pretrain(*one_epoch, f"run={uri}").refused(2, "holds another run", "data.excluded", "bad.parquet")


def test_a_readout_says_how_many_of_its_images_could_not_be_read(cli, with_bad_image, tmp_path):
    keys = (f"data.uri={with_bad_image}", f"run={tmp_path / 'run'}", "data.max_bad_samples=1")
    lines = [line for line in cli("pretrain", *SMALL, *keys).ok().err.splitlines() if line.startswith(("untrained: ", "step "))]
    assert len(lines) == 2
    assert all(line.endswith("; 1 of the images could not be read") for line in lines)
    assert cli("evaluate", tmp_path / "run", "--json").ok().json["unreadable"] == 1


def test_a_damaged_manifest_or_index_is_named_with_its_remedy(pretrain, copied):
    for name in ("manifest.parquet", "index/part-00000.parquet"):
        path = copied / name
        good = path.read_bytes()
        for bad in (good[: len(good) // 2], b"", b"no parquet"):
            path.write_bytes(bad)
            pretrain(f"data.uri={copied}", f"run={copied / 'run'}").refused(3, name, f"ssl-ray data index {copied}")
        path.write_bytes(good)


def test_workers_need_not_divide_the_lanes_and_plan_says_what_that_costs(cli, packed):
    keys = (*SMALL, f"data.uri={packed}", "train.lanes=4", "--no-probe", "--json")
    busiest = [cli("plan", *keys, f"train.workers={n}").ok().json["images_per_step_of_the_busiest_worker"] for n in (1, 2, 3, 4)]
    assert busiest == [16, 8, 8, 4]
    assert np.all(np.diff(busiest) <= 0)
    assert "run" not in list_names(str(packed))


def test_names_that_command_a_terminal_are_shown_as_escapes(cli, tmp_path):
    """In an error, and in the list of bad samples on stdout."""
    evil = "\x1b]0;owned\x07\u202e"
    write_tar(tmp_path / "a" / "x.tar", {f"{evil}.png": b"no image", f"{evil}.cls": b"1"})
    cli("data", "index", tmp_path / "a").ok()
    done = cli("data", "check", tmp_path / "a")
    assert done.code == 3
    assert "\\x1b]0;owned\\x07\\u202e" in done.out
    write_tar(tmp_path / "b" / "x.tar", {f"{evil}.png": b"", "other.png": b"", f"{evil}.jpg": b""})
    error = cli("data", "index", tmp_path / "b").refused(3, "x.tar", "\\x1b]0;owned").err
    for text in (done.out, done.err, error):
        assert all(line.isprintable() for line in text.splitlines())


def test_a_password_in_a_place_is_not_repeated(cli):
    secret = "hunter2hunter2"
    for arguments in (
        ("data", "stats", f"nosuch://user:{secret}@host/x"),
        ("config", "show", f"data.uri=s3://user:{secret}@bucket/x"),
        ("runs", "list", f"nosuch://user:{secret}@host/x"),
        ("data", "stats", f"s3://user:{secret}@bucket/x"),
        ("evaluate", f"s3://user:{secret}@bucket/x"),
        ("runs", "list", f"s3://user:{secret}/more@bucket/x"),
    ):
        done = cli(*arguments)
        assert done.code in (2, 3)
        assert secret not in done.out + done.err
