"""Fine-tuning, against torch's own optimiser and schedule on the same images."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from ssl_ray import shards
from ssl_ray.config import Views
from ssl_ray.evaluate.finetune import FINETUNE, finetuned, label_share
from ssl_ray.evaluate.images import lowest, plain_images
from ssl_ray.model import build_network

PLAIN = Views(size_px=8, channels=1, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
"""Every view is the plain one."""


@pytest.fixture(scope="module")
def network():
    how = {"projector_dim": 8, "projector_width": None, "projector_depth": 1, "projector_norm": "none"}
    return build_network("small", channels=1, size_px=8, **how, seed=0, global_batch_norm=None)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("digits") / "shards")
    return lowest(shards.pack(shards.open_source("digits"), uri), count=32, labelled=True)


def test_label_shares_are_nested_and_have_their_share_of_every_class():
    labels = np.random.default_rng(0).choice(5, size=2000, p=[0.4, 0.3, 0.2, 0.09, 0.01])
    shares = {fraction: label_share(labels, fraction, seed=3) for fraction in (0.01, 0.1, 1.0)}
    count = np.bincount(labels)
    for fraction, some in shares.items():
        assert np.bincount(labels[some], minlength=5) == pytest.approx(np.maximum(1, fraction * count), abs=0.5)
    assert set(shares[0.01]) < set(shares[0.1]) < set(shares[1.0]) == set(range(2000))
    assert not np.array_equal(label_share(labels, 0.1, seed=4), shares[0.1])


def test_one_batch_of_plain_views_is_trained_as_by_torchs_adamw_and_cosine(network, digits):
    epochs, before = 4, copy.deepcopy(network.state_dict())
    got, head = finetuned(network, digits, spec=PLAIN, num_classes=10, epochs=epochs, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())  # a copy was trained
    images, _ = plain_images(digits, slice(None), channels=1, size_px=8)
    x, y = torch.from_numpy(images).float().div(255).sub(0.5).div(0.25), torch.from_numpy(digits.labels)
    encoder, linear = copy.deepcopy(network.encoder).train(), torch.nn.Linear(128, 10)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    how = {"lr": FINETUNE["lr"], "weight_decay": FINETUNE["weight_decay"]}
    optimizer = torch.optim.AdamW([*encoder.parameters(), *linear.parameters()], **how)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    criterion = torch.nn.CrossEntropyLoss()
    with threadpool_limits(1):
        for _ in range(epochs):
            optimizer.zero_grad()
            criterion(linear(encoder(x)), y).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        expected, found = linear(encoder.eval()(x)), head(got.features(torch.from_numpy(images)))
    assert found == pytest.approx(expected, abs=0.02 * float(expected.abs().max()))


def test_it_is_a_function_of_its_seed(network, digits):
    spec = dataclasses.replace(PLAIN, crop_scale=(0.5, 1.0), flip=0.5)
    weights = [finetuned(network, digits, spec=spec, num_classes=10, epochs=2, seed=s)[1].weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
