"""Losses of many views: functions of a few moments of the embeddings, summed over all workers.

Every worker gets the value of the global batch. Gradients are those of that value times the number of workers, since DDP
averages what the workers give: the average is then the gradient that one process with the whole batch has. (The backward
of a sum over workers is a sum over workers.) Means come first, then centred second moments: sums of uncentred float32
squares lose digits where the mean is large. Where there are fewer embeddings than dimensions, the same squared sums come
from the Gram matrix of the embeddings of all workers (|Z'Z| = |ZZ'| in Frobenius norm). Nothing loops over pairs of views.
The formulas are those of arXiv 2312.10725 unless another source is named.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

STANDARD_EPS = 1e-8
"""Added to the variances that embeddings are standardised by, so that a constant feature gives 0, not NaN."""
VICREG_EPS = 1e-4


@dataclasses.dataclass(frozen=True)
class LossTerms:
    total: Tensor
    """Scalar, to be differentiated."""
    terms: dict[str, Tensor]
    """Its parts by name, detached, before their weights."""


@dataclasses.dataclass(frozen=True)
class Health:
    std: float
    """Mean over the features of their standard deviation."""
    effective_rank: float
    """(tr C)^2 / |C|^2 of the covariance C, 1 to d: the participation ratio of its eigenvalues."""


def beta_auto(d: int) -> float:
    """2.8 / d: the best weights found in arXiv 2312.10725 for d from 64 to 8192 fall along such a line."""
    return 2.8 / d


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the workers; x itself for one."""
    return x if group is None or dist.get_world_size(group) == 1 else _SumOverWorkers.apply(x, group)


def _count(batch: int, z: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Images of all workers, and of those of lower rank. Raises ValueError for fewer than two."""
    if group is None or dist.get_world_size(group) == 1:
        total, before = batch, 0
    else:
        counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=z.device)
        counts[dist.get_rank(group)] = batch
        dist.all_reduce(counts, group=group)
        total, before = int(counts.sum()), int(counts[: dist.get_rank(group)].sum())
    if total < 2:
        raise ValueError(f"the global batch has {total} image, a loss needs 2 or more")
    return total, before


def _all_rows(x: Tensor, total: int, before: int, group: dist.ProcessGroup | None) -> Tensor:
    """x [..., B, d] of all workers, [..., total, d], in order of rank: a sum of zero-padded parts."""
    if x.shape[-2] == total:
        return x
    padded = torch.nn.functional.pad(x, (0, 0, before, total - before - x.shape[-2]))
    return _sum(padded, group)


def _entry(z: Tensor) -> Tensor:
    if z.ndim != 3 or z.shape[0] < 2:
        raise ValueError(f"z: got shape {list(z.shape)}, expected [m, B, d] with m >= 2")
    return z if z.dtype == torch.float64 else z.float()


def barlow_twins(
    z: Tensor, *, beta: float, form: str = "mean", group: dist.ProcessGroup | None = None
) -> LossTerms:
    """Multi-view Barlow Twins loss of the global batch.

    z: [m, B, d] embeddings of this worker, m views of B images.  beta: weight of the off-diagonal, > 0.
    form: `mean`, of the mean embedding: mean_v sum_k (1 - a_vk)^2 + beta sum_{i != j} Cbar_ij^2, with
    a_vk = mean_b z_vbk zbar_bk and Cbar = zbar' zbar / B;  `pairs`, with the mean cross-correlation over all ordered pairs of
    different views: sum_k (1 - C_kk)^2 + beta sum_{i != j} C_ij^2;  `classic` (m = 2), with the cross-correlation of the two
    views, each standardised by itself (arXiv 2103.03230).  The first two standardise each feature over all m B embeddings.
    Terms: `diagonal`, `off_diagonal`.  Raises ValueError if the global B < 2, or m != 2 for `classic`.
    """
    z = _entry(z)
    m, batch, d = z.shape
    if form == "classic" and m != 2:
        raise ValueError(f"classic compares two views, got {m}")
    total, before = _count(batch, z, group)
    # Of each view by itself for classic, of all together else: [m or 1, 1, d]
    over = (1,) if form == "classic" else (0, 1)
    rows = total * (1 if form == "classic" else m)
    z = z - _sum(z.sum(over, keepdim=True), group) / rows
    variance = _sum(z.square().sum(over, keepdim=True), group) / rows
    z = z * (variance + STANDARD_EPS).rsqrt()
    match form:
        case "mean":
            zbar = z.mean(0)
            a = _sum((z * zbar).sum(1), group) / total  # [m, d]
            diagonal = (1 - a).square().sum(1).mean()
            everything = _squared_moments(zbar, torch.ones(batch, dtype=z.dtype), total, before, group)
            own = _sum(zbar.square().sum(0), group) / total  # the diagonal of Cbar
        case "pairs":
            # C is a signed sum of outer products: m^2 zbar zbar' - sum_v z_v z_v', over m (m - 1) B.
            parts = torch.cat([z.mean(0, keepdim=True), z])  # [m + 1, B, d]
            weights = torch.full((m + 1, batch), -1.0, dtype=z.dtype)
            weights[0] = m * m
            weights = weights / (m * (m - 1))
            own = _sum((weights.to(z.device)[..., None] * parts.square()).sum((0, 1)), group) / total
            diagonal = (1 - own).square().sum()
            everything = _squared_moments(parts, weights, total, before, group)
        case "classic":
            own = _sum((z[0] * z[1]).sum(0), group) / total
            diagonal = (1 - own).square().sum()
            everything = _squared_cross(z[0], z[1], total, before, group)
        case _:
            raise ValueError(f"form: got {form!r}, expected mean, pairs or classic")
    off_diagonal = everything - own.square().sum()
    return _terms(diagonal + beta * off_diagonal, diagonal=diagonal, off_diagonal=off_diagonal)


def _terms(total: Tensor, **terms: Tensor) -> LossTerms:
    return LossTerms(total, {name: value.detach() for name, value in terms.items()})


def _squared_moments(
    x: Tensor, weights: Tensor, total: int, before: int, group: dist.ProcessGroup | None
) -> Tensor:
    """|sum_b w_b x_b x_b' / total|^2 (Frobenius) over the rows x [..., B, d] of all workers, weights [..., B]."""
    weights, sets = weights.to(x.device), x[..., 0, 0].numel()
    if x.shape[-1] <= sets * total:
        moments = (x * weights[..., None]).flatten(0, -2).T @ x.flatten(0, -2)
        return (_sum(moments, group) / total).square().sum()
    rows = _all_rows(x, total, before, group).flatten(0, -2)
    w = _all_rows(weights[..., None], total, before, group).flatten()
    return ((rows @ rows.T).square() * w[:, None] * w).sum() / total**2


def _squared_cross(x: Tensor, y: Tensor, total: int, before: int, group: dist.ProcessGroup | None) -> Tensor:
    """|x' y / total|^2 over the rows of all workers: the sum over entries of (x x') * (y y') on the smaller side."""
    if x.shape[-1] <= total:
        return (_sum(x.T @ y, group) / total).square().sum()
    x, y = _all_rows(torch.stack([x, y]), total, before, group)
    return ((x @ x.T) * (y @ y.T)).sum() / total**2


def vicreg(
    z: Tensor, *, invariance: float, variance: float, covariance: float, group: dist.ProcessGroup | None = None
) -> LossTerms:
    """Multi-view VICReg loss of the global batch (arXiv 2105.04906 for two views).

    z: [m, B, d].  The arguments are the weights of its terms, each a mean over views:  `invariance`, the mean over pairs of
    views and images of |z_u - z_v|^2 / d, by the identity 2m/(m-1) mean_v |z_v - zbar|^2;  `variance`, mean_k relu(1 - std_k),
    std = sqrt(var + 1e-4);  `covariance`, sum_{i != j} Cov_ij^2 / d.  Variances and covariances divide by B - 1.
    For m = 2 this is the original but for its covariance term, which sums over the two views (so weigh it 2 here).
    Raises ValueError if the global B < 2.
    """
    z = _entry(z)
    m, batch, d = z.shape
    total, before = _count(batch, z, group)
    spread = (z - z.mean(0)).square().sum()
    distance = _sum(spread, group) * (2 / ((m - 1) * total * d))
    z = z - _sum(z.sum(1, keepdim=True), group) / total  # each view by itself
    own = _sum(z.square().sum(1), group) / (total - 1)  # [m, d]
    hinge = torch.relu(1 - (own + VICREG_EPS).sqrt()).mean()
    if d <= total:
        moments = _sum(z.transpose(1, 2) @ z, group) / (total - 1)  # [m, d, d]
        everything = moments.square().sum((1, 2))
    else:
        rows = _all_rows(z, total, before, group)
        everything = (rows @ rows.transpose(1, 2)).square().sum((1, 2)) / (total - 1) ** 2
    off_diagonal = (everything - own.square().sum(1)).mean() / d
    loss = invariance * distance + variance * hinge + covariance * off_diagonal
    return _terms(loss, invariance=distance, variance=hinge, covariance=off_diagonal)


def spectral(z: Tensor, *, group: dist.ProcessGroup | None = None) -> LossTerms:
    """Spectral contrastive loss of the global batch (arXiv 2106.04156): -2 E<z, z+> + E<z, z'>^2.

    z: [m, B, d].  Positives are the ordered pairs of different views of an image, negatives the pairs of embeddings of
    different images.  Terms: `positive` E<z, z+>, `negative` E<z, z'>^2.  Raises ValueError if the global B < 2.
    """
    z = _entry(z)
    m, batch, d = z.shape
    total, before = _count(batch, z, group)
    sums = z.sum(0)
    positive = _sum(sums.square().sum() - z.square().sum(), group) / (total * m * (m - 1))
    if d <= m * total:
        flat = z.flatten(0, 1)
        everything = _sum(flat.T @ flat, group).square().sum()
    else:
        rows = _all_rows(z, total, before, group).flatten(0, 1)
        everything = (rows @ rows.T).square().sum()
    per_image = z.transpose(0, 1) @ z.permute(1, 2, 0)  # [B, m, m]
    negative = (everything - _sum(per_image.square().sum(), group)) / (total * (total - 1) * m * m)
    return _terms(negative - 2 * positive, positive=positive, negative=negative)


@torch.no_grad()
def embedding_health(z: Tensor, *, group: dist.ProcessGroup | None = None) -> Health:
    """Spread of the embeddings z [n, d] of all workers. A collapse shows as a rank of 1, or a std of 0."""
    z = z.float()
    total, before = _count(len(z), z, group)
    z = z - _sum(z.sum(0), group) / total
    own = _sum(z.square().sum(0), group) / total
    squared = _squared_moments(z, torch.ones(len(z)), total, before, group)
    trace = own.sum()
    rank = (trace.square() / squared).item() if squared > 0 else 0.0
    return Health(own.sqrt().mean().item(), rank)
