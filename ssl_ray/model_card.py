"""README.md of an exported encoder, as Hugging Face reads it: what it is, how to load each file, what it was trained on."""

from typing import Any

from ssl_ray.errors import in_line

FILES = {
    "safetensors": "encoder.safetensors",
    "torchvision": "torchvision.safetensors",
    "timm": "timm.safetensors",
    "onnx": "encoder.onnx",
    "torch": "encoder.pt2",
}
"""The file of each format."""


def model_card(
    *,
    encoder: dict[str, Any],
    formats: list[str],
    torchvision_options: dict[str, object],
    stem: str | None,
    classifier: str | None,
    facts: dict[str, object],
    readouts: list[dict[str, Any]],
    judged: list[dict[str, Any]],
    recipe: dict[str, Any],
    license: str | None,
) -> str:
    """Markdown with YAML front matter.

    encoder: as in encoder.json.  torchvision_options, stem, classifier: arguments of torchvision's model, the line that
    changes what comes before its first block, the name of its last layer; `small` has none.
    facts: of the training, by name; None where the run does not have it.  readouts: as in RUN/evaluations.
    judged: the results of protocols, as in RUN/evaluations/protocols.
    recipe: the configuration, nested.
    """
    name, size, channels = encoder["encoder"], encoder["size_px"], encoder["channels"]
    use = [_USE[each] for each in formats if each in _USE]
    normal = f"/ 255 - {encoder['pixel_mean']}) / {encoder['pixel_std']}"
    if "torchvision" in formats:
        options = ", ".join(f"{key}={value!r}" for key, value in torchvision_options.items())
        made = f"models.{name}({options})"
        use.append(_torchvision(name, made=made, stem=stem, classifier=classifier, channels=channels, normal=normal))
    if "timm" in formats:
        use.append(_timm(name, stem=stem, channels=channels, normal=normal))
    licence = "unknown: fill in" if license is None else in_line(license)
    parts = [
        _front(name, license=license, loss=recipe["loss"]["name"]),
        f"# {name}, {size} px, self-supervised",
        _WHAT.format(kind="grey" if channels == 1 else "RGB", licence=licence, **encoder),
        f"## Use\n\n`images` below is a uint8 tensor [n, {channels}, {size}, {size}].",
        *use,
        "## Training",
        "\n".join(f"- {key}: {in_line(str(value))}" for key, value in facts.items() if value is not None),
        "## Read-outs",
        _readouts(readouts),
        *([_judged(judged)] if judged else []),
        f"## Recipe\n\n```yaml\n{_yaml(recipe)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6)


def _front(name: str, *, license: str | None, loss: str) -> str:
    tags = ["self-supervised-learning", "image-feature-extraction", loss.replace("_", "-"), name]
    # `unknown` is a word of Hugging Face's list of licences.
    first = "license: unknown # fill in\n" if license is None else _yaml({"license": license})
    return f"---\n{first}{_yaml({'library_name': 'ssl-ray', 'pipeline_tag': 'image-feature-extraction', 'tags': tags})}---"


_WHAT = """\
An encoder of {kind} images, trained without labels by ssl_ray, with many views of each image and a small projector
([arXiv 2312.10725](https://arxiv.org/abs/2312.10725)): {num_features} features of an image. The projector is not in it, nor a
classifier. Licence: {licence}.

An image is resized (bilinear, antialiased) until its shorter side has {size_px} px, and the centre is cut out; pixels x, 0 to
255, become (x / 255 - {pixel_mean}) / {pixel_std} in every channel. `encoder.json` says the same for programs."""

_USE = {
    "safetensors": """\
`encoder.safetensors`: with ssl_ray, which resizes and normalises

```python
import ssl_ray

encoder, preprocess = ssl_ray.load(".")  # this folder
features = encoder(preprocess(["image.jpg"]))  # float32 [1, D]; also bytes, images of Pillow, uint8 arrays [C, H, W]
```""",
    "onnx": """\
`encoder.onnx` (opset 18): normalises inside

```python
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx", providers=["CPUExecutionProvider"])
features = session.run(None, {"images": images.numpy()})[0]
```""",
    "torch": """\
`encoder.pt2`: with torch alone, normalises inside

```python
import torch

encoder = torch.export.load("encoder.pt2").module()
features = encoder(images)
```""",
}


def _torchvision(name: str, *, made: str, stem: str | None, classifier: str | None, channels: int, normal: str) -> str:
    grey = " Grey images are repeated: `images.repeat(1, 3, 1, 1)`." if channels == 1 else ""
    given = "images.repeat(1, 3, 1, 1)" if channels == 1 else "images"
    return f"""\
`torchvision.safetensors`: the names of torchvision's {name}, whose last layer `{classifier}` is not in it.{grey}

```python
import torch
from safetensors.torch import load_file
from torchvision import models

model = {made}
{_stem(stem, channels=3)}model.load_state_dict(load_file("torchvision.safetensors"), strict=False)
model.set_submodule("{classifier}", torch.nn.Identity())
features = model.eval()(({given} {normal})
```"""


def _timm(name: str, *, stem: str | None, channels: int, normal: str) -> str:
    return f"""\
`timm.safetensors`: the names of timm's {name}; `timm.json` has its `pretrained_cfg`

```python
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

pretrained_cfg = json.loads(Path("timm.json").read_text())["pretrained_cfg"]
model = timm.create_model("{name}", num_classes=0, in_chans={channels}, pretrained_cfg=pretrained_cfg)
{_stem(stem, channels=channels)}model.load_state_dict(load_file("timm.safetensors"))
features = model.eval()((images {normal})
```"""


def _stem(stem: str | None, *, channels: int) -> str:
    return "" if stem is None else stem.format(channels=channels) + "\n"


def _readouts(readouts: list[dict[str, Any]]) -> str:
    if not readouts:
        return "None were made of this checkpoint (`ssl-ray evaluate RUN --step N`)."
    rows = ["| encoder | linear | kNN | alpha | RankMe | labelled images | judged on |", "|---|---|---|---|---|---|---|"]
    for each in readouts:
        numbers = [each[key] for key in ("linear_accuracy", "knn_accuracy", "alpha", "rankme")]
        cells = ["untrained" if each["step"] is None else f"step {each['step']}"]
        cells += ["-" if number is None else f"{number:.4g}" for number in numbers]
        rows.append(f"| {' | '.join([*cells, str(each['num_train']), str(each['num_test'])])} |")
    version = readouts[0].get("protocol", {}).get("version")
    return "\n".join([f"By ssl_ray's protocol {version}, on images of the training data or its held-out set.\n", *rows])


def _judged(results: list[dict[str, Any]]) -> str:
    rows = ["| protocol | measure | value | 95 % interval | trained on | judged on | of |", "|---|---|---|---|---|---|---|"]
    for result in results:
        name = f"{result['protocol']['name']}, version {result['protocol']['version']}"
        for measure, found in _measures(result):
            interval = "-" if found.get("interval") is None else "{:.4g} to {:.4g}".format(*found["interval"])
            counts = (found.get("num_train", result["num_train"]), result["num_test"], f"`{in_line(result['test']['uri'])}`")
            rows.append(f"| {name} | {measure} | {found['value']:.4g} | {interval} | {counts[0]} | {counts[1]} | {counts[2]} |")
    return "\n".join(["By named protocols (`ssl-ray evaluate RUN PROTOCOL`):\n", *rows])


def _measures(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names of the numbers of a result, which have `value` and `interval`."""
    found = [(name, value) for name, value in result.items() if isinstance(value, dict) and value.get("value") is not None]
    found += [(f"top1, {each['images_per_class']} images a class", each) for each in result.get("shots", [])]
    for each in result.get("fractions", []):
        found.append((f"top1, {each['fraction']:.4g} of the labels", each["top1"] | {"num_train": each["num_train"]}))
    return found
