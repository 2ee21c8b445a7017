"""What the command line prints: the result alone on stdout, JSON where asked for, help that names what is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_harness import SMALL

from ssl_ray.cli import RECIPES, recipe_names

ROOT = Path(__file__).parents[2]

TRACKERS = {"--tensorboard", "--wandb", "--mlflow"}

# The surface: a verb or an option more is a decision, and needs its line here.
OPTIONS = {
    "pretrain": {"--json", "--resume", "--no-lease", "--config"} | TRACKERS,
    "evaluate": {"--json", "--label", "--step", "--untrained", "--data", "--test", "--seeds", "--confusion"},
    "export": {"--json", "--output", "--format", "--step", "--license", "--overwrite"},
    "embed": {"--json", "--label", "--output"},
    "neighbours": {"--json", "--label", "--output", "--images"},
    "plan": {"--json", "--config", "--no-probe", "--images", "--shards", "--mean-bytes", "--images-per-s", "--gpu"},
    "profile": {"--json", "--steps"},
    "data pack": {"--json", "--label", "--split", "--root", "--download", "--seed", "--shard-mb", "--overwrite"},
    "data index": {"--json", "--label", "--output"},
    "data check": {"--json", "--label"},
    "data stats": {"--json"},
    "data preview": {"--json", "--output", "--images", "--config"},
    "config show": {"--json", "--config"},
    "config schema": {"--json"},
    "config diff": {"--json"},
    "runs list": {"--json"},
    "doctor": {"--json", "--address", "--config"},
    "submit": {"--json", "--address", "--working-dir", "--uv", "--no-follow"},
    "debug": {"--json", "--address", "--output"},
    "dashboard": {"--json", "--port", "--host", "--token-file", "--demo"},
    "study run": {"--json", "--output", "--small"} | TRACKERS,
    "study resume": {"--json"} | TRACKERS,
    "study status": {"--json"},
    "study stop": {"--json"},
    "study list": {"--json"},
    "report": {"--json", "--output", "--markdown", "--latex", "--figures"},
}
GROUPS = {
    "": {
        "pretrain",
        "evaluate",
        "export",
        "embed",
        "neighbours",
        "plan",
        "profile",
        "data",
        "config",
        "runs",
        "study",
        "dashboard",
        "report",
        "doctor",
        "submit",
        "debug",
    },
    "study": {"run", "resume", "status", "stop", "list"},
}
GROUPS |= {"data": {"pack", "index", "check", "stats", "preview"}, "config": {"show", "schema", "diff"}, "runs": {"list"}}


def words(text: str) -> set[str]:
    return set(text.replace(",", " ").replace("[", " ").replace("]", " ").split())


@pytest.mark.parametrize("verb", OPTIONS)
def test_the_help_of_a_verb_names_its_options_and_no_others(cli, verb):
    text = cli(*verb.split(), "--help").ok().out
    assert {word for word in words(text.partition("most used")[0]) if word.startswith("--")} == OPTIONS[verb] | {"--help"}


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_verb_the_help_is_shown_with_all_verbs(cli, group):
    text = cli(*group.split(), "--help").ok().out
    done = cli(*group.split())
    assert (done.code, done.out, done.err) == (2, "", text)
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("    ") and line[4] != " "}
    assert shown == GROUPS[group]


def test_the_help_of_pretrain_names_the_recipes_the_most_used_keys_and_commands_to_copy(cli):
    text = cli("pretrain", "--help").ok().out
    assert words(text) >= {"views.count=8", "model.projector_dim=64", "train.workers=4", "data.uri=URI", "run=URI"}
    assert all(name in text for name in recipe_names())
    assert "  ssl-ray pretrain -c fashion-mnist" in text


def test_keys_may_stand_anywhere_and_with_dashes(cli):
    shown = cli("config", "show", "seed=3", "--json", "views.count=5", "-c", "cifar10", "--optim.lr=0.5").ok().json
    assert (shown["seed"], shown["views"]["count"], shown["optim"]["lr"], shown["model"]["encoder"]) == (3, 5, 0.5, "resnet50")


def test_shown_configuration_is_a_recipe_that_gives_the_same(cli, tmp_path):
    keys = ("seed=3", "views.blur=[1.0,0.1]", "run=s3://b/ü x", "optim.weight_decay=1e-7", "loss.beta=0.01")
    text = cli("config", "show", *keys).ok().out
    (tmp_path / "again.yaml").write_text(text)
    assert cli("config", "show", "-c", tmp_path / "again.yaml").ok().out == text
    assert cli("config", "diff", tmp_path / "again.yaml", tmp_path / "again.yaml").ok().out == "no difference\n"
    assert yaml.safe_load(text) == cli("config", "show", "--json", *keys).ok().json


def test_the_schema_explains_every_key(cli):
    rows = cli("config", "schema", "--json").ok().json
    text = cli("config", "schema").ok().out
    assert len(rows) > 50
    for row in rows:
        assert row["help"], f"{row['key']} has no sentence in config.py"
        assert row["help"] in text
        assert f"\n{row['key']}=" in f"\n{text}"
    assert "\nloss.beta=auto  [float or auto]\n" in text
    assert "\ntrain.workers=2  [int or {min: int, max: int}]  (may change when a run is continued)\n" in text


def test_a_plan_for_a_gpu_is_shown_with_its_name_and_memory(cli):
    keys = ("--images", "500", "train.workers=1", "data.eval_uri=x")
    lines = cli("plan", *keys, "--gpu", "l4").ok().out.splitlines()
    shown = {line[: line.index("  ")]: line.split()[-1] for line in lines}
    assert shown["gpu"] == "l4"
    assert {"gpu memory", "gpu needed", "gpu images each second", "estimated"} <= shown.keys()


def test_differences_of_recipes_are_shown_side_by_side(cli):
    rows = {row["key"]: row for row in cli("config", "diff", "digits", "cifar10", "--json").ok().json}
    assert rows["model.encoder"] == {"key": "model.encoder", "digits": "small", "cifar10": "resnet50"}
    assert "seed" not in rows
    assert "model.encoder" in cli("config", "diff", "digits", "cifar10").ok().out


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_and_its_head_has_command_hardware_and_time(cli, name):
    cli("config", "show", "-c", name).ok()
    text = (RECIPES / f"{name}.yaml").read_text()
    head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert "#   ssl-ray pretrain" in head
    assert "CPU" in head or "GPU" in head
    assert "minutes" in head or "ot run here" in head


def test_a_run_says_what_it_gained_and_where_its_results_are(cli, packed, trained):
    done = cli("pretrain", *SMALL, f"data.uri={packed}", f"run={trained}").ok()
    assert done.out.startswith("4 steps, 64 images, 128 views in ")
    table = {line.split()[0]: line for line in done.out.splitlines() if line.startswith(("linear", "kNN"))}
    assert table.keys() == {"linear", "kNN"}
    assert all("points" in line for line in table.values())
    assert done.out.splitlines()[-1].startswith(f"Results: {trained} (summary.json")
    assert "is complete" in done.err


def test_plan_counts_what_the_run_then_does(cli, packed, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = (*SMALL, f"data.uri={packed}")
    plan = cli("plan", *keys, "--json").ok().json
    summary = json.loads((trained / "summary.json").read_text())
    assert [plan[name] for name in ("steps", "images", "views")] == [summary[name] for name in ("steps", "images", "views")]
    weights = (trained / "checkpoints" / json.loads((trained / "latest.json").read_text())["checkpoint"]).iterdir()
    size = sum(path.stat().st_size for path in weights)
    assert plan["checkpoint_bytes"] == pytest.approx(size, rel=0.02)
    assert plan["estimated_s"] > 0
    text = cli("plan", *keys, "--no-probe").ok().out
    assert "checkpoint " in text
    assert " MiB\n" in text
    assert "estimated" not in text
    assert list(tmp_path.iterdir()) == []  # a plan leaves nothing


def test_a_plan_tries_as_many_images_as_its_time_allows_and_says_so(cli, packed, monkeypatch):
    keys = ("plan", *SMALL, f"data.uri={packed}")
    whole = cli(*keys, "--json").ok()
    assert (whole.err, whole.json["probed_images_per_step"]) == ("", 16)
    monkeypatch.setattr("ssl_ray.train.forecast.PROBE_S", 1e-9)
    text = cli(*keys).ok()
    assert text.err.splitlines() == ["trying a step of 2 images", "trying 4 steps of 2 images (of 16)"]
    assert "probed images per step " in text.out
    assert "memory" not in text.out  # that of two images would be taken for the run's
    few = cli(*keys, "--json").ok().json
    assert few["probed_images_per_step"] == 2
    assert few["estimated_s"] == pytest.approx(4 * (few["probed_views_per_step_s"] + few["probed_training_per_step_s"]))


def test_data_verbs_print_json_alone_on_stdout(cli, images, tmp_path):
    uri = tmp_path / "train"
    done = [cli("data", "pack", images, uri, "--json"), cli("data", "check", uri, "--json"), cli("data", "stats", uri, "--json")]
    done += [cli("data", "index", uri, "--json")]
    done += [cli("data", "preview", uri, "-o", tmp_path / "x.png", "--images", "2", "--json")]
    assert [one.ok().err for one in done] == [""] * 5
    assert [one.json["samples"] for one in done[:4]] == [96] * 4
    assert done[2].json["classes"] == {"class-0": 32, "class-1": 32, "class-2": 32}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_closes_early_gets_no_traceback():
    command = f"{sys.executable} -m ssl_ray config schema | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("job", "arguments"), [("pretrain", ["views.cuont=1"]), ("evaluate", ["no-such-run"]), ("pack", ["no-such-folder", "x"])]
)
def test_jobs_are_the_verbs(job, arguments):
    command = [sys.executable, ROOT / "jobs" / f"{job}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (2, 3)
    assert done.stderr.startswith("ssl-ray: ")
    assert arguments[0].split("=")[0] in done.stderr
