"""Read-outs of a run's checkpoints: the weights of a step, features of plain images, numbers in RUN/evaluations/."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ssl_ray import shards, storage
from ssl_ray.config import Config
from ssl_ray.each import Each, in_turn
from ssl_ray.errors import DataError, UsageError
from ssl_ray.evaluate import calibrate_batch_norm, evaluate_features, features
from ssl_ray.evaluate.images import Chosen, choose, plain_images
from ssl_ray.model import Network
from ssl_ray.shards import Manifest
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import load_weights, weights_uri
from ssl_ray.train.loop import make_network

CALIBRATION_IMAGES = 2048
BATCH = 512


def _nothing_readable(chosen: Chosen) -> DataError:
    uri = chosen.manifest.data_uri
    return DataError(f"{uri}: no image for the read-outs can be read. Run `ssl-ray data check {uri}`.")


def read_plain(chosen: Chosen, config: Config, part: slice) -> tuple[np.ndarray, np.ndarray]:
    cache = shards.cache_at(config.data.cache_dir, config.data.cache_bytes)
    how = {"channels": config.views.channels, "size_px": config.views.size_px}
    return plain_images(chosen, part, **how, cache=cache)


def encoded(network: Any, chosen: Chosen, config: Config, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """h [B, D] of the samples of `part` that can be read, and their positions [B]."""
    images, positions = read_plain(chosen, config, part)
    return features(network.features, images) if len(images) else np.zeros((0, 0), np.float32), positions


def parts(chosen: Chosen) -> list[slice]:
    """What is gone through at a time."""
    return [slice(start, start + BATCH) for start in range(0, len(chosen.rows), BATCH)]


def plain_features(network: Any, chosen: Chosen, config: Config, each: Each) -> tuple[np.ndarray, np.ndarray | None, int]:
    """h [n, D], labels [n] or None, and how many images could not be read."""
    return gathered(each(functools.partial(encoded, network, chosen, config), parts(chosen)), chosen)


def gathered(made: Iterable[tuple[np.ndarray, np.ndarray]], chosen: Chosen) -> tuple[np.ndarray, np.ndarray | None, int]:
    """h [n, ...], labels [n] or None, and how many images could not be read, from parts: h [B, ...] and positions [B]."""
    parts = [(h, positions) for h, positions in made if len(positions)]
    if not parts:
        raise _nothing_readable(chosen)
    positions = np.concatenate([positions for _, positions in parts])
    labels = None if chosen.labels is None else chosen.labels[positions]
    return np.concatenate([h for h, _ in parts]), labels, len(chosen.rows) - len(positions)


def frozen_network(uri: str, config: Config, *, checkpoint: str | None) -> Network:
    """The network of the run at `uri` in eval mode: with the weights of a checkpoint (a name below RUN/checkpoints), or (None)
    untrained. Then its batch norm is calibrated on the training images, so that the gain over it is not that of the
    statistics alone."""
    network = make_network(config, group=None)
    if checkpoint is not None:
        load_weights(storage.join(uri, "checkpoints", checkpoint), network)
        return network.eval()
    manifest, eval_manifest = manifests(config)
    some, _ = choose(manifest, eval_manifest, held_out=config.data.eval_fraction, max_images=CALIBRATION_IMAGES)
    images = np.concatenate([read_plain(some, config, part)[0] for part in parts(some)])
    if not len(images):
        raise _nothing_readable(some)
    calibrate_batch_norm(network.encoder, images, batch=256, encode=network.features)
    return network.eval()


def manifests(config: Config) -> tuple[Manifest, Manifest | None]:
    """Of the data that a run trains on, and of what it is judged on where that is another data set."""
    data = config.data
    return shards.load_manifest(data.uri), None if data.eval_uri is None else shards.load_manifest(data.eval_uri)


def evaluate_run(uri: str, *, checkpoint: str | None, threads: int = 1, each: Each = in_turn) -> dict[str, Any]:
    """The read-outs of one checkpoint (a name below RUN/checkpoints), or of the untrained network (None).

    Writes them to RUN/evaluations/.
    each: how the images are gone through, some hundreds at a time; with the same results whichever way.
    """
    torch.set_num_threads(threads)
    config = runs.config_of(runs.load_run(uri), uri)
    train, test = choose(*manifests(config), held_out=config.data.eval_fraction, max_images=config.evaluate.max_images)
    network = frozen_network(uri, config, checkpoint=checkpoint)
    train_h, train_y, train_lost = plain_features(network, train, config, each)
    test_h, test_y, test_lost = plain_features(network, test, config, each)
    result = evaluate_features(train_h, train_y, test_h, test_y, seed=config.seed)
    result |= {"unreadable": train_lost + test_lost}
    step = None if checkpoint is None else runs.checkpoint_step(checkpoint)
    result = {"step": step} | result
    runs.write_json(runs.evaluation_uri(uri, step), result)
    return result


def evaluate_checkpoint(uri: str, *, step: int | None, untrained: bool, each: Each = in_turn) -> dict[str, Any]:
    """The read-outs of what `find_checkpoint` finds."""
    run, checkpoint = find_checkpoint(uri, step=step, untrained=untrained)
    storage.require_writable(storage.join(run, "evaluations"))
    return evaluate_run(run, checkpoint=checkpoint, each=each)


def find_checkpoint(uri: str, *, step: int | None = None, untrained: bool = False) -> tuple[str, str | None]:
    """The run, and the name of its checkpoint, meant by `uri`: a run (its newest committed checkpoint, that of `step`, or None
    for the untrained network), a checkpoint's folder in a run, or the weights file in that.

    Raises DataError if there is no such checkpoint, UsageError for weights outside of a run.
    """
    if not storage.exists(storage.join(uri, "run.json")) and _are_weights(uri):
        return _checkpoint_of(uri, given=step is not None or untrained)
    runs.load_run(uri)
    if untrained:
        return uri, None
    return uri, runs.committed(uri, step=step)


def _are_weights(uri: str) -> bool:
    return uri.endswith(".safetensors") or storage.exists(storage.join(uri, "weights.safetensors"))


def _checkpoint_of(uri: str, *, given: bool) -> tuple[str, str]:
    file = storage.absolute(weights_uri(uri))
    run, _, name = file.removesuffix("/weights.safetensors").rpartition("/checkpoints/")
    if not run or "/" in name or not file.endswith("/weights.safetensors") or not storage.exists(storage.join(run, "run.json")):
        raise UsageError(
            f"{uri}: weights outside of a run, so that their configuration is not known.\n"
            "Give a run, RUN/checkpoints/NAME or RUN/checkpoints/NAME/weights.safetensors."
        )
    if given:
        raise UsageError(f"{uri} is of one step: --step and --untrained go with a run.")
    return run, name
