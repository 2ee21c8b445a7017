import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_ray.config import (
    EXECUTION,
    MAX_LANES,
    Config,
    Loss,
    Train,
    Views,
    build,
    canonical_hash,
    flatten,
    identity,
    to_dict,
)
from ssl_ray.errors import UsageError

# Another valid value of every key: a new key needs its line here, and so a decision whether it belongs to the identity.
OTHER_VALUES = {
    "run": "s3://bucket/run",
    "seed": "7",
    "data.uri": "s3://bucket/train",
    "data.fraction": "0.5",
    "data.balanced": "true",
    "data.eval_uri": "s3://bucket/test",
    "data.eval_fraction": "0.2",
    "data.max_bad_samples": "3",
    "data.cache_dir": "/scratch/shards",
    "data.cache_bytes": "1000000",
    "data.label": "ssl-ray/role=data",
    "views.count": "8",
    "views.size_px": "64",
    "views.channels": "1",
    "views.crop_scale": "[0.2, 1.0]",
    "views.crop_ratio": "[0.5, 2.0]",
    "views.flip": "0.0",
    "views.jitter": "0.5",
    "views.brightness": "0.8",
    "views.contrast": "0.8",
    "views.saturation": "0.8",
    "views.hue": "0.2",
    "views.grayscale": "[0.1, 0.2]",
    "views.blur": "[1.0, 0.1]",
    "views.blur_sigma": "[0.5, 1.0]",
    "views.solarize": "0.2",
    "views.photometric_on": "worker",
    "model.encoder": "resnet18",
    "model.projector_dim": "64",
    "model.projector_width": "512",
    "model.projector_depth": "3",
    "model.projector_norm": "layer",
    "model.batch_norm": "local",
    "loss.name": "vicreg",
    "loss.form": "pairs",
    "loss.beta": "0.01",
    "loss.invariance": "10.0",
    "loss.variance": "10.0",
    "loss.covariance": "2.0",
    "optim.name": "lars",
    "optim.lr": "0.01",
    "optim.weight_decay": "0.0",
    "optim.warmup_epochs": "2.0",
    "train.batch": "256",
    "train.epochs": "3",
    "train.steps": "50",
    "train.lanes": "32",
    "train.bf16": "true",
    "train.init_from": "s3://bucket/weights.safetensors",
    "train.workers": "4",
    "train.threads": "2",
    "train.digest": "true",
    "train.label": "ssl-ray/role=train",
    "train.pack": "true",
    "train.stall_s": "60.0",
    "evaluate.every_epochs": "1",
    "evaluate.every_steps": "40",
    "evaluate.max_images": "1000",
    "checkpoint.every_steps": "10",
    "checkpoint.every_s": "30.0",
    "checkpoint.keep": "5",
}


def hash_of(config):
    return canonical_hash(identity(config))


def message_of(*overrides, values=None, source="configuration"):
    with pytest.raises(UsageError) as caught:
        build(values or {}, overrides, source)
    return str(caught.value)


def test_nothing_can_be_changed_after_construction():
    config = Config()
    for holder in [config, *vars(config).values()]:
        if dataclasses.is_dataclass(holder):
            for field in dataclasses.fields(holder):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(holder, field.name, None)
    assert hash(config) == hash(build({}))  # a dict key, so nothing mutable inside


def test_no_values_give_the_defaults():
    assert build({}) == Config() == build({"views": None, "loss": {}})


def test_the_keys_and_their_execution_part_are_these():
    assert set(flatten(to_dict(Config()))) == set(OTHER_VALUES)
    assert {
        "run",
        "data.uri",
        "data.eval_uri",
        "data.cache_dir",
        "data.cache_bytes",
        "data.label",
        "data.max_bad_samples",
        "train.workers",
        "train.threads",
        "train.digest",
        "train.label",
        "train.pack",
        "train.stall_s",
        "evaluate.every_epochs",
        "evaluate.every_steps",
        "checkpoint.every_steps",
        "checkpoint.every_s",
        "checkpoint.keep",
    } == EXECUTION


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_key_changes_the_hash_of_the_identity_unless_it_is_of_the_execution(key):
    changed = build({}, [f"{key}={OTHER_VALUES[key]}"])
    values, defaults = flatten(to_dict(changed)), flatten(to_dict(Config()))
    assert {k for k in values if values[k] != defaults[k]} == {key}
    assert (hash_of(changed) == hash_of(Config())) == (key in EXECUTION)
    assert set(identity(changed)) == set(values) - EXECUTION


def test_the_hash_is_sha256_of_json_with_sorted_keys_and_no_spaces():
    text = rb'{"a":[1,0.5,null,true],"b":"\u00e9"}'
    assert canonical_hash({"b": "é", "a": (1, 0.5, None, True)}) == hashlib.sha256(text).hexdigest()


def test_hashes_are_pinned():
    assert canonical_hash({"lr": 1e-3, "d": 256}) == "a408d26f5df44ce4b2eb86c651c75882727044789b1ff4c1393c309065d46197"
    # Changes only when a key or default of the identity does, and then every run gets another name.
    assert hash_of(Config()) == "4da06a99bb841902cc80b1c89aca7680bee80666a8f2ba8f5004fc5a4d8c8d69"


def test_a_number_has_one_hash_however_it_is_written():
    written = [build({}, ["views.flip=1", "optim.lr=1e-2"]), build({"views": {"flip": 1}, "optim": {"lr": 0.01}})]
    written.append(build({"views": {"flip": 1.0}, "optim": {"lr": "0.010"}}))
    assert len({hash_of(config) for config in written}) == 1


probability = st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=3).map(tuple)
configs = st.builds(
    Config,
    run=st.none() | st.text("abc/:é 0", min_size=1).map(lambda text: "x" + text),
    seed=st.integers(0, 2**32 - 1),
    views=st.builds(
        Views,
        count=st.integers(2, 1024),
        channels=st.sampled_from([1, 3]),
        crop_scale=st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1)),
        flip=probability,
        blur=probability,
    ),
    loss=st.builds(Loss, beta=st.just("auto") | st.floats(1e-9, 1e3), name=st.sampled_from(["barlow_twins", "vicreg"])),
    train=st.builds(Train, batch=st.sampled_from([16, 96, 128]), lanes=st.sampled_from([None, 8, 16])),
)


@settings(deadline=None, max_examples=25)
@given(configs)
def test_the_stored_values_of_any_configuration_build_it_again(config):
    stored = json.loads(json.dumps(to_dict(config)))
    assert build(stored) == config
    assert hash_of(build(stored)) == hash_of(config)


def test_overrides_win_over_values_and_the_last_one_over_the_others():
    config = build({"views": {"count": 8, "hue": 0.2}}, ["views.count=3", "--views.count=5"])
    assert (config.views.count, config.views.hue) == (5, 0.2)


def test_an_unknown_key_is_named_with_where_it_stands_and_the_nearest_one():
    assert message_of("views.cuont=8") == "views.cuont: no such key (command line). Did you mean views.count?"
    assert message_of("batch=8") == "batch: no such key (command line). Did you mean train.batch?"
    assert message_of("qqq=8") == "qqq: no such key (command line). `ssl-ray config show` lists all keys."
    values = {"optim": {"learning_rate": 1, "weight_decy": 0}}
    assert message_of(values={"optim": {"weight_decy": 0}}, source="my.yaml") == (
        "optim.weight_decy: no such key (my.yaml). Did you mean optim.weight_decay?"
    )
    assert message_of(values=values).startswith("optim.learning_rate: no such key")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("views.count=eight", ["got 'eight', expected a whole number."]),
        ("train.epochs=2.5", ["got '2.5', expected a whole number."]),
        ("train.steps=all", ["got 'all', expected a whole number, or null."]),
        ("optim.lr=fast", ["got 'fast', expected a number."]),
        ("loss.name=byol", ["got 'byol', expected barlow_twins or vicreg or spectral."]),
        ("views.channels=2", ["got '2', expected 1 or 3."]),
        ("loss.beta=x", ["got 'x', expected a number, or auto."]),
        ("views.flip=often", ["got 'often', expected a number, or a list of numbers."]),
        ("views.crop_scale=0.5", ["got '0.5', expected a list of 2 numbers."]),
        ("train.bf16=maybe", ["got 'maybe', expected true or false."]),
    ],
)
def test_a_wrong_type_is_one_line_with_key_got_and_expected(override, parts):
    message = message_of(override)
    assert message.startswith(override.partition("=")[0] + ": ")
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views.count=1", "views.count: got 1, expected 2 to 1024."),
        ("data.fraction=0", "data.fraction: got 0.0, expected a number above 0, up to 1."),
        ("seed=4294967296", "seed: got 4294967296, expected 0 to 2**32 - 1."),
        ("views.flip=[0.5,1.5]", "views.flip: got (0.5, 1.5), expected probabilities from 0 to 1."),
        (
            "views.crop_scale=[0.5,0.2]",
            "views.crop_scale: got [0.5, 0.2], expected two increasing numbers above 0, up to 1.",
        ),
        ("train.lanes=3", "train.lanes: got 3, expected a divisor of train.batch=128, for example 2."),
        ("checkpoint.keep=0", "checkpoint.keep: got 0, expected 1 or more."),
    ],
)
def test_a_wrong_value_is_one_line_with_key_got_and_expected(override, message):
    assert message_of(override) == message


@pytest.mark.parametrize("key", ["optim.lr", "optim.weight_decay", "views.brightness", "loss.variance", "data.fraction"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_must_be_finite(key, value):
    assert message_of(f"{key}={value}").startswith(f"{key}: got ")


def test_values_that_do_not_go_together_say_what_to_do():
    assert "Set views.count=2, or loss.form=pairs" in message_of("loss.form=classic")
    assert build({}, ["loss.form=classic", "views.count=2"]).loss.form == "classic"
    assert "Use fewer workers" in message_of("train.workers=65")


def test_an_option_without_a_value_is_explained():
    assert message_of("views.count") == (
        "views.count: not understood. Options are given as KEY=VALUE, for example views.count=8."
    )


@pytest.mark.parametrize(("batch", "lanes"), [(128, 64), (96, 48), (100, 50), (7, 7), (127, 1), (4096, 64)])
def test_lanes_are_the_largest_divisor_of_the_batch_up_to_the_limit(batch, lanes):
    got = Train(batch=batch, workers=1).num_lanes()
    assert got == lanes == max(n for n in range(1, MAX_LANES + 1) if batch % n == 0)
    assert Train(batch=batch, lanes=1, workers=1).num_lanes() == 1


def test_the_module_works_in_a_process_without_torch_and_ray():
    code = """
import sys
for name in ("torch", "torchvision", "ray"):
    sys.modules[name] = None  # an import of it now raises ImportError
from ssl_ray.config import Config, build, canonical_hash, identity
assert build({"views": {"count": 8}}, ["seed=3"]).seed == 3
print(canonical_hash(identity(Config())), end="")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == hash_of(Config())


def test_the_number_of_workers_may_be_a_range():
    made = build({}, ["train.workers={min: 2, max: 5}"])
    assert (made.train.fewest_workers(), made.train.most_workers()) == (2, 5)
    assert build({"train": {"workers": {"min": 2, "max": 5}}}) == build(to_dict(made)) == made
    assert hash_of(made) == hash_of(Config())
    assert message_of("train.workers={min: 3, max: 2}").startswith("train.workers: got {min: 3, max: 2}, expected min of 1 or")
    assert message_of("train.workers={min: 1}") == (
        "train.workers: got '{min: 1}', expected a whole number, or {min: N, max: N}."
    )
    assert "Use fewer workers" in message_of("train.workers={min: 1, max: 65}")


def test_a_value_cannot_name_a_module_to_import():
    message_of("train.workers=this.Zen")
    message_of("train.workers={class_path: this.Zen}")
    assert "this" not in sys.modules
