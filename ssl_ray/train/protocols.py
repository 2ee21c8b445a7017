"""Named protocols on the weights of a run: features of images in one or several views, numbers in RUN/evaluations/protocols/."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ssl_ray import __version__, shards, storage
from ssl_ray.config import Config, canonical_hash
from ssl_ray.each import Each, in_turn
from ssl_ray.errors import DataError, UsageError
from ssl_ray.evaluate import features, protocols
from ssl_ray.evaluate.finetune import EPOCHS, finetuned, label_share
from ssl_ray.evaluate.images import Chosen, augmented_images, choose
from ssl_ray.evaluate.pictures import confusion_picture
from ssl_ray.evaluate.protocols import PROTOCOLS, VIEWS
from ssl_ray.evaluate.readout import adam_scores, logistic_scores
from ssl_ray.evaluate.scores import classified
from ssl_ray.model import Network
from ssl_ray.shards import Manifest
from ssl_ray.train import runs
from ssl_ray.train.readouts import find_checkpoint, frozen_network, gathered, parts, plain_features

FORMAT_VERSION = 1
MAX_TRAIN_IMAGES = 2_000_000

Features = tuple[np.ndarray, np.ndarray | None, int]
"""h [n, ...], labels [n] or None, and how many images could not be read."""


def evaluate_protocols(
    uri: str,
    names: Sequence[str],
    *,
    step: int | None = None,
    untrained: bool = False,
    data_uri: str | None = None,
    test_uri: str | None = None,
    seeds: int = 1,
    each: Each = in_turn,
) -> list[dict[str, Any]]:
    """The results of the protocols `names` for the weights that `find_checkpoint` finds, as docs/formats.md has them.

    Writes each to RUN/evaluations/protocols/ when it is done.
    data_uri: trains the read-outs; None: the data of the run.  test_uri: judges them; None: what the run is judged on, or with
    data_uri the held-out share of that.  seeds: what is random is repeated with the seeds 0 to seeds - 1.
    each: how the images are gone through, some hundreds at a time; with the same results whichever way.
    Raises UsageError for an unknown protocol, DataError where labels are needed and are not there.
    """
    for name in names:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(PROTOCOLS)}."
            raise UsageError(f"{name}: no such protocol. {hint}")
    torch.set_num_threads(1)
    run, checkpoint = find_checkpoint(uri, step=step, untrained=untrained)
    record = runs.load_run(run)
    config = runs.config_of(record, run)
    used = dataclasses.replace(
        config.data,
        uri=config.data.uri if data_uri is None else shards.located(data_uri),
        eval_uri=shards.located(test_uri) if test_uri is not None else config.data.eval_uri if data_uri is None else None,
    )
    manifest = shards.load_manifest(used.uri)
    eval_manifest = None if used.eval_uri is None else shards.load_manifest(used.eval_uri)
    train, test = choose(manifest, eval_manifest, held_out=used.eval_fraction, max_images=MAX_TRAIN_IMAGES)
    needing = [name for name in names if name not in protocols.WITHOUT_LABELS]
    if needing and (train.labels is None or test.labels is None or len(np.unique(train.labels)) < 2):
        raise DataError(f"{used.uri}: {needing[0]} needs labels of two classes or more, of training and of test images.")
    storage.require_writable(storage.join(run, "evaluations"))
    frozen = _Frozen(frozen_network(run, config, checkpoint=checkpoint), config, train, test, each)
    at = None if checkpoint is None else runs.checkpoint_step(checkpoint)
    about = {
        "step": at,
        "checkpoint": checkpoint,
        "config_hash": record["hash"],
        "train": _data_record(manifest, held_out=used.eval_fraction if eval_manifest is None else None),
        "test": _data_record(eval_manifest or manifest, held_out=used.eval_fraction if eval_manifest is None else None),
    }
    elsewhere = (data_uri, test_uri) != (None, None)
    suffix = f"-{canonical_hash({name: about[name]['digest'] for name in ('train', 'test')})[:8]}" if elsewhere else ""
    results = []
    for name in names:
        found, random = _results(name, frozen, range(seeds))
        protocol = {"name": name} | PROTOCOLS[name]
        result = {"format_version": FORMAT_VERSION, "protocol": protocol} | about | {"seeds": list(random)} | found
        result |= {"ssl_ray": __version__}
        runs.write_json(runs.protocol_uri(run, at, f"{name}{suffix}"), result)
        results.append(result)
    return results


def draw_confusion(result: dict[str, Any]) -> bytes:
    """A PNG of the confusion matrix of a result. Raises UsageError if its protocol has none."""
    name = result["protocol"]["name"]
    if "confusion" not in result:
        raise UsageError(f"{name} has no confusion matrix. The protocols that have one: linear, linear-plain, knn, logreg.")
    top1 = result["top1"]["value"]
    title = f"{name}: top-1 {100 * top1:.1f} % of {result['num_test']:,} images; % of each true class"
    return confusion_picture(np.array(result["confusion"]), [row["class"] for row in result["per_class"]], title)


def _data_record(manifest: Manifest, *, held_out: float | None) -> dict[str, Any]:
    return {"uri": manifest.uri, "digest": manifest.digest, "excluded": shards.bad_digest(manifest), "held_out": held_out}


@dataclasses.dataclass
class _Frozen:
    """An encoder, and the images on which it is judged."""

    network: Network
    config: Config
    train: Chosen
    test: Chosen
    each: Each

    @functools.cached_property
    def plain(self) -> tuple[Features, Features]:
        """Of training and of test images: made once, however many protocols want them."""
        train, test = (plain_features(self.network, chosen, self.config, self.each) for chosen in (self.train, self.test))
        return train, test

    def averaged(self, seed: int) -> tuple[Features, Features]:
        """Averages over VIEWS views of each image, the plain one among them."""
        call = functools.partial(self._of_views, _mean_features, count=VIEWS - 1, seed=seed, plain=True)
        train, test = (call(chosen) for chosen in (self.train, self.test))
        return train, test

    def several(self, seed: int) -> Features:
        """h [n, q, D] of LIDAR_VIEWS augmented views of LIDAR_IMAGES test images."""
        chosen = _some(self.test, protocols.LIDAR_IMAGES)
        return self._of_views(_view_features, chosen, count=protocols.LIDAR_VIEWS, seed=seed, plain=False)

    def _of_views(self, call: Callable[..., Any], chosen: Chosen, *, count: int, seed: int, plain: bool) -> Features:
        call = functools.partial(call, self.network, chosen, self.config, count, seed, plain)
        return gathered(self.each(call, parts(chosen)), chosen)


def _some(chosen: Chosen, count: int) -> Chosen:
    """`count` of the samples, evenly spaced in the order of their data set."""
    some = np.unique(np.linspace(0, len(chosen.rows) - 1, min(count, len(chosen.rows))).round().astype(np.int64))
    return Chosen(chosen.manifest, chosen.shards[some], chosen.rows[some], None)


def _view_features(
    network: Network, chosen: Chosen, config: Config, count: int, seed: int, plain: bool, part: slice
) -> tuple[np.ndarray, np.ndarray]:
    """h [B, q, D] of the views of some images, and their positions [B]."""
    cache = shards.cache_at(config.data.cache_dir, config.data.cache_bytes)
    spec = dataclasses.replace(config.views, count=count)
    made, found = [], [np.zeros(0, np.int64)]
    for images, positions in augmented_images(chosen, part, spec=spec, seed=seed, plain=plain, cache=cache):
        made.append(features(network.features, images.reshape(-1, *images.shape[2:])).reshape(*images.shape[:2], -1))
        found.append(positions)
    return np.concatenate(made) if made else np.zeros((0, 0, 0), np.float32), np.concatenate(found)


def _mean_features(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    h, positions = _view_features(*arguments)
    return (h.mean(axis=1, dtype=np.float64).astype(np.float32) if len(h) else np.zeros((0, 0), np.float32)), positions


def _results(name: str, frozen: _Frozen, seeds: range) -> tuple[dict[str, Any], range]:
    """The numbers of a protocol, and the seeds that they depend on."""
    if name == "spectrum":
        _, (h, _, lost) = frozen.plain
        of_views = [frozen.several(seed)[0] for seed in seeds]
        return _counts(0, len(h), lost) | protocols.spectral(h, of_views), seeds
    counts = frozen.train.manifest.class_counts
    assert counts is not None
    class_names = frozen.train.manifest.class_names or tuple(str(i) for i in range(len(counts)))
    if name == "finetune":
        return _finetuned(frozen, class_names, seeds), seeds
    classes, random, scores, more = len(class_names), seeds, [], {}
    if name == "linear":
        for seed in seeds:
            (train_h, train_y, train_lost), (test_h, test_y, test_lost) = frozen.averaged(seed)
            scores.append(adam_scores(train_h, train_y, test_h, num_classes=classes, seed=seed))
    else:
        (train_h, train_y, train_lost), (test_h, test_y, test_lost) = frozen.plain
    assert train_y is not None
    assert test_y is not None
    counted = _counts(len(train_y), len(test_y), train_lost + test_lost)
    match name:
        case "linear-plain":
            scores = [adam_scores(train_h, train_y, test_h, num_classes=classes, seed=seed) for seed in seeds]
        case "knn":
            scores, random = [protocols.knn_scores(train_h, train_y, test_h, num_classes=classes)], range(0)
        case "logreg":
            fitted = [logistic_scores(train_h, train_y, test_h, num_classes=classes, seed=seed) for seed in seeds]
            scores, more = [each for each, _ in fitted], {"l2": [l2 for _, l2 in fitted]}
        case "fewshot":
            draws = protocols.DRAWS * len(seeds)
            return counted | {"shots": protocols.few_shots(train_h, train_y, test_h, test_y, draws=draws)}, range(draws)
    return counted | classified(scores, test_y, class_names) | more, random


def _finetuned(frozen: _Frozen, class_names: tuple[str, ...], seeds: range) -> dict[str, Any]:
    train, config, found, lost = frozen.train, frozen.config, [], 0
    labels: np.ndarray | None = None
    assert train.labels is not None
    cache = shards.cache_at(config.data.cache_dir, config.data.cache_bytes)
    how: dict[str, Any] = {"spec": config.views, "num_classes": len(class_names), "cache": cache}
    for fraction, epochs in EPOCHS.items():
        scores = []
        for seed in seeds:
            some = label_share(train.labels, fraction, seed=seed)
            part = Chosen(train.manifest, train.shards[some], train.rows[some], train.labels[some])
            network, head = finetuned(frozen.network, part, epochs=epochs, seed=seed, **how)
            h, labels, lost = plain_features(network, frozen.test, config, frozen.each)
            with torch.no_grad():
                scores.append(head(torch.from_numpy(h)).numpy())
        assert labels is not None
        found.append({"fraction": fraction, "num_train": len(some)} | classified(scores, labels, class_names))
    return _counts(len(train.rows), len(h), lost) | {"fractions": found}


def _counts(train: int, test: int, lost: int) -> dict[str, Any]:
    return {"num_train": train, "num_test": test, "unreadable": lost}
