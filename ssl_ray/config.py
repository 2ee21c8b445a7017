"""The configuration of a run: frozen dataclasses, checked when they are made; the only home of every default.

*Identity* is what changes results (data, views, model, loss, optimisation, batch, lanes, seed): it is hashed, and a
run URI belongs to one identity. The fields named in ``EXECUTION`` (workers, cadence, logging) may change at every restart.
Imports neither torch nor Ray.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import re
import types
import typing
from types import NoneType
from typing import Any, Literal

from ssl_ray.errors import UsageError
from ssl_ray.masking import without_secrets

MAX_LANES = 64


def _check(ok: bool, key: str, got: object, expected: str) -> None:
    if not ok:
        raise UsageError(f"{key}: got {got}, expected {expected}.")


def _check_probabilities(section: str, values: dict[str, float | tuple[float, ...]]) -> None:
    for name, value in values.items():
        each = value if isinstance(value, tuple) else (value,)
        _check(bool(each) and all(0 <= p <= 1 for p in each), f"{section}.{name}", value, "probabilities from 0 to 1")


def _check_range(key: str, value: tuple[float, float], low: float, high: float) -> None:
    ok = low < value[0] <= value[1] <= high and math.isfinite(value[1])
    _check(ok, key, list(value), f"two increasing numbers above {low:g}" + (f", up to {high:g}" * math.isfinite(high)))


def check_label(key: str, value: str | None) -> None:
    """Raises UsageError where it is no label of Ray's nodes."""
    part = r"[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?"
    ok = value is None or re.fullmatch(rf"({part}/)?{part}={part}", value, re.ASCII) is not None
    _check(ok, key, value, "KEY=VALUE, as ssl-ray/role=data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    uri: str = "digits"
    """Shards to train on: a folder or URI with a manifest (see `ssl-ray data pack|index`), or `digits` (built in)."""
    fraction: float = 1.0
    """Share of the training samples to use, above 0 up to 1; nested: a smaller fraction is inside every larger one."""
    balanced: bool = False
    """Take the fraction from every class alike (the samples must have labels)."""
    eval_uri: str | None = None
    """Shards of held-out images for the read-outs; null: `eval_fraction` of `uri` is held out by key hash."""
    eval_fraction: float = 0.1
    """Share of `uri` held out for evaluation where `eval_uri` is null, above 0 and below 1."""
    max_bad_samples: int = 0
    """Distinct undecodable samples to replace and report before the run stops."""
    cache_dir: str | None = None
    """Local folder of each machine in which shards of remote storage are kept once read; null: nowhere."""
    cache_bytes: int = 50 * 10**9
    """Bytes that may be kept there, or as many as the disk has; then what was used longest ago goes."""
    label: str | None = None
    """Make the views on nodes of the cluster that have this label of Ray's, as `ssl-ray/role=data`; null: on any."""

    def __post_init__(self) -> None:
        _check(0 < self.fraction <= 1, "data.fraction", self.fraction, "a number above 0, up to 1")
        _check(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "a number above 0, below 1")
        _check(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        _check(self.cache_dir is None or "://" not in self.cache_dir, "data.cache_dir", self.cache_dir, "a local folder, or null")
        _check(self.cache_bytes >= 1, "data.cache_bytes", self.cache_bytes, "1 or more")
        check_label("data.label", self.label)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """Augmentation. A probability may be a list, over which the views cycle: [1.0, 0.1] blurs view 0 always, view 1 rarely."""

    count: int = 4
    """Views per image, m."""
    size_px: int = 32
    """Height and width of a view."""
    channels: Literal[1, 3] = 3
    """3: RGB, grey images are repeated; 1: grey, colour images are converted."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the crop as a share of the image's."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop."""
    flip: float | tuple[float, ...] = 0.5
    """Probability of a horizontal flip."""
    jitter: float | tuple[float, ...] = 0.8
    """Probability of the four colour changes below."""
    brightness: float = 0.4
    """Brightness times a factor from max(0, 1 - x) to 1 + x."""
    contrast: float = 0.4
    """Likewise contrast."""
    saturation: float = 0.4
    """Likewise saturation."""
    hue: float = 0.1
    """Rotation of hue from -x to x of a full turn, 0 to 0.5."""
    grayscale: float | tuple[float, ...] = 0.2
    """Probability of grey."""
    blur: float | tuple[float, ...] = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of the view."""
    solarize: float | tuple[float, ...] = 0.0
    """Probability of inverting every value of 128 and above."""
    photometric_on: Literal["data", "worker"] = "data"
    """Where colours, blur and solarisation are made: with the crops, or on the device of the worker that trains on them."""

    def __post_init__(self) -> None:
        _check(2 <= self.count <= 1024, "views.count", self.count, "2 to 1024")
        _check(4 <= self.size_px <= 4096, "views.size_px", self.size_px, "4 to 4096")
        _check_range("views.crop_scale", self.crop_scale, 0, 1)
        _check_range("views.crop_ratio", self.crop_ratio, 0, math.inf)
        _check_range("views.blur_sigma", self.blur_sigma, 0, math.inf)
        names = ("flip", "jitter", "grayscale", "blur", "solarize")
        _check_probabilities("views", {name: getattr(self, name) for name in names})
        for name in ("brightness", "contrast", "saturation"):
            _check(0 <= getattr(self, name) < math.inf, f"views.{name}", getattr(self, name), "0 or more")
        _check(0 <= self.hue <= 0.5, "views.hue", self.hue, "0 to 0.5")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    encoder: str = "small"
    """`small` (a residual encoder for CPUs, 128 features) or the name of a torchvision classification model."""
    projector_dim: int = 256
    """d: dimensions of the embedding z."""
    projector_width: int | None = None
    """Width of the projector's hidden layers; null: d."""
    projector_depth: int = 2
    """Linear layers of the projector."""
    projector_norm: Literal["batch", "layer", "none"] = "batch"
    """Normalisation after each hidden layer of the projector."""
    batch_norm: Literal["global", "local"] = "global"
    """Batch statistics over all workers (any worker count gives the same run) or over each worker's share alone."""

    def __post_init__(self) -> None:
        _check(2 <= self.projector_dim <= 2**16, "model.projector_dim", self.projector_dim, f"2 to {2**16}")
        width = self.projector_width
        _check(width is None or 1 <= width <= 2**16, "model.projector_width", width, f"1 to {2**16}, or null")
        _check(1 <= self.projector_depth <= 8, "model.projector_depth", self.projector_depth, "1 to 8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    name: Literal["barlow_twins", "vicreg", "spectral"] = "barlow_twins"
    """Each for any number of views: Barlow Twins, VICReg, spectral contrastive."""
    form: Literal["mean", "pairs", "classic"] = "mean"
    """Barlow Twins only. mean: of the mean embedding; pairs: the unbiased mean over pairs of views; classic: two views."""
    beta: float | Literal["auto"] = "auto"
    """Barlow Twins' weight of the off-diagonal; auto: 2.8 / projector_dim."""
    invariance: float = 25.0
    """VICReg's weight of the distance between views."""
    variance: float = 25.0
    """VICReg's weight of the variance hinge."""
    covariance: float = 1.0
    """VICReg's weight of the covariance."""

    def __post_init__(self) -> None:
        beta = self.beta
        _check(beta == "auto" or 0 < beta < math.inf, "loss.beta", beta, "a number above 0, or auto")
        for name in ("invariance", "variance", "covariance"):
            _check(0 <= getattr(self, name) < math.inf, f"loss.{name}", getattr(self, name), "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    name: Literal["adam", "adamw", "sgd", "lars", "muon"] = "adam"
    """sgd and lars with momentum 0.9; muon goes furthest in few steps, which are long where encoder or projector is large."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-6
    """Part of the gradient with adam, sgd and lars; adamw and muon take it off the weights instead."""
    warmup_epochs: float = 0.5
    """Epochs over which the learning rate rises to its peak; then it falls to 0 along a cosine."""

    def __post_init__(self) -> None:
        _check(0 < self.lr < math.inf, "optim.lr", self.lr, "a number above 0")
        _check(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        _check(0 <= self.warmup_epochs < math.inf, "optim.warmup_epochs", self.warmup_epochs, "0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """As many workers as the cluster has room for at each start of them."""

    min: int
    max: int

    def __str__(self) -> str:
        return f"{{min: {self.min}, max: {self.max}}}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    batch: int = 128
    """G: images in a global batch, whatever the number of workers."""
    epochs: int = 10
    """Passes over the selected samples."""
    steps: int | None = None
    """Stop after so many steps; null: after `epochs`. The learning rate's schedule ends there too."""
    lanes: int | None = None
    """L: lanes that the batch is dealt in, a divisor of `batch`; no more workers than lanes. null: the largest up to 64."""
    bf16: bool = False
    """Forward and backward in bfloat16 autocast; the loss stays in float32."""
    init_from: str | None = None
    """Start from the weights of this run, checkpoint or safetensors file instead of random ones."""
    workers: int | Workers = 2
    """Ray Train workers; {min: 1, max: 4}: as many as the cluster has room for; 0 trains in this process without Ray."""
    threads: int = 1
    """CPU threads of one worker's tensor operations. Recorded: another number changes the order of sums."""
    digest: bool = False
    """Add a digest of the views to each step's record."""
    label: str | None = None
    """Put the workers on nodes of the cluster that have this label of Ray's, as `ssl-ray/role=train`; null: on any."""
    pack: bool | None = None
    """Workers on as few nodes as have room for them, or spread over as many as there are; null: few where they have GPUs."""
    stall_s: float = 300.0
    """Start the workers again when one of them is at the same part of a step for so many seconds."""

    def __post_init__(self) -> None:
        _check(2 <= self.batch <= 2**24, "train.batch", self.batch, f"2 to {2**24}")
        _check(self.epochs >= 1, "train.epochs", self.epochs, "1 or more")
        _check(self.steps is None or self.steps >= 1, "train.steps", self.steps, "1 or more, or null")
        _check(1 <= self.threads <= 1024, "train.threads", self.threads, "1 to 1024")
        if isinstance(self.workers, Workers):
            ok = 1 <= self.workers.min <= self.workers.max
            _check(ok, "train.workers", self.workers, "min of 1 or more, and max not below it")
        _check(self.most_workers() >= 0, "train.workers", self.workers, "0 or more")
        _check(1 <= self.stall_s < math.inf, "train.stall_s", self.stall_s, "1 or more")
        check_label("train.label", self.label)
        if self.lanes is not None:
            ok = self.lanes >= 1 and self.batch % self.lanes == 0
            divisors = [n for n in range(1, math.isqrt(self.batch) + 1) if self.batch % n == 0]
            nearest = min([*divisors, *(self.batch // n for n in divisors)], key=lambda n: abs(n - (self.lanes or 0)))
            _check(ok, "train.lanes", self.lanes, f"a divisor of train.batch={self.batch}, for example {nearest}")
        if self.most_workers() > self.num_lanes():
            raise UsageError(
                f"train.workers: got {self.most_workers()}, but train.batch={self.batch} is dealt in {self.num_lanes()} lanes "
                "and each worker needs one. Use fewer workers, or set train.lanes to a larger divisor of train.batch."
            )

    def fewest_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    def most_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers

    def num_lanes(self) -> int:
        """L: `lanes`, or the largest divisor of the batch up to MAX_LANES."""
        return self.lanes or max(n for n in range(1, min(self.batch, MAX_LANES) + 1) if self.batch % n == 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    every_epochs: int = 0
    """Read-outs every so many epochs while training; 0: only at the end."""
    every_steps: int | None = None
    """Read-outs every so many steps instead; null: by epochs."""
    max_images: int = 20000
    """At most so many labelled training images for the read-outs."""

    def __post_init__(self) -> None:
        _check(self.every_epochs >= 0, "evaluate.every_epochs", self.every_epochs, "0 or more")
        every = self.every_steps
        _check(every is None or every >= 1, "evaluate.every_steps", every, "1 or more, or null")
        _check(self.max_images >= 10, "evaluate.max_images", self.max_images, "10 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every_steps: int | None = None
    """A checkpoint every so many steps; null: only by time, at evaluations and at the end."""
    every_s: float = 60.0
    """A checkpoint after so many seconds without one."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best one."""

    def __post_init__(self) -> None:
        every = self.every_steps
        _check(every is None or every >= 1, "checkpoint.every_steps", every, "1 or more, or null")
        _check(self.every_s > 0, "checkpoint.every_s", self.every_s, "a number above 0")
        _check(self.keep >= 1, "checkpoint.keep", self.keep, "1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    run: str | None = None
    """Folder or URI of the run; null: runs/NAME-HASH, after the data and the identity."""
    seed: int = 0
    """Everything random follows from it; 0 to 2**32 - 1."""
    data: Data = Data()
    views: Views = Views()
    model: Model = Model()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        places = {"run": self.run, "data.uri": self.data.uri, "data.eval_uri": self.data.eval_uri}
        for key, uri in (places | {"train.init_from": self.train.init_from}).items():  # they are kept in run.json, and logged
            safe = without_secrets(uri or "")
            _check(safe == (uri or ""), key, safe, "no password or signature in it: environment and AWS files have them")
        if self.loss.form == "classic" and self.loss.name == "barlow_twins" and self.views.count != 2:
            raise UsageError(
                f"loss.form: classic compares two views, but views.count is {self.views.count}. "
                "Set views.count=2, or loss.form=pairs, which is the same idea for any number of views."
            )


# Keys that may change when a run is resumed: they do not change what it computes (threads only the order of sums; data
# may move, since a run is tied to the digest of its manifest; with more bad samples allowed it goes on where it had ended).
EXECUTION = frozenset(
    {
        "run",
        "data.uri",
        "data.eval_uri",
        "data.cache_dir",
        "data.cache_bytes",
        "data.max_bad_samples",
        "data.label",
        "train.workers",
        "train.threads",
        "train.digest",
        "train.label",
        "train.pack",
        "train.stall_s",
        "evaluate.every_epochs",
        "evaluate.every_steps",
    }
    | {f"checkpoint.{field.name}" for field in dataclasses.fields(Checkpoint)}
)


def to_dict(config: Config) -> dict[str, Any]:
    """The nested plain values of `config`, as JSON and YAML hold them."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{'loss': {'beta': 1}} -> {'loss.beta': 1}; one level, since the value of a key may be a mapping."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {str(key): value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{'loss.beta': 1} -> {'loss': {'beta': 1}}: the inverse of flatten."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def identity(config: Config) -> dict[str, Any]:
    """The flat keys and values that decide the results of a run."""
    return {key: value for key, value in flatten(to_dict(config)).items() if key not in EXECUTION}


def canonical_hash(values: dict[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `values`: sorted keys, no spaces."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def describe() -> list[dict[str, Any]]:
    """For each key: its type, default, whether it belongs to the identity, and the sentence under it in this file."""
    rows = []
    for key, default in _default_keys().items():
        section, _, name = key.rpartition(".")
        holder: type = type(getattr(Config(), section)) if section else Config
        kind, sentence = _fields(holder)[name]
        rows.append({"key": key, "type": kind, "default": default, "identity": key not in EXECUTION, "help": sentence})
    return rows


@functools.cache
def _fields(holder: type) -> dict[str, tuple[str, str | None]]:
    """The annotation of each field of a dataclass here and the sentence under it, as they are written."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(holder)).body[0].body  # type: ignore[attr-defined]
    found = {}
    for node, after in itertools.zip_longest(body, body[1:]):
        if isinstance(node, ast.AnnAssign):
            is_sentence = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[ast.unparse(node.target)] = (ast.unparse(node.annotation), after.value.value if is_sentence else None)
    return found


def _default_keys() -> dict[str, Any]:
    return flatten(to_dict(Config()))


def _to_workers(given: Any) -> Workers:
    """{min: 1, max: 4}, as YAML or its mapping."""
    import yaml

    value = yaml.safe_load(given) if isinstance(given, str) else given
    if not isinstance(value, dict) or value.keys() != {"min", "max"} or {type(each) for each in value.values()} != {int}:
        raise ValueError("not of the form {min: N, max: N}")
    return Workers(**value)


def _parser():
    import jsonargparse

    # Without this a value could be the path of a class, whose module would be imported.
    jsonargparse.typing.register_type(Workers, str, _to_workers, fail_already_registered=False)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(Config)
    return parser


def build(values: dict[str, Any], overrides: list[str] | tuple[str, ...] = (), source: str = "configuration") -> Config:
    """A checked Config from nested `values` (a recipe, a run's record) and `overrides` of the form a.b=c, which win.

    Raises UsageError that names the key, what was got and what was expected.
    """
    known = _default_keys()
    sections = {key.split(".")[0] for key in known if "." in key}
    flat = flatten({key: value for key, value in values.items() if value is not None or key not in sections})
    texts: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.removeprefix("--")
        if not equals:
            raise UsageError(f"{override}: not understood. Options are given as KEY=VALUE, for example views.count=8.")
        if not text:
            raise UsageError(f"{key}: no value was given, expected {key}=VALUE; null stands for none.")
        texts[key] = text
    for key in [*flat, *texts]:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or [
                k for k in known if k.split(".")[-1] == key.split(".")[-1]
            ]
            where = source if key in flat else "command line"
            hint = f" Did you mean {near[0]}?" if near else " `ssl-ray config show` lists all keys."
            if key in sections:
                hint = f" It is a section: give one of its keys, for example {next(k for k in known if k.startswith(key + '.'))}."
            raise UsageError(f"{key}: no such key ({where}).{hint}")
    return _instantiate(flat, texts)


def _instantiate(flat: dict[str, Any], texts: dict[str, str]) -> Config:
    nested = nest(flat | texts)
    parser = _parser()
    try:
        made = parser.instantiate(parser.parse_object(nested))
        return Config(**vars(made))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(_readable(error, {**flat, **texts})) from error


def _readable(error: Exception, given: dict[str, Any]) -> str:
    """One line from jsonargparse's several: the key, what was got, which types were expected."""
    text = str(error)
    key = text.partition('"')[2].partition('"')[0]
    if key in given:
        section, _, name = key.rpartition(".")
        holder = type(getattr(Config(), section)) if section else Config
        kind = next(field.type for field in dataclasses.fields(holder) if field.name == name)
        return f"{key}: got {given[key]!r}, expected {_in_words(kind)}."
    return " ".join(text.split())


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Workers: "{min: N, max: N}",
}


def _in_words(kind: Any) -> str:
    """A field's type as a user knows its values: `int | None` is `a whole number, or null`."""
    of = typing.get_args(kind)
    match typing.get_origin(kind):
        case types.UnionType | typing.Union:
            return ", or ".join(map(_in_words, of))
        case typing.Literal:
            return " or ".join(map(str, of))
        case _ if typing.get_origin(kind) is tuple:
            return "a list of numbers" if Ellipsis in of else f"a list of {len(of)} numbers"
    return _WORDS[kind]
