"""What a worker needs, memory and operations, counted before it is started: on the CPU, from a forward pass of two images."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssl_ray.config import Config
from ssl_ray.model import PIXEL_MEAN, PIXEL_STD
from ssl_ray.train.loop import compute_loss, make_network
from ssl_ray.train.optim import MOMENTS

FEW = 2
"""Images of the pass: one alone has no variance."""
BACKWARD = 2
"""A backward pass has so many times the operations of the forward pass: the gradients of inputs and of weights."""


class Needs(NamedTuple):
    """Of training, for each image of a worker's share of a step with all of its views, and whatever the share."""

    image_bytes: float
    """Which autograd keeps of a forward pass."""
    weights_bytes: int
    """Of weights, gradients and the optimiser's moments."""
    image_flops: float
    """Of a forward and a backward pass; a multiplication with an addition counts as two."""


def worker_needs(config: Config) -> Needs:
    """Counts them. Allocators, libraries and the loss of large batches come on top: it is too little rather than too much."""
    network, spec = make_network(config, group=None), config.views
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (FEW, spec.count, spec.channels, spec.size_px, spec.size_px)
    views = (torch.randint(0, 256, shape, dtype=torch.uint8).float() / 255 - PIXEL_MEAN) / PIXEL_STD
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=config.train.bf16),
    ):
        loss = compute_loss(network(views), config.loss, group=None)
    del loss
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    activations = sum(size for at, size in kept.items() if at not in weights)
    numbers = 2 + MOMENTS[config.optim.name]  # the weight, its gradient and the optimiser's
    copies = 4 * numbers * sum(p.numel() for p in network.parameters())
    return Needs(activations / FEW, copies, (1 + BACKWARD) * counter.get_total_flops() / FEW)
