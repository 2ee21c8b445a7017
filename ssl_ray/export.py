"""The encoder of a run as files that other programs load, with a model card.

    DIR/encoder.safetensors      our names (`encoder.*`), for ssl_ray.load and train.init_from
    DIR/torchvision.safetensors  the names of torchvision's model
    DIR/timm.safetensors, .json  those of timm's, and what it calls pretrained_cfg
    DIR/encoder.onnx             uint8 images to features
    DIR/encoder.pt2              likewise, of torch.export
    DIR/README.md                the model card
    DIR/encoder.json             what the encoder is made from; written last: without it nothing is an export

What computes is compared with the encoder that it is made from before it counts.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from ssl_ray import __version__, loading, shards, storage
from ssl_ray.config import Config, to_dict
from ssl_ray.errors import SslRayError, TrainingError, UsageError
from ssl_ray.model import PIXEL_MEAN, PIXEL_STD, torchvision_options
from ssl_ray.model_card import FILES, model_card
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import encoder_weights

ONNX_OPSET = 18
MAX_DIFFERENCE = 1e-4
"""Between a file that computes and its source, relative to the largest feature."""
TIMM = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""Models whose weights have the same names and meaning in timm."""
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_BYTES = 2**31
"""What one file of ONNX can hold."""
_CARD, _DESCRIPTION, _TIMM_JSON = "README.md", "encoder.json", "timm.json"


def export(
    run: str, output: str, *, formats: list[str], step: int | None, license: str | None, overwrite: bool
) -> dict[str, Any]:
    """Writes the encoder of the run at `run` to the folder or URI `output`; returns where it is and what is in it.

    formats: keys of model_card.FILES.  step: of the checkpoint; None: the newest committed one.
    license: of the model card, as Hugging Face abbreviates it; None: to be filled in.
    overwrite: an export that is there is replaced.
    Raises UsageError for a format that the encoder does not have, a package that is absent, or an `output` in which something
    is; DataError if there is no such checkpoint; SslRayError if a file computes something else than its source.
    """
    uri, to = storage.absolute(run), storage.absolute(output)
    record = runs.load_run(uri)
    config = runs.config_of(record, uri)
    _require_possible(config.model.encoder, formats)
    _require_room(to, overwrite=overwrite)
    name = runs.committed(uri, step=step)
    weights_at = storage.join(uri, "checkpoints", name, "weights.safetensors")
    shape = {"channels": config.views.channels, "size_px": config.views.size_px}
    encoder = loading.build(config.model.encoder, **shape, weights=encoder_weights(weights_at), source=weights_at)
    description = loading.description(config.model.encoder, **shape, num_features=encoder.num_features)
    description |= {"step": runs.checkpoint_step(name), "hash": record["hash"], "ssl_ray": __version__}
    probes = [_probe(encoder, description, n) for n in (1, 5)]
    for each in (_DESCRIPTION, _CARD, *FILES.values(), _TIMM_JSON):  # the first one first: what is half gone is no export
        storage.remove(storage.join(to, each))
    files: list[dict[str, Any]] = []
    try:
        for file, content, difference in _files(encoder, formats, description, probes):
            storage.write_atomic(storage.join(to, file), content)
            files.append({"file": file, "bytes": len(content), "difference": difference})
        card = _card(uri, record, config, encoder, description, formats=formats, license=license)
        for file, text in ((_CARD, card), (_DESCRIPTION, _json(description))):
            content = text.encode()
            storage.write_atomic(storage.join(to, file), content)
            files.append({"file": file, "bytes": len(content), "difference": None})
    except Exception:
        for written in files:
            with contextlib.suppress(SslRayError):
                storage.remove(storage.join(to, written["file"]))
        raise
    return {"written": output, "step": description["step"], "files": files}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1) + "\n"


def _require_possible(encoder: str, formats: list[str]) -> None:
    possible = [name for name in FILES if name != "timm" or encoder in TIMM]
    if encoder == "small":
        possible = [name for name in possible if name != "torchvision"]
    for name in formats:
        if name not in possible:
            which = f" timm's are there for {', '.join(TIMM)}." if name == "timm" else ""
            raise UsageError(f"--format {name}: got a run of {encoder}, which can be {', '.join(possible)}.{which}")
    absent = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None] if "onnx" in formats else []
    if absent:
        raise UsageError(f"--format onnx needs packages that are absent.\nRun: pip install {' '.join(absent)}")


def _require_room(to: str, *, overwrite: bool) -> None:
    ours = {_CARD, _DESCRIPTION, _TIMM_JSON, *FILES.values()}
    there = storage.list_names(to)
    # The card is written after all files but encoder.json: alone it is somebody's own.
    if foreign := sorted(set(there) - ours) or (there if there == [_CARD] else []):
        raise UsageError(f"{to}: holds {foreign[0]}, which is of no export. Use another folder.")
    if there and not overwrite:
        raise UsageError(f"{to}: holds an export, or what is left of one ({there[0]}). Use another folder, or --overwrite.")


# The files ----------------------------------------------------------------------------------------------------------------


Probe = tuple[Tensor, np.ndarray]
"""Images [n, C, H, W] and their features [n, D]."""


def _files(
    encoder: loading.Encoder, formats: list[str], description: dict[str, Any], probes: list[Probe]
) -> Iterator[tuple[str, bytes, float | None]]:
    """Name, content, and for those that compute the largest difference from the encoder."""
    program = functools.cache(functools.partial(_program, encoder, probes[-1][0][:2]))
    for name in formats:
        file = FILES[name]
        match name:
            case "safetensors":
                yield file, save(_contiguous(encoder.state_dict())), None
            case "torchvision":
                yield file, save(_three_channels(_body(encoder))), None
            case "timm":
                yield file, save(_contiguous(_body(encoder).state_dict())), None
                yield _TIMM_JSON, _json(_timm_config(description)).encode(), None
            case "onnx":
                content = _onnx(program(), encoder)
                yield file, content, _difference(file, _onnx_session(content), probes)
            case "torch":
                sink = io.BytesIO()
                torch.export.save(program(), sink)
                yield file, sink.getvalue(), _difference(file, _module(program()), probes)


def _probe(encoder: loading.Encoder, description: dict[str, Any], n: int) -> Probe:
    """n images of noise and their features. Raises TrainingError if these are not finite."""
    shape = (n, description["channels"], description["size_px"], description["size_px"])
    images = torch.from_numpy(np.random.default_rng(n).integers(0, 256, shape, np.uint8))
    with torch.inference_mode():
        h = encoder(images).numpy()
    if not np.isfinite(h).all():
        raise TrainingError("export: the encoder gives NaN or infinity. Its training diverged: export an earlier --step.")
    return images, h


def _difference(file: str, encode: Callable[[Tensor], np.ndarray], probes: list[Probe]) -> float:
    """The largest, absolute; raises SslRayError where it is more than MAX_DIFFERENCE of the largest feature."""
    found = 0.0
    for images, h in probes:
        largest = float(np.abs(encode(images) - h).max())
        if not largest <= MAX_DIFFERENCE * float(np.abs(h).max()):
            raise SslRayError(f"{file}: its features differ by {largest:.2g} from those of the run, expected rounding alone.")
        found = max(found, largest)
    return found


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in tensors.items()}


def _body(encoder: loading.Encoder) -> nn.Module:
    """torchvision's model, without its last layer."""
    body = encoder.encoder.body
    assert isinstance(body, nn.Module)
    return body


def _three_channels(body: nn.Module) -> dict[str, Tensor]:
    """The weights; those of a first layer for grey are dealt to three channels, for the same function of repeated ones."""
    tensors = body.state_dict()
    where, first = next((name, part) for name, part in body.named_modules() if isinstance(part, nn.Conv2d))
    if first.in_channels == 1:
        tensors[f"{where}.weight"] = first.weight.detach().repeat(1, 3, 1, 1) / 3
    return _contiguous(tensors)


def _timm_config(description: dict[str, Any]) -> dict[str, Any]:
    """As timm keeps it beside weights on Hugging Face; `crop_pct` 1: the shorter side is resized to the size itself."""
    channels, size = description["channels"], description["size_px"]
    pretrained = {
        "input_size": [channels, size, size],
        "mean": [PIXEL_MEAN] * channels,
        "std": [PIXEL_STD] * channels,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "num_classes": 0,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    features = {"architecture": description["encoder"], "num_classes": 0, "num_features": description["num_features"]}
    return features | {"pretrained_cfg": pretrained}


def _program(encoder: loading.Encoder, images: Tensor) -> torch.export.ExportedProgram:
    """For any number of images; of a copy, since channels_last weights are none that torch.export saves without a warning."""
    plain = copy.deepcopy(encoder).to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        return torch.export.export(plain, (images,), dynamic_shapes={"images": {0: torch.export.Dim("n")}})


def _module(program: torch.export.ExportedProgram) -> Callable[[Tensor], np.ndarray]:
    module = program.module()
    return lambda images: module(images).detach().numpy()


def _onnx(program: torch.export.ExportedProgram, encoder: nn.Module) -> bytes:
    size = sum(value.nbytes for value in encoder.state_dict().values())
    if size >= _ONNX_BYTES:
        raise UsageError(f"--format onnx: the weights have {size:,} bytes, and a file of ONNX holds 2 GiB. Use torch.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of what its next version will do
        made = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["features"],
            opset_version=ONNX_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    return made.model_proto.SerializeToString()


def _onnx_session(content: bytes) -> Callable[[Tensor], np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]


# The card -----------------------------------------------------------------------------------------------------------------


def _card(
    uri: str,
    record: dict[str, Any],
    config: Config,
    encoder: loading.Encoder,
    description: dict[str, Any],
    *,
    formats: list[str],
    license: str | None,
) -> str:
    name, step = config.model.encoder, description["step"]
    options: dict[str, object] = {}
    stem = classifier = None
    if name != "small":
        body, classifier = _body(encoder), str(encoder.encoder.classifier)
        options = torchvision_options(name, size_px=config.views.size_px)
        if isinstance(getattr(body, "maxpool", None), nn.Identity):  # build_encoder's stem for small images
            width = body.get_submodule("conv1").out_channels
            stem = (
                f"model.conv1 = torch.nn.Conv2d({{channels}}, {width}, 3, padding=1, bias=False)  # for small images\n"
                "model.maxpool = torch.nn.Identity()"
            )
    protocols = storage.join(uri, "evaluations", "protocols")
    results = storage.list_names(protocols)
    found = [runs.evaluation_uri(uri, None), runs.evaluation_uri(uri, step)]
    return model_card(
        encoder=description,
        formats=formats,
        torchvision_options=options,
        stem=stem,
        classifier=classifier,
        facts=_facts(uri, record, config, step),
        readouts=[runs.read_json(at) for at in found if storage.exists(at)],
        judged=[runs.read_json(storage.join(protocols, each)) for each in results if each.startswith(f"{step:010d}-")],
        recipe=to_dict(config),
        license=license,
    )


def _facts(uri: str, record: dict[str, Any], config: Config, step: int) -> dict[str, object]:
    """Of the training up to this step, for the card."""
    data = config.data
    steps = [each for each in runs.read_metrics(uri) if each["step"] < step]
    minutes = sum(each["seconds"] for each in steps) / 60
    seen = sum(each["images"] for each in steps)
    return {
        "data": f"`{data.uri}`",
        "images": _num_images(data.uri, record["identity"].get("data.digest")),
        "digest of the manifest": record["identity"].get("data.digest"),
        "fraction used": data.fraction,
        "held out for read-outs": f"`{data.eval_uri}`" if data.eval_uri else data.eval_fraction,
        "steps": f"{step:,} of {config.train.batch} images, {config.views.count} views of each ({seen:,} images seen)",
        "minutes": f"{minutes:.1f} (steps alone)",
        "workers": f"{config.train.workers}, of {config.train.threads} thread(s); the run does not record its machine",
        "seed": config.seed,
        "hash of the configuration": record["hash"],
        "versions": f"trained by ssl_ray {record.get('ssl_ray')}; exported by {__version__} with torch {torch.__version__}",
    }


def _num_images(uri: str, digest: str | None) -> int | None:
    """None where the data is no longer there, or is other data."""
    with contextlib.suppress(SslRayError):
        manifest = shards.load_manifest(uri)
        return manifest.num_samples if manifest.digest == digest else None
    return None
