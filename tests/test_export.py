"""Encoders for Python and for other programs, against torchvision's and timm's own models, onnxruntime and torch.export."""

import contextlib
import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import huggingface_hub
import numpy as np
import onnx
import pytest
import timm
import torch
import yaml
from command import Done
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import models
from torchvision.transforms.v2 import functional as transforms

import ssl_ray
from ssl_ray import config, shards, storage
from ssl_ray.cli import main
from ssl_ray.errors import DataError
from ssl_ray.evaluate.images import choose, plain_images

ROOT = Path(__file__).parents[1]
CASES = {
    "resnet18": ("resnet18", 32, 3, ("safetensors", "torchvision", "timm", "onnx", "torch")),
    "grey": ("resnet18", 72, 1, ("safetensors", "torchvision", "timm")),
    "small": ("small", 28, 3, ("safetensors", "onnx", "torch")),
    "mobilenet": ("mobilenet_v3_small", 32, 3, ("safetensors", "torchvision")),
}
"""Encoder, pixels, channels, formats."""


def photographs(count: int) -> list[Image.Image]:
    """Pieces of the two that come with scikit-learn."""
    rng, whole = np.random.default_rng(0), load_sample_images().images
    corners = rng.integers(0, 300, (count, 2))
    return [Image.fromarray(whole[i % 2][y : y + 90, x : x + 110]) for i, (y, x) in enumerate(corners)]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for i, photograph in enumerate(photographs(24)):
        at = folder / "images" / str(i % 2) / f"{i}.png"
        at.parent.mkdir(parents=True, exist_ok=True)
        photograph.save(at)
    assert main(["data", "pack", str(folder / "images"), str(folder / "shards"), "--json"]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def runs(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of two steps of each case, with a checkpoint at both; no test changes it."""
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            encoder, size_px, channels, _ = CASES[case]
            uri = tmp_path_factory.mktemp("runs") / case
            keys = [f"data.uri={packed}", f"run={uri}", f"model.encoder={encoder}", f"views.size_px={size_px}"]
            keys += [f"views.channels={channels}", "views.count=2", "model.projector_dim=16", "train.batch=4"]
            keys += ["train.steps=2", "train.workers=0", "checkpoint.every_steps=1"]
            assert main(["pretrain", "--json", *keys]) == 0
            made[case] = uri
        return made[case]

    return run


@pytest.fixture(scope="module")
def exports(runs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An export of each in all its formats; no test changes it."""
    made: dict[str, Path] = {}

    def exported(case: str) -> Path:
        if case not in made:
            to = tmp_path_factory.mktemp("exports") / case
            assert main(["export", str(runs(case)), "-o", str(to), "--json", "--format", *CASES[case][3]]) == 0
            made[case] = to
        return made[case]

    return exported


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def call(*arguments: object) -> Done:
        capfd.readouterr()
        try:
            code = main(["export", *map(str, arguments)])
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        return Done(code, *capfd.readouterr())

    return call


def features(encoder: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return encoder(images)


def assert_same(got, expected: Tensor) -> None:
    got = torch.as_tensor(got).detach()
    assert (got.shape, got.dtype) == (expected.shape, torch.float32)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def code_of(markdown: Path, *, below: str) -> list[str]:
    """The Python of the section `below`, block by block."""
    section = markdown.read_text().partition(f"\n## {below}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize("case", CASES)
def test_the_lines_of_the_model_card_give_the_features_of_the_run_from_every_file(case, runs, exports, tmp_path, monkeypatch):
    shutil.copytree(exports(case), tmp_path / "export")
    monkeypatch.chdir(tmp_path / "export")
    photographs(1)[0].save("image.jpg")
    encoder, preprocess = ssl_ray.load(runs(case))
    blocks = code_of(Path("README.md"), below="Use")
    assert len(blocks) == len(CASES[case][3])
    for n in (1, 5):
        images = preprocess(photographs(n))
        for block in blocks:
            given = preprocess("image.jpg") if "image.jpg" in block else images
            values = {"images": images}
            exec(block, values)
            assert_same(values["features"], features(encoder, given))


def test_the_lines_of_the_readme_run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(runs("small"))
    photographs(1)[0].save("image.jpg")
    (block,) = code_of(ROOT / "README.md", below="Use an encoder")
    values: dict = {}
    exec(block, values)
    assert values["features"].shape == (1, 128)
    assert not values["encoder"].training


def test_torchvision_and_timm_miss_the_classifier_and_nothing_else(exports):
    model = models.resnet18()
    missing, unexpected = model.load_state_dict(load_file(exports("grey") / "torchvision.safetensors"), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    cfg = json.loads((exports("resnet18") / "timm.json").read_text())["pretrained_cfg"]
    read = timm.data.resolve_model_data_config(timm.create_model("resnet18", pretrained_cfg=cfg))
    assert [list(read[key]) for key in ("mean", "std", "input_size")] == [[0.5] * 3, [0.25] * 3, [3, 32, 32]]
    assert (read["interpolation"], read["crop_pct"]) == ("bilinear", 1.0)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_resnets_have_the_same_names_in_timm_as_in_torchvision(name):
    with torch.device("meta"):
        theirs, timms = models.get_model(name), timm.create_model(name)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (theirs, timms)]
    assert shapes[0] == shapes[1]


def test_a_bottleneck_resnet_is_the_same_function_in_timm():
    torch.manual_seed(0)
    theirs, timms = models.resnet50().eval(), timm.create_model("resnet50").eval()
    timms.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert_same(features(timms, images), features(theirs, images))


def test_onnx_is_valid_and_says_opset_and_inputs(exports):
    model = onnx.load(exports("resnet18") / "encoder.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.version for each in model.opset_import if each.domain == ""] == [18]
    (images,), (h,) = model.graph.input, model.graph.output
    assert (images.name, h.name, images.type.tensor_type.elem_type) == ("images", "features", onnx.TensorProto.UINT8)
    assert [each.dim_value for each in images.type.tensor_type.shape.dim] == [0, 3, 32, 32]  # 0: any number


def test_no_file_holds_the_projector(runs, exports):
    weights = load_file(next((runs("small") / "checkpoints").iterdir()) / "weights.safetensors")
    assert any(name.startswith("projector.") for name in weights)
    exported = load_file(exports("small") / "encoder.safetensors")
    assert exported.keys() == {name for name in weights if name.startswith("encoder.")}


# ssl_ray.load ---------------------------------------------------------------------------------------------------------


def test_runs_checkpoints_and_exports_load_from_any_storage(runs, exports):
    run, export = runs("small"), exports("small")
    encoder, preprocess = ssl_ray.load(run)
    images = preprocess(photographs(5))
    newest = json.loads((run / "latest.json").read_text())["checkpoint"]
    remote = fsspec.filesystem("memory")
    remote.put(str(export), "/bucket/export", recursive=True)
    for uri in (run / "checkpoints" / newest, str(export), f"file://{export}", "memory://bucket/export"):
        again, how = ssl_ray.load(uri)
        assert torch.equal(features(again, how(photographs(5))), features(encoder, images))
    (older,) = [path for path in (run / "checkpoints").iterdir() if path.name != newest]
    assert not torch.equal(features(ssl_ray.load(older)[0], images), features(encoder, images))
    with_gradient = encoder(images)
    assert with_gradient.requires_grad
    assert torch.equal(with_gradient, features(encoder, images))


def test_loading_leaves_the_random_numbers_of_the_process_alone(runs):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ssl_ray.load(runs("small"))
    assert torch.equal(torch.rand(3), expected)


def test_an_export_begins_another_run(packed, exports, tmp_path):
    keys = [f"data.uri={packed}", f"run={tmp_path / 'run'}", "views.size_px=28", "views.count=2", "model.projector_dim=8"]
    keys += ["train.batch=4", "train.steps=1", "train.workers=0", f"train.init_from={exports('small') / 'encoder.safetensors'}"]
    assert main(["pretrain", "--json", *keys]) == 0


def test_what_holds_no_encoder_is_refused_by_name(runs, exports, tmp_path):
    def refused(uri: Path, text: str) -> None:
        with pytest.raises(DataError, match=text) as caught:
            ssl_ray.load(uri)
        assert str(uri) in str(caught.value)

    refused(tmp_path, "no encoder here, expected a run, a checkpoint of one or an export")
    copy = Path(shutil.copytree(exports("small"), tmp_path / "export"))
    description = json.loads((copy / "encoder.json").read_text())
    for change, text in (
        ({"format_version": 2}, "format_version is 2, this ssl_ray reads 1"),
        ({"encoder": None}, "damaged"),
        ({"pixel_mean": 0.4}, "damaged"),
        ({"size_px": "28"}, "damaged"),
        ({"channels": 1}, "not the weights of small"),
        ({"encoder": "resnet18"}, "not the weights of resnet18"),
    ):
        (copy / "encoder.json").write_text(json.dumps(description | change))
        refused(copy, text)
    (copy / "encoder.json").write_text("{")
    refused(copy, "not a JSON file")
    shutil.copy(exports("small") / "encoder.json", copy)
    (copy / "encoder.safetensors").write_bytes(b"x" * 100)
    refused(copy, "not a readable safetensors file")
    (copy / "encoder.safetensors").unlink()
    refused(copy, "has no encoder.safetensors")
    alone = Path(shutil.copytree(next((runs("small") / "checkpoints").iterdir()), tmp_path / "a" / "b" / "c"))
    with pytest.raises(DataError, match=r"no run here \(no run.json\)"):
        ssl_ray.load(alone)


def test_the_encoder_refuses_what_it_would_normalise_twice_or_cannot_take(exports):
    encoder, _ = ssl_ray.load(exports("small"))
    for images, got in (
        (torch.zeros(2, 3, 28, 28), r"float32 \[2, 3, 28, 28\]"),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), r"uint8 \[2, 1, 28, 28\]"),
        (torch.zeros(3, 28, 28, dtype=torch.uint8), r"uint8 \[3, 28, 28\]"),
    ):
        with pytest.raises(ValueError, match=rf"images: got {got}, expected uint8 \[n, 3, H, W\]"):
            encoder(images)


# preprocess -----------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def test_preprocess_is_the_plain_view_of_the_read_outs(packed, exports):
    manifest = shards.load_manifest(str(packed))
    chosen, _ = choose(manifest, None, held_out=0.1, max_images=100)
    _, preprocess = ssl_ray.load(exports("small"))
    images, positions = plain_images(chosen, slice(None), channels=3, size_px=28)
    samples = shards.read_samples(manifest, chosen.shards, chosen.rows)
    assert np.array_equal(preprocess([bytes(samples.images[i]) for i in positions]).numpy(), images)


def test_preprocess_cuts_the_centre_and_resizes_as_torchvision_does(exports):
    _, preprocess = ssl_ray.load(exports("small"))
    photograph = photographs(1)[0]
    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    expected = transforms.resized_crop(pixels, 0, 10, 90, 90, [28, 28], antialias=True)
    assert (preprocess(photograph)[0].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("case", ["small", "grey"])
def test_preprocess_takes_paths_bytes_images_and_arrays_alike(case, exports, tmp_path):
    _, preprocess = ssl_ray.load(exports(case))
    for photograph in (photographs(1)[0], photographs(1)[0].convert("L"), photographs(1)[0].quantize(16)):
        at = tmp_path / "image.png"
        photograph.save(at)
        expected = preprocess(at)
        assert (expected.dtype, list(expected.shape)) == (torch.uint8, [1, CASES[case][2], CASES[case][1], CASES[case][1]])
        given = [str(at), f"file://{at}", at.read_bytes(), memoryview(at.read_bytes()), photograph, Image.open(at)]
        if photograph.mode != "P":
            pixels = np.array(photograph)
            pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            given += [pixels, torch.from_numpy(pixels.copy())]
            assert torch.equal(preprocess(np.stack([pixels, pixels])), expected.repeat(2, 1, 1, 1))
        for image in given:
            assert torch.equal(preprocess(image), expected)
        assert torch.equal(preprocess(given), expected.repeat(len(given), 1, 1, 1))
    turned = encoded(photographs(1)[0], "JPEG", exif=_turned())
    assert torch.equal(preprocess(turned), preprocess(Image.open(io.BytesIO(turned))))
    assert list(preprocess([]).shape) == [0, *expected.shape[1:]]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    return exif


def test_preprocess_refuses_what_is_no_image_by_its_place_in_the_list(exports, tmp_path):
    _, preprocess = ssl_ray.load(exports("small"))
    good = photographs(1)[0]
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    cut = Image.open(io.BytesIO(encoded(good, "PNG")[:500]))
    for image, error, text in (
        (tmp_path / "broken.jpg", DataError, "broken.jpg: cannot be decoded"),
        (tmp_path / "absent.jpg", DataError, "absent.jpg: not there"),
        (b"", DataError, "image 1: cannot be decoded"),
        (cut, DataError, "image 1: cannot be decoded"),
        (np.zeros((28, 28, 3), np.uint8), ValueError, r"image 1: got uint8 \[28, 28, 3\], expected uint8 \[C, H, W\]"),
        (np.zeros((3, 0, 9), np.uint8), ValueError, r"image 1: got uint8 \[3, 0, 9\]"),
        (np.zeros((3, 9, 9), np.float32), ValueError, "image 1: got float32"),
        (7, ValueError, "image 1: got int, expected encoded bytes, a path"),
    ):
        with pytest.raises(error, match=text):
            preprocess([good, image])


# ssl-ray export -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_encoder_is_and_how_good(packed, runs, exports):
    run = runs("resnet18")
    card = huggingface_hub.ModelCard.load(exports("resnet18") / "README.md")
    assert (card.data.license, card.data.library_name) == ("unknown", "ssl-ray")
    assert {"self-supervised-learning", "barlow-twins", "resnet18"} <= set(card.data.tags)
    record = json.loads((run / "run.json").read_text())
    recipe = yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])
    assert config.identity(config.build(recipe)).items() <= record["identity"].items()
    for fact in (f"`{packed}`", record["hash"], record["identity"]["data.digest"], "images: 24", "fraction used: 1.0"):
        assert fact in card.text
    for name, title in (("untrained", "untrained"), (f"{2:010d}", "step 2")):
        told = json.loads((run / "evaluations" / f"{name}.json").read_text())
        (row,) = [line for line in card.text.splitlines() if line.startswith(f"| {title} |")]
        assert f"| {told['linear_accuracy']:.4g} | {told['knn_accuracy']:.4g} |" in row
        assert row.endswith(f"| {told['num_train']} | {told['num_test']} |")


def test_the_card_has_the_results_of_named_protocols_at_its_step(export, runs, tmp_path):
    run = Path(shutil.copytree(runs("small"), tmp_path / "run"))
    (run / "evaluations" / "protocols").mkdir(exist_ok=True)

    def write(name: str, step: int, **numbers: object) -> None:
        told = {"format_version": 1, "protocol": {"name": name, "version": 1}, "step": step, "test": {"uri": "s3://b/test"}}
        told |= {"num_train": 36, "num_test": 4} | numbers
        (run / "evaluations" / "protocols" / f"{step:010d}-{name}.json").write_text(json.dumps(told))

    write("knn", 2, top1={"value": 0.5, "interval": [0.25, 1.0]}, top5=None)
    write("fewshot", 2, shots=[{"images_per_class": 5, "num_train": 15, "value": 0.75, "interval": [0.5, 1.0]}])
    write("spectrum", 2, alpha={"value": None, "interval": None}, lidar={"value": 2.5, "interval": None})
    part = {"fraction": 0.01, "num_train": 7, "top1": {"value": 0.625, "interval": [0.25, 0.75]}}
    write("finetune", 2, fractions=[part])
    write("logreg", 1, top1={"value": 0.1, "interval": [0.0, 0.2]})
    export(run, "-o", tmp_path / "to").ok()
    rows = [line for line in (tmp_path / "to" / "README.md").read_text().splitlines() if "s3://b/test" in line]
    assert rows == [
        "| fewshot, version 1 | top1, 5 images a class | 0.75 | 0.5 to 1 | 15 | 4 | `s3://b/test` |",
        "| finetune, version 1 | top1, 0.01 of the labels | 0.625 | 0.25 to 0.75 | 7 | 4 | `s3://b/test` |",
        "| knn, version 1 | top1 | 0.5 | 0.25 to 1 | 36 | 4 | `s3://b/test` |",
        "| spectrum, version 1 | lidar | 2.5 | - | 36 | 4 | `s3://b/test` |",
    ]


def test_an_export_names_its_files_licence_and_step(export, runs, tmp_path):
    done = export(runs("small"), "-o", tmp_path / "a", "--step", 1, "--license", "apache-2.0", "--format", "torch").ok()
    table = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()[1:4]}
    assert table.keys() == {"encoder.pt2", "README.md", "encoder.json"} == {path.name for path in (tmp_path / "a").iterdir()}
    assert int(table["encoder.pt2"][0]) == (tmp_path / "a" / "encoder.pt2").stat().st_size
    assert float(table["encoder.pt2"][1]) < 1e-5
    assert done.out.endswith(f"Written: {tmp_path / 'a'}, the encoder after 1 steps\n")
    assert huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md").data.license == "apache-2.0"
    assert json.loads((tmp_path / "a" / "encoder.json").read_text())["step"] == 1
    with pytest.raises(DataError, match=r"has no encoder.safetensors. Export the run again, with --format safetensors"):
        ssl_ray.load(tmp_path / "a")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(export, runs, exports, tmp_path, monkeypatch):
    to = tmp_path / "to"
    for name in ("torchvision", "timm"):
        export(runs("small"), "-o", to, "--format", name).refused(
            2, f"--format {name}: got a run of small, which can be safetensors"
        )
    export(runs("mobilenet"), "-o", to, "--format", "onnx", "timm").refused(2, "timm's are there for resnet18, resnet34")
    export(runs("small"), "-o", to, "--step", 7).refused(3, "no checkpoint of step 7. There are: 1, 2.")
    export(tmp_path, "-o", to).refused(3, "no run here")
    assert export(runs("small"), "-o", to, "--format", "pickle").code == 2
    for name in ("onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    export(runs("small"), "-o", to, "--format", "onnx").refused(
        2, "packages that are absent", "pip install onnxscript onnxruntime"
    )
    assert not to.exists()


def test_a_folder_with_something_in_it_is_not_written_to(export, runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for arguments in ([], ["--overwrite"]):
        export(runs("small"), "-o", tmp_path, *arguments).refused(2, "holds notes.txt, which is of no export")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    to = tmp_path / "to"
    to.mkdir()
    (to / "README.md").write_text("mine")
    export(runs("small"), "-o", to, "--overwrite").refused(2, "holds README.md, which is of no export")
    (to / "README.md").unlink()
    export(runs("small"), "-o", to, "--format", "torch").ok()
    export(runs("small"), "-o", to).refused(2, "holds an export", "--overwrite")
    export(runs("small"), "-o", to, "--overwrite").ok()
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "encoder.json", "encoder.safetensors"]


def test_an_export_that_is_killed_looks_like_none_and_is_made_again(export, runs, tmp_path, monkeypatch):
    to, write = tmp_path / "to", storage.write_atomic
    export(runs("small"), "-o", to).ok()
    for survives in range(3):
        left = itertools.count()

        def killed(uri: str, data: bytes, left=left, survives=survives) -> None:
            if next(left) == survives:
                raise KeyboardInterrupt
            write(uri, data)

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(storage, "write_atomic", killed)
            export(runs("small"), "-o", to, "--overwrite")
        with pytest.raises(DataError, match="no encoder here"):
            ssl_ray.load(to)
    export(runs("small"), "-o", to, "--overwrite").ok()
    ssl_ray.load(to)


def test_weights_that_are_not_finite_are_refused(export, runs, tmp_path):
    from safetensors.torch import save_file

    run = Path(shutil.copytree(runs("small"), tmp_path / "run"))
    at = run / "checkpoints" / json.loads((run / "latest.json").read_text())["checkpoint"] / "weights.safetensors"
    weights = load_file(at)
    weights["encoder.stem.0.weight"][:] = torch.nan
    save_file(weights, at)
    state = json.loads((at.parent / "state.json").read_text())
    (at.parent / "state.json").write_text(json.dumps(state | {"sha256": {}}))  # as those of older versions
    export(run, "-o", tmp_path / "to").refused(1, "NaN or infinity")
    assert not (tmp_path / "to").exists()
    export(run, "-o", tmp_path / "to", "--step", 1).ok()
    export(run, "-o", tmp_path / "to", "--overwrite").refused(1, "NaN or infinity")
    ssl_ray.load(tmp_path / "to")  # what was there is there
