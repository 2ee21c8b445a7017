"""The recipes for data sets that are not here take two steps on images of the same shapes."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHAPES = {
    "cifar10": ((32, 32), "png"),
    "stl10": ((96, 96), "png"),
    "imagenet100": ((375, 500), "jpg"),
    "imagenet": ((375, 500), "jpg"),
}
"""Rows and columns of an image, and what it is stored as."""


def shards(cli, folder: Path, name: str) -> Path:
    (rows, columns), suffix = SHAPES[name]
    for i in range(24):
        at = folder / "images" / f"class-{i % 2}" / f"{i}.{suffix}"
        at.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(coarse).resize((columns, rows), Image.Resampling.BICUBIC).save(at)
    cli("data", "pack", folder / "images", folder / "shards").ok()
    return folder / "shards"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SHAPES)
def test_a_recipe_takes_two_steps_on_images_of_its_shape(cli, tmp_path: Path, name: str):
    uri = shards(cli, tmp_path, name)
    recipe = cli("config", "show", "-c", name, "--json").ok().json
    # Four images, one worker, no bfloat16: what a CPU can do. All else is the recipe's.
    here = [
        "train.batch=4",
        "train.workers=0",
        "train.bf16=false",
        "train.steps=2",
        "evaluate.max_images=10",
    ]
    data = [f"data.uri={uri}", f"data.eval_uri={uri}", f"run={tmp_path / 'run'}"]
    summary = cli("pretrain", "-c", name, *data, *here, "--json").ok().json
    assert (summary["steps"], summary["views"]) == (2, 2 * 4 * recipe["views"]["count"])
    assert math.isfinite(summary["loss"])
    ran = cli("config", "show", "-c", tmp_path / "run", "--json").ok().json
    for section in ("views", "model", "loss", "optim"):
        assert ran[section] == recipe[section]
