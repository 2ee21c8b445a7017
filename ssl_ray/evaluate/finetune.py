"""Fine-tuning: encoder and a linear classifier trained together on a share of the labels."""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional

from ssl_ray import views
from ssl_ray.config import Views
from ssl_ray.evaluate.images import EPOCH, Chosen, augmented_images
from ssl_ray.evaluate.readout import shuffled_by_class
from ssl_ray.model import Network
from ssl_ray.philox import CLASSIFIER_ORDER, LABEL_SHARE, permutation
from ssl_ray.shards import Cache

EPOCHS = {0.01: 60, 0.1: 30, 1.0: 10}
"""Passes over the images, for each share of the labels."""
FINETUNE: dict[str, Any] = {"lr": 5e-4, "weight_decay": 1e-4, "batch": 64}


def label_share(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
    """int64, increasing: positions of `fraction` of the images of each class, rounded, one at least.

    A smaller fraction lies inside a larger one of the same seed.  labels: int [n].
    """
    order = shuffled_by_class(labels, seed=seed, purpose=LABEL_SHARE)
    _, first, count = np.unique(labels[order], return_index=True, return_counts=True)
    taken = np.maximum(1, np.rint(fraction * count)).astype(np.int64)
    return np.sort(np.concatenate([order[start : start + some] for start, some in zip(first, taken, strict=True)]))


@threadpool_limits.wrap(limits=1)  # another number of threads changes the order of sums
def finetuned(
    network: Network, chosen: Chosen, *, spec: Views, num_classes: int, epochs: int, seed: int, cache: Cache | None = None
) -> tuple[Network, nn.Linear]:
    """A copy of the network whose encoder was trained further with a linear classifier on it, in eval mode, and that.

    AdamW with the settings of FINETUNE for both, the learning rate falling to 0 along a cosine, cross-entropy. An image is
    seen in one view an epoch: crop and flip as in `spec`, no colours. Batches differ in size by one at most; in training,
    batch norm takes their statistics. The classifier begins at zero; order and crops are drawn by `seed`.
    chosen: images with labels below num_classes; those that cannot be read are left out.
    Cost: that of `epochs` epochs of training with one view, on one core.
    """
    assert chosen.labels is not None
    network = copy.deepcopy(network).train()
    inputs: int = network.encoder.num_features  # type: ignore[assignment]
    head = nn.Linear(inputs, num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    parameters = [*network.encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=FINETUNE["lr"], weight_decay=FINETUNE["weight_decay"])
    spec = dataclasses.replace(views.crops_only(spec), count=2)  # the least that there are; the first is used
    batches = -(-len(chosen.rows) // FINETUNE["batch"])
    for step in range(epochs * batches):
        epoch, batch = divmod(step, batches)
        if not batch:
            order = permutation(len(chosen.rows), key=(seed, 1), purpose=CLASSIFIER_ORDER, stream=epoch)
        some = np.array_split(order, batches)[batch]
        part = Chosen(chosen.manifest, chosen.shards[some], chosen.rows[some], chosen.labels[some])
        made = augmented_images(part, slice(None), spec=spec, seed=seed, plain=False, cache=cache, epoch=EPOCH - 1 - epoch)
        parts = [(images[:, 0], chosen.labels[some[positions]]) for images, positions in made]
        if sum(len(labels) for _, labels in parts) < 2:  # batch norm has no variance
            continue
        images, labels = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = FINETUNE["lr"] * 0.5 * (1 + math.cos(math.pi * step / (epochs * batches)))
        loss = functional.cross_entropy(head(network.features(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval(), head.eval()
