"""Recipes of any shape and any overrides: shown as a configuration, or refused with a line or two."""

import json

import pytest
import yaml
from fuzzing import damages, fuzz, json_values, numbers, refused_or_done, texts
from hypothesis import strategies as st

from ssl_ray import config
from ssl_ray.cli import RECIPES, main, read_config, recipe_names
from ssl_ray.errors import UsageError

KEYS = [row["key"] for row in config.describe()]
SECTIONS = sorted({key.partition(".")[0] for key in KEYS})
WORDS = st.sampled_from(
    [
        "null",
        "true",
        "1",
        "-1",
        "1e3",
        "[1, 0.1]",
        "[0.1, 1]",
        "auto",
        "{a: b}",
        "[[[[",
        "!!python/object:os.system x",
        "1" * 5000,
    ]
)
NAMES = st.sampled_from([*KEYS, *SECTIONS]) | texts
VALUES = json_values | WORDS | st.dictionaries(st.sampled_from(KEYS) | texts, json_values, max_size=3)


def overrides_case(values: dict, overrides: list[tuple[str, object]]) -> None:
    given = [f"{name}={value}" for name, value in overrides]
    with refused_or_done(""):
        made = config.build(values, given)
        assert config.build(config.to_dict(made)) == made


@pytest.mark.parametrize("cases", [50, pytest.param(600, marks=pytest.mark.long)])
def test_values_of_any_shape_make_a_configuration_or_are_refused(cases):
    fuzz(
        overrides_case,
        cases,
        values=st.dictionaries(NAMES, VALUES, max_size=3)
        | st.dictionaries(
            st.sampled_from(SECTIONS),
            st.dictionaries(st.sampled_from([key.partition(".")[2] for key in KEYS]), VALUES, max_size=3),
            max_size=2,
        ),
        overrides=st.lists(st.tuples(NAMES, WORDS | texts | numbers | st.floats()), max_size=3),
    )


def recipe_case(folder, text: bytes, damage) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(damage(text) if damage is not None else text)
    with refused_or_done(""):
        read_config(str(path), [])


_SHAPES = r"""
- a
5
? {a: b} : c
? [a] : c
5: 6
2001-13-45: x
seed: 2001-99-99
seed: !!timestamp x
seed: !!int ''
seed: !!float ''
seed: !!bool x
seed: !!binary x
seed: !!set {a}
seed: !!omap [a: 1]
views: &a {count: *a}
<<: 5
data: {uri: "a\0b"}
run: s3://user:password@bucket/x
!!python/object/apply:os.system ['touch /tmp/x']
null: 1
~
1.5: {2: 3}
true: false
--- a
"""
SHAPES = [line.encode() for line in _SHAPES.strip().splitlines()]
SHAPES += [b"[" * 5000, b"{a: " * 3000, b"\xff\xfe", b"seed: " + b"9" * 5000, b"\0", b"%YAML 9.9\n---\na: b", b"--- a\n--- b"]


@pytest.mark.parametrize("cases", [40, pytest.param(500, marks=pytest.mark.long)])
def test_recipes_of_any_bytes_are_read_or_refused(cases, folder):
    whole = [(RECIPES / f"{name}.yaml").read_bytes() for name in recipe_names()]
    fuzz(
        lambda **drawn: recipe_case(folder, **drawn),
        cases,
        text=st.sampled_from([*whole, *SHAPES]) | json_values.map(lambda value: yaml.safe_dump(value).encode("utf-8", "replace")),
        damage=st.none() | damages(),
    )


@pytest.mark.parametrize("text", SHAPES)
def test_odd_yaml_ends_the_command_with_a_line_or_two(text, folder, capfd):
    (folder / "recipe.yaml").write_bytes(text)
    code = main(["config", "show", "-c", str(folder / "recipe.yaml"), "--json"])
    out, err = capfd.readouterr()
    if code == 0:
        json.loads(out)
    else:
        assert (code, out) == (2, "")
        assert 1 <= len(err.splitlines()) <= 3
        assert "Traceback" not in err
        assert "user:password" not in err


def test_a_few_lines_of_aliases_are_not_unfolded(folder):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="aliases"):
        read_config(str(folder / "recipe.yaml"), [])


def test_the_nearest_divisor_of_a_large_batch_is_found_at_once():
    with (
        refused_or_done("train.lanes"),
        pytest.raises(UsageError, match=r"train\.lanes: got 7, expected a divisor of .* example 8"),
    ):
        config.build({}, ["train.batch=16777216", "train.lanes=7"])


def test_a_name_longer_than_a_file_system_takes_is_no_recipe():
    with refused_or_done("xxx"), pytest.raises(UsageError, match="no such recipe"):
        read_config("x" * 10_000, [])
