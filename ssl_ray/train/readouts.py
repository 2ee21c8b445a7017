"""Read-outs of a run's checkpoints: the weights of a step, features of plain images, numbers in RUN/evaluations/."""

import functools
from typing import Any

import numpy as np
import torch

from ssl_ray import shards, storage
from ssl_ray.config import Config, build
from ssl_ray.each import Each, in_turn
from ssl_ray.errors import DataError
from ssl_ray.evaluate import calibrate_batch_norm, evaluate_features, features
from ssl_ray.evaluate.images import Chosen, choose, plain_images
from ssl_ray.train import runs
from ssl_ray.train.checkpoint import load_weights
from ssl_ray.train.loop import make_network

CALIBRATION_IMAGES = 2048
_BATCH = 512


def _nothing_readable(chosen: Chosen) -> DataError:
    uri = chosen.manifest.data_uri
    return DataError(f"{uri}: no image for the read-outs can be read. Run `ssl-ray data check {uri}`.")


def _plain(chosen: Chosen, config: Config, start: int) -> tuple[np.ndarray, np.ndarray]:
    cache = shards.cache_at(config.data.cache_dir, config.data.cache_bytes)
    how = {"channels": config.views.channels, "size_px": config.views.size_px}
    return plain_images(chosen, slice(start, start + _BATCH), **how, cache=cache)


def _encoded(network: Any, chosen: Chosen, config: Config, start: int) -> tuple[np.ndarray, np.ndarray]:
    images, positions = _plain(chosen, config, start)
    return features(network.features, images) if len(images) else np.zeros((0, 0), np.float32), positions


def _starts(chosen: Chosen) -> range:
    return range(0, len(chosen.rows), _BATCH)


def _features(network: Any, chosen: Chosen, config: Config, each: Each) -> tuple[np.ndarray, np.ndarray | None, int]:
    """h [n, D], labels [n] or None, and how many images could not be read."""
    made = each(functools.partial(_encoded, network, chosen, config), _starts(chosen))
    parts = [(h, positions) for h, positions in made if len(positions)]
    if not parts:
        raise _nothing_readable(chosen)
    positions = np.concatenate([positions for _, positions in parts])
    labels = None if chosen.labels is None else chosen.labels[positions]
    return np.concatenate([h for h, _ in parts]), labels, len(chosen.rows) - len(positions)


def evaluate_run(uri: str, *, checkpoint: str | None, threads: int = 1, each: Each = in_turn) -> dict[str, Any]:
    """The read-outs of one checkpoint (a name below RUN/checkpoints), or of the untrained network (None).

    Writes them to RUN/evaluations/. The untrained network has its batch norm calibrated on the training images, so that
    the gain over it is not that of the statistics alone.
    each: how the images are gone through, some hundreds at a time; with the same results whichever way.
    """
    torch.set_num_threads(threads)
    config = build(runs.load_run(uri)["config"], source=storage.join(uri, "run.json"))
    data = config.data
    manifest = shards.load_manifest(data.uri)
    eval_manifest = None if data.eval_uri is None else shards.load_manifest(data.eval_uri)
    train, test = choose(manifest, eval_manifest, held_out=data.eval_fraction, max_images=config.evaluate.max_images)
    network = make_network(config, group=None)
    if checkpoint is not None:
        load_weights(storage.join(uri, "checkpoints", checkpoint), network)
    else:
        some, _ = choose(manifest, eval_manifest, held_out=data.eval_fraction, max_images=CALIBRATION_IMAGES)
        images = np.concatenate([_plain(some, config, start)[0] for start in _starts(some)])
        if not len(images):
            raise _nothing_readable(some)
        calibrate_batch_norm(network.encoder, images, batch=256, encode=network.features)
    network.eval()
    train_h, train_y, train_lost = _features(network, train, config, each)
    test_h, test_y, test_lost = _features(network, test, config, each)
    result = evaluate_features(train_h, train_y, test_h, test_y, seed=config.seed)
    result |= {"unreadable": train_lost + test_lost}
    step = None if checkpoint is None else runs.checkpoint_step(checkpoint)
    result = {"step": step} | result
    runs.write_json(runs.evaluation_uri(uri, step), result)
    return result


def evaluate_checkpoint(uri: str, *, step: int | None, untrained: bool, each: Each = in_turn) -> dict[str, Any]:
    """The read-outs of the run at `uri`: of its newest committed checkpoint, that of `step`, or the untrained network.

    Raises DataError if there is no such checkpoint.
    """
    runs.load_run(uri)
    if untrained:
        return evaluate_run(uri, checkpoint=None, each=each)
    return evaluate_run(uri, checkpoint=runs.committed(uri, step=step), each=each)
