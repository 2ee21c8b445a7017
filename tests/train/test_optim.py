"""Optimisers and the learning rate, against torch's own, a naive reference in float64 and an undisturbed run."""

import math

import pytest
import torch
from torch import Tensor, nn

from ssl_ray.train import checkpoint
from ssl_ray.train.optim import build_optimizer, learning_rate, orthogonal


def gradients(shape: tuple[int, ...], *, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


def trained(optimizer: torch.optim.Optimizer, p: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach().clone()


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_orthogonal_keeps_the_singular_vectors_and_brings_the_values_near_one(shape: tuple[int, int]):
    matrix = gradients(shape, steps=1)[0].double()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.mT @ orthogonal(matrix) @ v.mT
    assert values.diagonal().min() > 0.6
    assert values.diagonal().max() < 1.3
    assert (values - values.diagonal().diag()).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_moves_a_matrix_as_that_of_torch(shape: tuple[int, int], weight_decay: float):
    grads, ours, theirs = gradients(shape, steps=10), weight(*shape), weight(*shape)
    start = ours.detach().clone()
    got = trained(build_optimizer("muon", [ours], lr=0.02, weight_decay=weight_decay), ours, grads)
    peer = torch.optim.Muon([theirs], lr=0.02, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    moved = trained(peer, theirs, grads) - start
    assert (got - start - moved).norm() < 0.02 * moved.norm()  # torch's is in bfloat16


def test_muon_takes_a_convolution_for_a_matrix_however_it_lies_in_memory():
    grads, shape = gradients((8, 4, 3, 3), steps=3), (8, 4, 3, 3)
    flat, conv = weight(*shape), nn.Parameter(weight(*shape).detach().to(memory_format=torch.channels_last))
    flat = nn.Parameter(flat.detach().flatten(1))
    of_flat = trained(build_optimizer("muon", [flat], lr=0.02, weight_decay=0.1), flat, [grad.flatten(1) for grad in grads])
    of_conv = trained(build_optimizer("muon", [conv], lr=0.02, weight_decay=0.1), conv, grads)
    torch.testing.assert_close(of_conv.flatten(1), of_flat)


def test_muon_takes_the_steps_of_adam_with_vectors():
    grads, ours, theirs = gradients((12,), steps=10), weight(12), weight(12)
    got = trained(build_optimizer("muon", [ours], lr=0.02, weight_decay=0.1), ours, grads)
    torch.testing.assert_close(got, trained(torch.optim.Adam([theirs], lr=0.02, betas=(0.9, 0.95)), theirs, grads))


def test_lars_is_its_formula():
    grads, p, bias = gradients((6, 5), steps=4), weight(6, 5), weight(5)
    matrix, velocity = p.detach().double(), torch.zeros(6, 5).double()
    for grad in grads:
        decayed = grad.double() + 0.1 * matrix
        velocity = 0.9 * velocity + 0.001 * matrix.norm() / decayed.norm() * decayed
        matrix = matrix - 0.5 * velocity
    got = trained(build_optimizer("lars", [p], lr=0.5, weight_decay=0.1), p, grads)
    torch.testing.assert_close(got.double(), matrix, rtol=1e-5, atol=1e-6)
    start = bias.detach().clone()
    torch.testing.assert_close(trained(build_optimizer("lars", [bias], lr=0.5, weight_decay=0.1), bias, [bias]), start * 0.5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars", "muon"])
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(name: str, tmp_path):
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5))
        network(torch.zeros(2, 3, 6, 6))
        network = network.to(memory_format=torch.channels_last)
        return network, build_optimizer(name, network.parameters(), lr=0.01, weight_decay=0.1)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, images: list[Tensor]) -> None:
        for image in images:
            optimizer.zero_grad()
            network(image.to(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()

    images = gradients((8, 3, 6, 6), steps=6)
    undisturbed, first, second = fresh(), fresh(), fresh()
    train(*undisturbed, images)
    train(*first, images[:3])
    checkpoint.write_checkpoint(str(tmp_path), checkpoint.snapshot(*first, step=3, state={}))
    checkpoint.read_checkpoint(str(tmp_path), *second)
    train(*second, images[3:])
    for ours, truth in zip(second[0].state_dict().values(), undisturbed[0].state_dict().values(), strict=True):
        assert torch.equal(ours, truth)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, total_steps=12) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * k / 8) for k in range(9)])
