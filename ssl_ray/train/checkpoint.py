"""Checkpoints: a snapshot in memory, its files, and the way back. Safetensors and JSON only, no pickle.

CHECKPOINT/weights.safetensors    state_dict of encoder and projector (names `encoder.*`, `projector.*`)
CHECKPOINT/optimizer.safetensors  `INDEX.NAME` for each parameter's state (INDEX in the order of parameters())
CHECKPOINT/state.json             step, the counters that continue, and the sha256 of the other two
"""

import dataclasses
import difflib
import hashlib
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ssl_ray import storage
from ssl_ray.errors import DataError, UsageError
from ssl_ray.train import runs


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A copy on the CPU, so that training goes on while it is written."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def snapshot(network: nn.Module, optimizer: torch.optim.Optimizer, *, step: int, state: dict[str, Any]) -> Snapshot:
    weights = {name: _copy(value) for name, value in network.state_dict().items()}
    slots = optimizer.state_dict()["state"]
    moments = {f"{index}.{name}": _copy(value) for index, slot in slots.items() for name, value in slot.items()}
    return Snapshot(step=step, weights=weights, optimizer=moments, state=state)


def first_bad_weight(shot: Snapshot) -> str | None:
    """The name of a weight that is not finite, or None."""
    return next((name for name, value in shot.weights.items() if not torch.isfinite(value).all()), None)


def write_checkpoint(uri: str, shot: Snapshot) -> None:
    """Writes the files below `uri`; it counts only when the marker names it."""
    digests = {}
    for name, tensors in (("weights.safetensors", shot.weights), ("optimizer.safetensors", shot.optimizer)):
        data = save(tensors)
        digests[name] = hashlib.sha256(data).hexdigest()
        storage.write_atomic(storage.join(uri, name), data)
    runs.write_json(storage.join(uri, "state.json"), {"step": shot.step, "sha256": digests} | shot.state)


RESTORE = "Restore it, or begin another run; train.init_from=RUN/checkpoints/NAME begins with the weights of an older checkpoint."


def _require(uri: str) -> None:
    if not storage.exists(uri):
        raise DataError(f"{uri}: this file of the checkpoint is missing. {RESTORE}")


def _load_tensors(uri: str, *, state: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Of a safetensors file: where it is one of a checkpoint, its bytes must be those that were written.

    state: the state.json beside it; None: it is not read yet, if there is one.
    """
    _require(uri)
    data = storage.read_bytes(uri)
    folder, _, name = uri.rpartition("/")
    if state is None:
        state_uri = storage.join(folder, "state.json")
        state = runs.read_json(state_uri) if storage.exists(state_uri) else {}
    written = state["sha256"].get(name) if isinstance(state.get("sha256"), dict) else None
    if written is not None and written != hashlib.sha256(data).hexdigest():
        raise DataError(f"{uri}: damaged: its bytes are others than were written (sha256). {RESTORE}")
    try:
        return load(data)
    except Exception as error:
        raise DataError(f"{uri}: not a readable safetensors file ({storage.one_line(error)}). {RESTORE}") from error


def read_checkpoint(uri: str, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts the checkpoint at `uri` into the network and the optimiser; returns state.json but for its checksums."""
    state_uri = storage.join(uri, "state.json")
    _require(state_uri)
    state = runs.read_json(state_uri)
    load_weights(uri, network, state=state)
    parameters = list(network.parameters())
    slots: dict[int, dict[str, Tensor]] = {}
    optimizer_uri = storage.join(uri, "optimizer.safetensors")
    for name, value in _load_tensors(optimizer_uri, state=state).items():
        index, _, slot = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise DataError(f"{optimizer_uri}: {name} is of no parameter of this network. {RESTORE}")
        like = parameters[int(index)]
        if value.shape == like.shape:  # fused optimisers go over memory as it lies, and channels_last lies otherwise
            value = torch.empty_like(like).copy_(value)
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return {name: value for name, value in state.items() if name != "sha256"}


def load_weights(uri: str, network: nn.Module, *, state: dict[str, Any] | None = None) -> None:
    """Puts the weights of the checkpoint at `uri` into the network, which must be of the same shape.

    state: its state.json, where that is read already.
    """
    at = storage.join(uri, "weights.safetensors")
    tensors = _load_tensors(at, state=state)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{at}: not the weights of this network ({storage.one_line(error)[:300]}). {RESTORE}") from error


def encoder_weights(uri: str) -> dict[str, Tensor]:
    """Those in the safetensors file `uri` whose names begin with `encoder.`."""
    return {name: value for name, value in _load_tensors(uri).items() if name.startswith("encoder.")}


def weights_uri(uri: str) -> str:
    """The weights file meant by `uri`: a run (its newest checkpoint), a checkpoint, or a safetensors file."""
    if uri.endswith(".safetensors"):
        return uri
    if storage.exists(storage.join(uri, "weights.safetensors")):
        return storage.join(uri, "weights.safetensors")
    marker = runs.read_marker(uri)
    if marker.checkpoint is None:
        raise DataError(f"{uri}: no checkpoint here. Give a run with one, a checkpoint folder or a .safetensors file.")
    return storage.join(uri, "checkpoints", marker.checkpoint, "weights.safetensors")


def init_from(uri: str, network: nn.Module) -> None:
    """Loads encoder and projector from `uri`; the projector keeps its random weights where its shape differs.

    Raises UsageError if the encoder's weights do not fit.
    """
    given = _load_tensors(weights_uri(uri))
    mine = network.state_dict()
    fitting = {name: value for name, value in given.items() if name in mine and mine[name].shape == value.shape}
    for name in mine:
        if name.startswith("encoder.") and name not in fitting:
            near = difflib.get_close_matches(name, given, n=1)
            got = f"has shape {list(given[name].shape)}" if name in given else f"is missing (nearest: {near})"
            raise UsageError(
                f"train.init_from: {uri} does not fit this encoder: {name} {got}, expected {list(mine[name].shape)}."
            )
    if any(name.startswith("projector.") and name not in fitting for name in mine):
        fitting = {name: value for name, value in fitting.items() if name.startswith("encoder.")}
    network.load_state_dict(mine | fitting)
