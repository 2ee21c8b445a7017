"""The losses against naive float64 references, in one process and in several with different data."""

import itertools

import gloo
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_ray import losses

BETA = 0.3
WEIGHTS = {"invariance": 25.0, "variance": 10.0, "covariance": 2.0}
NAMES = ("mean", "pairs", "classic", "vicreg", "spectral")


def ours(name: str, z: Tensor, group=None) -> losses.LossTerms:
    if name == "vicreg":
        return losses.vicreg(z, **WEIGHTS, group=group)
    if name == "spectral":
        return losses.spectral(z, group=group)
    return losses.barlow_twins(z, beta=BETA, form=name, group=group)


# Naive references: the formulas as they are written, with loops over views and pairs.


def standardised(z: Tensor, axes: tuple[int, ...]) -> Tensor:
    variance = z.var(axes, correction=0, keepdim=True)
    return (z - z.mean(axes, keepdim=True)) / (variance + losses.STANDARD_EPS).sqrt()


def off_diagonal_squares(c: Tensor) -> Tensor:
    return sum(c[i, j] ** 2 for i in range(len(c)) for j in range(len(c)) if i != j) + 0 * c.sum()


def naive_mean(z: Tensor) -> Tensor:
    z = standardised(z, (0, 1))
    zbar = z.mean(0)
    a = [(view * zbar).mean(0) for view in z]
    diagonal = sum(((1 - a_v) ** 2).sum() for a_v in a) / len(a)
    return diagonal + BETA * off_diagonal_squares(zbar.T @ zbar / len(zbar))


def naive_pairs(z: Tensor) -> Tensor:
    z = standardised(z, (0, 1))
    pairs = list(itertools.permutations(range(len(z)), 2))
    c = sum(z[u].T @ z[v] / z.shape[1] for u, v in pairs) / len(pairs)
    return ((1 - c.diagonal()) ** 2).sum() + BETA * off_diagonal_squares(c)


def naive_classic(z: Tensor) -> Tensor:
    """As published, arXiv 2103.03230, algorithm 1: batch norm without affine, then the cross-correlation."""
    norm = torch.nn.BatchNorm1d(z.shape[2], affine=False, eps=losses.STANDARD_EPS).to(z.dtype)
    c = norm(z[0]).T @ norm(z[1]) / z.shape[1]
    return (c.diagonal() - 1).pow(2).sum() + BETA * off_diagonal_squares(c)


def naive_vicreg(z: Tensor) -> Tensor:
    m, _, d = z.shape
    pairs = list(itertools.combinations(range(m), 2))
    invariance = sum((z[u] - z[v]).square().sum(1).mean() / d for u, v in pairs) / len(pairs)
    variance = sum(torch.relu(1 - (view.var(0) + 1e-4).sqrt()).mean() for view in z) / m
    covariance = sum(off_diagonal_squares(torch.cov(view.T).reshape(d, d)) / d for view in z) / m
    return WEIGHTS["invariance"] * invariance + WEIGHTS["variance"] * variance + WEIGHTS["covariance"] * covariance


def naive_spectral(z: Tensor) -> Tensor:
    m, batch, _ = z.shape
    same = [z[u, b] @ z[v, b] for b in range(batch) for u, v in itertools.permutations(range(m), 2)]
    other = [(z[u, b] @ z[v, c]) ** 2 for b, c in itertools.permutations(range(batch), 2) for u in range(m) for v in range(m)]
    return -2 * sum(same) / len(same) + sum(other) / len(other)


NAIVE = {
    "mean": naive_mean,
    "pairs": naive_pairs,
    "classic": naive_classic,
    "vicreg": naive_vicreg,
    "spectral": naive_spectral,
}


def value_and_gradient(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """Of the naive loss, in float64."""
    z = z.detach().double().requires_grad_()
    value = NAIVE[name](z)
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient


def embeddings(m: int, batch: int, d: int, seed: int, *, shift: float = 0.0, dtype=torch.float64) -> Tensor:
    """[m, B, d]: correlated views; images, views and features differ in mean and scale. shift: means in stds."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    z = normal(1, batch, d) + 0.5 * normal(m, batch, d) + 0.3 * normal(m, 1, d)
    z = z * (0.3 * normal(d)).exp()
    # Images in order of their mean, so that the shares of workers differ.
    z = z + torch.linspace(-1, 1, batch, dtype=torch.float64)[:, None]
    return (z + shift * z.std() * torch.sign(normal(d))).to(dtype)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    (value, gradient), (true_value, true_gradient) = got, want
    scale = max(1.0, abs(true_value.item()))
    assert abs(value.item() - true_value.item()) <= tolerance * scale
    error = (gradient.double() - true_gradient).norm().item()
    assert error <= tolerance * true_gradient.norm().item(), error / true_gradient.norm().item()


def shares_of(z: Tensor, sizes: list[int]) -> list[tuple[Tensor]]:
    return [(share.clone(),) for share in z.split(sizes, dim=1)]


def each_worker(group, names: tuple[str, ...], z: Tensor) -> dict[str, tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """For each loss: value, gradient of this worker's share, terms."""
    results = {}
    for name in names:
        own = z.clone().requires_grad_()
        loss = ours(name, own, group)
        loss.total.backward()
        results[name] = (loss.total.detach(), own.grad, loss.terms)
    return results


def over_workers(z: Tensor, sizes: list[int], names: tuple[str, ...]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each loss: every worker's value, with the gradient of the whole batch that DDP's averaging gives."""
    replies = gloo.run(each_worker, [(names, *share) for share in shares_of(z, sizes)])
    results = {}
    for name in names:
        gradient = torch.cat([reply[name][1] for reply in replies], dim=1) / len(sizes)
        results[name] = [(reply[name][0], gradient) for reply in replies]
    return results


def forms_for(m: int) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name != "classic" or m == 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(3, 7), st.integers(2, 26), st.integers(0, 2**20))
def test_every_loss_and_gradient_equals_its_naive_formula(m: int, batch: int, d: int, seed: int):
    z = embeddings(m, batch, d, seed)
    for name in forms_for(m):
        own = z.clone().requires_grad_()
        total = ours(name, own).total
        total.backward()
        assert_same((total.detach(), own.grad), value_and_gradient(name, z), 1e-9)


SIZES = [[7], [4, 3], [1, 6], [2, 4, 1], [1, 1, 4, 1]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("d", [3, 40], ids=["features side", "gram side"])
def test_workers_with_different_shares_equal_one_process_in_float64(sizes: list[int], m: int, d: int):
    z = embeddings(m, sum(sizes), d, seed=1)
    for name, workers in over_workers(z, sizes, forms_for(m)).items():
        want = value_and_gradient(name, z)
        for got in workers:
            assert_same(got, want, 1e-9)


@pytest.mark.parametrize("sizes", [[20], [11, 9], [7, 1, 12], [2, 9, 1, 8]], ids=str)
@pytest.mark.parametrize("shift", [0, 10, 30])
@pytest.mark.parametrize("d", [9, 100], ids=["features side", "gram side"])
def test_float32_keeps_five_digits_of_the_gradient_with_means_of_many_stds(sizes: list[int], shift: int, d: int):
    z = embeddings(2, sum(sizes), d, seed=2, shift=shift, dtype=torch.float32)
    # The spectral loss does not centre, and its value grows with the fourth power of the mean.
    names = forms_for(2) if shift == 0 else ("mean", "pairs", "classic", "vicreg")
    for name, workers in over_workers(z, sizes, names).items():
        want = value_and_gradient_fast(name, z)
        for got in workers:
            assert_same(got, want, 1e-5)


def value_and_gradient_fast(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """In one process and float64: seen above to equal the naive formula, which takes seconds for d = 100."""
    z = z.detach().double().requires_grad_()
    total = ours(name, z).total
    total.backward()
    return total.detach(), z.grad


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(2, 5), st.integers(2, 24), st.integers(0, 999))
def test_any_shares_and_shapes_over_workers_equal_one_process(sizes: list[int], m: int, d: int, seed: int):
    if sum(sizes) < 3:
        sizes = [*sizes[:-1], sizes[-1] + 1]
    z = embeddings(m, sum(sizes), d, seed)
    for name, workers in over_workers(z, sizes, forms_for(m)).items():
        want = value_and_gradient_fast(name, z)
        for got in workers:
            assert_same(got, want, 1e-9)


def test_the_spectral_loss_in_float32_keeps_its_digits_with_means_of_30_stds():
    z = embeddings(3, 12, 6, seed=3, shift=30, dtype=torch.float32)
    value, gradient = value_and_gradient("spectral", z)
    for got, computed in over_workers(z, [5, 7], ("spectral",))["spectral"]:
        assert abs(got.item() / value.item() - 1) < 1e-5
        assert (computed - gradient).norm() < 1e-5 * gradient.norm()


def test_two_views_give_the_original_vicreg_with_twice_its_covariance_weight():
    z = embeddings(2, 9, 5, seed=4)
    x, y = z
    # As published, arXiv 2105.04906, algorithm 1.
    d, count = 5, len(x)
    repr_loss = torch.nn.functional.mse_loss(x, y)
    x, y = x - x.mean(0), y - y.mean(0)
    std_x, std_y = torch.sqrt(x.var(0) + 1e-4), torch.sqrt(y.var(0) + 1e-4)
    std_loss = torch.relu(1 - std_x).mean() / 2 + torch.relu(1 - std_y).mean() / 2
    cov_x, cov_y = x.T @ x / (count - 1), y.T @ y / (count - 1)
    cov_loss = off_diagonal_squares(cov_x) / d + off_diagonal_squares(cov_y) / d
    original = 25 * repr_loss + 25 * std_loss + cov_loss
    total = losses.vicreg(z, invariance=25, variance=25, covariance=2).total
    torch.testing.assert_close(total, original, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_are_the_parts_of_the_total_and_carry_no_gradient(name: str):
    loss = ours(name, embeddings(2, 6, 4, seed=5).requires_grad_())
    weights = {"diagonal": 1, "off_diagonal": BETA, "positive": -2, "negative": 1} | WEIGHTS
    parts = sum(weights[term] * value for term, value in loss.terms.items())
    torch.testing.assert_close(parts, loss.total.detach(), rtol=1e-12, atol=0)
    assert not any(value.requires_grad for value in loss.terms.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [4, 60])
def test_autocast_does_not_touch_the_moments(name: str, d: int):
    z = embeddings(2, 6, d, seed=6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours(name, z).total
    assert inside.dtype == torch.float32
    assert torch.equal(inside, ours(name, z).total)
    half = z.bfloat16()
    torch.testing.assert_close(ours(name, half).total, ours(name, half.float()).total, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_constant_features_and_equal_embeddings_give_finite_gradients(name: str):
    z = embeddings(2, 6, 4, seed=7, dtype=torch.float32)
    z[..., 1] = 3.0
    for constant in (z, torch.ones(2, 6, 4), torch.zeros(2, 6, 9)):
        own = constant.clone().requires_grad_()
        ours(name, own).total.backward()
        assert own.grad.isfinite().all()


@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 2, 5, 1]], ids=str)
@pytest.mark.parametrize("d", [4, 30])
def test_the_effective_rank_is_the_participation_ratio_of_the_eigenvalues(sizes: list[int], d: int):
    rows = embeddings(2, sum(sizes), d, seed=8)[0]
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.numpy().T, ddof=0))
    for health in gloo.run(health_of, [(share,) for share in rows.split(sizes)]):
        assert health.effective_rank == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-9)
        assert health.std == pytest.approx(rows.numpy().std(0).mean(), rel=1e-9)


def health_of(group, rows: Tensor) -> losses.Health:
    return losses.embedding_health(rows, group=group)


def test_a_collapse_is_seen():
    line = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(8)
    assert losses.embedding_health(line).effective_rank == pytest.approx(1, abs=1e-4)
    assert losses.embedding_health(torch.ones(50, 8)) == losses.Health(std=0.0, effective_rank=0.0)
    spread = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    assert losses.embedding_health(spread).effective_rank == pytest.approx(8, rel=0.02)


def test_beta_auto_lies_on_the_papers_line():
    assert losses.beta_auto(64) == pytest.approx(0.04375)
    # The published best weights are within a factor of 2.5 of it, over 2 orders of magnitude.
    published = {64: 0.04, 128: 0.04, 256: 0.02, 512: 0.01, 1024: 0.002, 2048: 0.001, 4096: 0.0004, 8192: 0.0008}
    assert all(0.4 < losses.beta_auto(d) / best < 2.5 for d, best in published.items())


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_refused(name: str):
    with pytest.raises(ValueError, match=r"global batch has 1 image, a loss needs 2 or more"):
        ours(name, torch.ones(2, 1, 4))


def test_wrong_shapes_and_forms_are_refused():
    with pytest.raises(ValueError, match=r"got shape \[6, 4\], expected \[m, B, d\]"):
        losses.spectral(torch.ones(6, 4))
    with pytest.raises(ValueError, match=r"got shape \[1, 6, 4\]"):
        losses.vicreg(torch.ones(1, 6, 4), **WEIGHTS)
    with pytest.raises(ValueError, match="classic compares two views, got 3"):
        losses.barlow_twins(torch.ones(3, 6, 4), beta=1, form="classic")
    with pytest.raises(ValueError, match="expected mean, pairs or classic"):
        losses.barlow_twins(torch.ones(2, 6, 4), beta=1, form="median")
