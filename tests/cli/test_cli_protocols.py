"""`evaluate` by named protocols, on a small run."""

import json
import shutil
from pathlib import Path

import numpy as np
from cli_harness import pack, write_images
from PIL import Image

from ssl_ray import shards
from ssl_ray.each import in_threads, in_turn
from ssl_ray.train.protocols import evaluate_protocols

NAMES = ["linear", "linear-plain", "knn", "logreg", "fewshot", "finetune", "spectrum"]


def judged(uri: Path, **how) -> list[dict]:
    return evaluate_protocols(str(uri), [name for name in NAMES if name != "finetune"], **how)


def test_the_same_weights_give_the_same_numbers_twice_and_however_images_are_gone_through(evaluated, monkeypatch):
    monkeypatch.setattr("ssl_ray.train.readouts.BATCH", 32)  # several parts of so few images
    first = judged(evaluated, each=in_turn)
    assert judged(evaluated, each=in_turn) == first
    assert judged(evaluated, each=in_threads) == first
    monkeypatch.undo()
    assert judged(evaluated) == first  # and in one part
    assert [result["protocol"]["name"] for result in first] == [name for name in NAMES if name != "finetune"]


def test_results_say_what_they_are_of_and_lie_beside_the_read_outs(cli, evaluated, packed):
    kept = sorted(path.name for path in (evaluated / "evaluations").glob("*.json"))
    results = cli("evaluate", evaluated, "knn", "--json", "--seeds", "2", "linear-plain").ok().json
    run, manifest = json.loads((evaluated / "run.json").read_text()), shards.load_manifest(str(packed))
    for name, result in zip(["knn", "linear-plain"], results, strict=True):
        assert json.loads((evaluated / f"evaluations/protocols/0000000004-{name}.json").read_text()) == result
        assert result["protocol"]["name"] == name
        assert (result["step"], result["config_hash"]) == (4, run["hash"])
        assert result["train"]["digest"] == result["test"]["digest"] == manifest.digest
        assert result["num_train"] + result["num_test"] == 96
        assert result["top1"]["interval"][0] <= result["top1"]["value"] <= result["top1"]["interval"][1]
        assert np.sum(result["confusion"]) == result["num_test"] * max(1, len(result["seeds"]))
        assert [row["class"] for row in result["per_class"]] == ["class-0", "class-1", "class-2"]
    assert [result["seeds"] for result in results] == [[], [0, 1]]
    assert results[1]["top1"]["seed_interval"] is not None
    assert sorted(path.name for path in (evaluated / "evaluations").glob("*.json")) == kept
    text = cli("evaluate", evaluated, "fewshot", "knn", "spectrum").ok().out
    assert all(word in text for word in ("top-1", "1 a class", "RankMe", "LiDAR", "95 % interval", "step 4"))


def test_other_data_trains_and_judges_and_has_results_of_its_own(cli, evaluated, images, tmp_path):
    data, test = (pack(write_images(tmp_path / name, count=n), tmp_path / f"{name}-shards") for name, n in (("a", 60), ("b", 40)))
    (result,) = cli("evaluate", evaluated, "knn", "--data", data, "--test", test, "--json").ok().json
    assert (result["num_train"], result["num_test"]) == (60, 40)
    assert result["train"]["digest"] == shards.load_manifest(str(data)).digest
    assert result["test"]["digest"] == shards.load_manifest(str(test)).digest
    (held_out,) = cli("evaluate", evaluated, "knn", "--data", data, "--json").ok().json
    assert held_out["num_train"] + held_out["num_test"] == 60
    assert held_out["test"]["held_out"] == 0.1
    assert len(list((evaluated / "evaluations" / "protocols").glob("0000000004-knn-????????.json"))) == 2
    other = pack(write_images(tmp_path / "c", classes=2), tmp_path / "c-shards")
    cli("evaluate", evaluated, "knn", "--test", other).refused(3, "c-shards has the classes class-0, class-1, but")


def test_weights_are_a_run_a_checkpoint_or_its_file(cli, evaluated, tmp_path):
    for checkpoint in (evaluated / "checkpoints").iterdir():
        for at in (checkpoint, checkpoint / "weights.safetensors"):
            (result,) = cli("evaluate", at, "knn", "--json").ok().json
            assert (result["checkpoint"], result["step"]) == (checkpoint.name, int(checkpoint.name[:10]))
    (untrained,) = cli("evaluate", evaluated, "knn", "--untrained", "--json").ok().json
    assert (untrained["checkpoint"], untrained["step"]) == (None, None)
    assert (evaluated / "evaluations/protocols/untrained-knn.json").is_file()
    cli("evaluate", checkpoint, "knn", "--step", "4").refused(2, "--step and --untrained go with a run")
    (tmp_path / "mine.safetensors").write_bytes((checkpoint / "weights.safetensors").read_bytes())
    cli("evaluate", tmp_path / "mine.safetensors", "knn").refused(2, "outside of a run", "RUN/checkpoints/NAME")
    assert cli("evaluate", checkpoint, "--json").ok().json["step"] == int(checkpoint.name[:10])


def test_what_cannot_be_evaluated_is_said(cli, evaluated, tmp_path):
    cli("evaluate", evaluated, "linaer").refused(2, "linaer: no such protocol. Did you mean linear?")
    for name in NAMES:
        assert name in cli("evaluate", "--help").ok().out
        assert name in cli("evaluate", evaluated, "x-y-z").err
    cli("evaluate", evaluated, "--seeds", "3").refused(2, "--seeds is of a protocol", "linear")
    cli("evaluate", evaluated, "knn", "logreg", "--confusion", tmp_path / "a.png").refused(2, "--confusion", "got 2")
    cli("evaluate", evaluated, "spectrum", "--confusion", tmp_path / "a.png").refused(2, "spectrum has no confusion matrix")


def test_without_labels_the_spectrum_stands_alone(cli, evaluated, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.rglob("*.png"):
        shutil.copy(path, flat)
    data = pack(flat, tmp_path / "shards")
    (result,) = cli("evaluate", evaluated, "spectrum", "--data", data, "--json").ok().json
    assert result["rankme"]["value"] > 1
    cli("evaluate", evaluated, "spectrum", "knn", "--data", data).refused(3, "knn needs labels")


def test_a_confusion_matrix_is_written(cli, evaluated, tmp_path):
    cli("evaluate", evaluated, "knn", "--confusion", tmp_path / "confusion.png").ok()
    with Image.open(tmp_path / "confusion.png") as image:
        assert image.format == "PNG"


def test_fine_tuning_on_all_labels_learns_what_the_classes_are_and_the_same_twice(cli, evaluated, monkeypatch):
    monkeypatch.setattr("ssl_ray.train.protocols.EPOCHS", {0.01: 2, 1.0: 10})
    (result,) = cli("evaluate", evaluated, "finetune", "--json").ok().json
    few, every = result["fractions"]
    assert (few["num_train"], every["num_train"]) == (3, result["num_train"])
    assert every["top1"]["value"] > 0.6  # a third by chance
    assert "1 % of labels" in cli("evaluate", evaluated, "finetune").ok().out
    assert json.loads((evaluated / "evaluations/protocols/0000000004-finetune.json").read_text()) == result
