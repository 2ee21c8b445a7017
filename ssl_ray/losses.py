"""Losses of many views: functions of a few moments of the embeddings, summed over all workers.

Every worker gets the value of the global batch. Its gradient is that value's times the number of workers N, since DDP
averages what the workers give: the average is then the gradient that one process with the whole batch has.

Two sums over the workers make a loss, and its backward pass needs none: first counts and means, then second moments
of what is centred on those means (sums of uncentred float32 squares lose digits where the mean is large). The means may
be constants of the backward pass, because moments around a mean do not change to first order when the mean moves. And
as all workers compute the same from the same sums, the gradient of a sum is the same everywhere: N times one's own
stands for the sum over workers. (So every worker must backpropagate the same multiple of the loss.)

Where there are fewer embeddings than dimensions, the squared moments come from the Gram matrix of the embeddings of all
workers (|Z'Z| = |ZZ'| in Frobenius norm); every worker computes all of it. Nothing loops over pairs of views.
Moments are float32 or, for float64 embeddings, float64, whatever the autocast.
The formulas are those of arXiv 2312.10725 unless another source is named.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

STANDARD_EPS = 1e-8
"""Added to the variances that embeddings are standardised by, so that a constant feature gives 0, not NaN."""
VICREG_EPS = 1e-4
"""Added to the variances under VICReg's square root, as in the original."""


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
    """(tr C)^2 / |C|^2 of the covariance C, 1 to d: the participation ratio of its eigenvalues. 0 if C is 0."""


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The global batch: images of all workers, and of those of lower rank."""

    total: int
    before: int
    group: dist.ProcessGroup | None


def beta_auto(d: int) -> float:
    """2.8 / d: the best weights found in arXiv 2312.10725 for d from 64 to 8192 fall along such a line."""
    return 2.8 / d


def barlow_twins(z: Tensor, *, beta: float, form: str = "mean", group: dist.ProcessGroup | None = None) -> LossTerms:
    """Multi-view Barlow Twins loss of the global batch.

    z: [m, B, d] embeddings of this worker, m views of B images; B may differ between workers.
    beta: weight of the off-diagonal, > 0.  group: all workers; None for one.
    form `mean`, of the mean embedding zbar: mean_v sum_k (1 - a_vk)^2 + beta sum_{i != j} Cbar_ij^2, with
    a_vk = mean_b z_vbk zbar_bk and Cbar = zbar' zbar / B.
    `pairs`: sum_k (1 - C_kk)^2 + beta sum_{i != j} C_ij^2, with C the mean cross-correlation z_u' z_v / B over all
    ordered pairs of different views: C = (m^2 Cbar - sum_v C_vv) / (m (m - 1)).
    `classic` (m = 2): the same with C = z_1' z_2 / B, each view standardised by itself (arXiv 2103.03230); the first
    two standardise each feature over all m B embeddings.  Population variance plus STANDARD_EPS throughout.
    Terms: `diagonal`, `off_diagonal`.  Raises ValueError if the global B < 2, or m != 2 for `classic`.
    """
    compute = {"mean": _MeanForm.apply, "pairs": _pairs_form, "classic": _classic_form}.get(form)
    if compute is None:
        raise ValueError(f"form: got {form!r}, expected mean, pairs or classic")
    if form == "classic" and len(z) != 2:
        raise ValueError(f"classic compares two views, got {len(z)}")
    with torch.autocast(z.device.type, enabled=False):
        z = _checked(z)
        batch, means = _means(z, group)
        diagonal, off_diagonal = compute(z, means, batch)
        return _terms(diagonal + beta * off_diagonal, diagonal=diagonal, off_diagonal=off_diagonal)


class _MeanForm(torch.autograd.Function):
    """(diagonal, off_diagonal) of the form `mean` with their gradient by hand.

    The cost is passes over z and, for batches of some hundred images, the number of operations on small arrays; autograd
    needs more of both. Arrays of the size of z are read 7 times in forward and 4 in backward, written 3 times in each.
    """

    @staticmethod
    def forward(ctx, z: Tensor, means: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
        m, _, d = z.shape
        mean = means.mean(0)
        z, drift = z - mean, means - mean
        zbar = z.mean(0)
        product = z * zbar
        with_mean = product.sum(1)
        squares = torch.mul(z, z, out=product).sum((0, 1))
        by_features = d <= batch.total
        second = zbar.T @ zbar if by_features else _padded(zbar, batch)
        with_mean, squares, second = _sum(with_mean, squares, second, group=batch.group)
        precision = 1 / (squares / (m * batch.total) + STANDARD_EPS)
        with_mean = with_mean / batch.total
        a = with_mean * precision
        own = a.mean(0)  # the diagonal of Cbar, since the sum of the views is m zbar
        if by_features:
            matrix = (second / batch.total).fill_diagonal_(0)
            off_diagonal = precision @ matrix.square() @ precision
        else:
            second = second * precision.sqrt()
            matrix = second @ second.T / batch.total
            off_diagonal = matrix.square().sum() - own.square().sum()
        ctx.batch, ctx.by_features = batch, by_features
        ctx.save_for_backward(z, zbar, drift, with_mean, precision, a, second, matrix)
        return (1 - a).square().sum(1).mean(), off_diagonal

    @staticmethod
    def backward(ctx, d_diagonal: Tensor, d_off_diagonal: Tensor) -> tuple[Tensor, None, None]:
        z, zbar, drift, with_mean, precision, a, second, matrix = ctx.saved_tensors
        batch, m = ctx.batch, len(z)
        if not _is_one(batch.group):  # as in the backward of _SumOverWorkers
            workers = dist.get_world_size(batch.group)
            d_diagonal, d_off_diagonal = d_diagonal * workers, d_off_diagonal * workers
        d_a = (a - 1) * (d_diagonal * 2 / m)
        if ctx.by_features:
            d_precision = matrix.square() @ precision * (2 * d_off_diagonal)
            d_zbar = (zbar * precision) @ matrix * (precision * (4 / batch.total * d_off_diagonal))
        else:
            d_a = d_a - a.mean(0) * (2 / m * d_off_diagonal)
            d_second = matrix @ second * (4 / batch.total * d_off_diagonal)
            d_precision = (d_second * second).sum(0) / (2 * precision)
            d_zbar = d_second[batch.before : batch.before + len(zbar)] * precision.sqrt()
        d_precision = d_precision + (d_a * with_mean).sum(0)
        d_squares = -d_precision * precision.square() / (m * batch.total)
        weight = d_a * precision / batch.total
        # As z is centred on the joint mean and the means are constants here, a view's own mean, which differs, is taken off.
        out = z * weight[:, None]
        through_zbar = (d_zbar + out.sum(0) - (weight * drift).sum(0)) / m
        torch.addcmul(through_zbar, z, 2 * d_squares, out=out).addcmul_(weight[:, None], zbar)
        return out, None, None


def _pairs_form(z: Tensor, means: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
    m, _, d = z.shape
    z = z - means.mean(0)
    zbar = z.mean(0)
    pairs = m * (m - 1) * batch.total
    if d <= (m + 1) * batch.total:
        every = _product(z.flatten(0, 1))
        squares, c = _sum(every.diagonal(), (m * m * _product(zbar) - every) / pairs, group=batch.group)
        precision = 1 / (squares / (m * batch.total) + STANDARD_EPS)
        own = c.diagonal() * precision
        off_diagonal = _off_diagonal(c, precision, precision)
    else:
        squares = z.square().sum((0, 1))
        own = (m * m * zbar.square().sum(0) - squares) / pairs
        own, squares, rows = _sum(own, squares, _padded(torch.cat([zbar[None], z]), batch), group=batch.group)
        precision = 1 / (squares / (m * batch.total) + STANDARD_EPS)
        own = own * precision
        # C is a sum of outer products of the rows x_k of the mean and of the views, of signs and weights w_k, so
        # |C|^2 = sum_kl w_k w_l (x_k x_l)^2.
        weights = z.new_full((m + 1, batch.total), -1 / pairs)
        weights[0] = m * m / pairs
        gram = _product((rows * precision.sqrt()).flatten(0, 1).T)
        off_diagonal = weights.flatten() @ gram.square() @ weights.flatten() - own.square().sum()
    return (1 - own).square().sum(), off_diagonal


def _classic_form(z: Tensor, means: Tensor, batch: _Batch) -> tuple[Tensor, Tensor]:
    z = z - means[:, None]
    by_features = z.shape[-1] <= 2 * batch.total
    own, squares, second = _sum(
        (z[0] * z[1]).sum(0),
        z.square().sum(1),
        z[0].T @ z[1] if by_features else _padded(z, batch),
        group=batch.group,
    )
    precision = 1 / (squares / batch.total + STANDARD_EPS)  # [2, d]
    own = own / batch.total * precision.prod(0).sqrt()
    if by_features:
        off_diagonal = _off_diagonal(second / batch.total, precision[0], precision[1])
    else:
        # |Z1' Z2|^2 is the sum over entries of (Z1 Z1') * (Z2 Z2').
        grams = _product((second * precision.sqrt()[:, None]).mT)
        off_diagonal = (grams[0] * grams[1]).sum() / batch.total**2 - own.square().sum()
    return (1 - own).square().sum(), off_diagonal


def vicreg(
    z: Tensor, *, invariance: float, variance: float, covariance: float, group: dist.ProcessGroup | None = None
) -> LossTerms:
    """Multi-view VICReg loss of the global batch (arXiv 2105.04906 for two views).

    z: [m, B, d] embeddings of this worker; B may differ between workers.  group: all workers; None for one.
    The other arguments are the weights of the terms, each a mean over views:
    `invariance`: the mean over pairs of views and images of |z_u - z_v|^2 / d = 2m/(m-1) mean_v |z_v - zbar|^2 / d.
    `variance`: mean_k relu(1 - std_k) with std = sqrt(var + VICREG_EPS).  `covariance`: sum_{i != j} Cov_ij^2 / d.
    Variances and covariances divide by B - 1.
    For m = 2 the first two are the original's; its covariance term is the sum over the two views, so twice this one:
    the original's weights 25, 25, 1 are 25, 25, 2 here.  Raises ValueError if the global B < 2.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = _checked(z)
        m, _, d = z.shape
        batch, means = _means(z, group)
        z = z - means[:, None]
        # Differences of the views as they are, without the rounding of their large common mean.
        spread = (z - z.mean(0) + (means - means.mean(0))[:, None]).square().sum()
        by_features = d <= batch.total
        spread, own, second = _sum(spread, z.square().sum(1), _product(z) if by_features else _padded(z, batch), group=group)
        distance = spread * (2 / ((m - 1) * batch.total * d))
        own = own / (batch.total - 1)  # [m, d]
        hinge = torch.relu(1 - (own + VICREG_EPS).sqrt()).mean()
        if by_features:
            off_diagonal = _without_diagonal(second / (batch.total - 1)).square().sum() / (m * d)
        else:
            everything = _product(second.mT).square().sum() / (batch.total - 1) ** 2
            off_diagonal = (everything - own.square().sum()) / (m * d)
        loss = invariance * distance + variance * hinge + covariance * off_diagonal
        return _terms(loss, invariance=distance, variance=hinge, covariance=off_diagonal)


def spectral(z: Tensor, *, group: dist.ProcessGroup | None = None) -> LossTerms:
    """Spectral contrastive loss of the global batch (arXiv 2106.04156): -2 E<z, z+> + E<z, z'>^2.

    z: [m, B, d] embeddings of this worker; B may differ between workers.  group: all workers; None for one.
    Positives are the ordered pairs of different views of an image, negatives all pairs of embeddings of different
    images.
    Terms: `positive` E<z, z+>, `negative` E<z, z'>^2.  Raises ValueError if the global B < 2.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = _checked(z)
        m, _, d = z.shape
        batch = _count(z, group)
        by_features = d <= m * batch.total
        positive, same_image, second = _sum(
            z.sum(0).square().sum() - z.square().sum(),
            (z.transpose(0, 1) @ z.permute(1, 2, 0)).square().sum(),  # of [B, m, m]
            _product(z.flatten(0, 1)) if by_features else _padded(z, batch),
            group=group,
        )
        everything = (second if by_features else _product(second.flatten(0, 1).T)).square().sum()
        positive = positive / (batch.total * m * (m - 1))
        negative = (everything - same_image) / (batch.total * (batch.total - 1) * m * m)
        return _terms(negative - 2 * positive, positive=positive, negative=negative)


@torch.no_grad()
def embedding_health(z: Tensor, *, group: dist.ProcessGroup | None = None) -> Health:
    """Spread of the embeddings or representations z [n, d] of all workers. Costs their covariance, no eigenvalues.

    A collapse shows as a rank of 1 (all on a line) or a std of 0.  Raises ValueError for fewer than two rows in all.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = _at_least_float32(z)[None]
        batch, means = _means(z, group)
        z = z[0] - means
        by_features = z.shape[1] <= batch.total
        own, second = _sum(z.square().sum(0), _product(z) if by_features else _padded(z, batch), group=group)
        squared = (second if by_features else _product(second.T)).square().sum().item()
        return Health((own / batch.total).sqrt().mean().item(), own.sum().item() ** 2 / squared if squared else 0.0)


# Algebra of moments


class _Product(torch.autograd.Function):
    """x' x of x [..., n, d]; the gradient takes one matrix product, not the two of autograd."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.mT @ x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x @ (grad + grad.mT)


def _product(x: Tensor) -> Tensor:
    return _Product.apply(x)


def _without_diagonal(x: Tensor) -> Tensor:
    return x.masked_fill(torch.eye(x.shape[-1], dtype=torch.bool, device=x.device), 0)


def _off_diagonal(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_{i != j} x_ij^2 left_i right_j: of a moment matrix and one over the variances of its features."""
    return left @ _without_diagonal(x).square() @ right


def _terms(total: Tensor, **terms: Tensor) -> LossTerms:
    return LossTerms(total, {name: value.detach() for name, value in terms.items()})


def _at_least_float32(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _checked(z: Tensor) -> Tensor:
    if z.ndim != 3 or z.shape[0] < 2:
        raise ValueError(f"z: got shape {list(z.shape)}, expected [m, B, d] with m >= 2")
    return _at_least_float32(z)


# Sums over workers


def _is_one(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1


class _SumOverWorkers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.workers = dist.get_world_size(group)
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # The sum over the workers of their gradients, which are all the same.
        return grad * ctx.workers, None


def _sum(*parts: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Each part summed over the workers, in one message."""
    if group is None or _is_one(group):
        return parts
    summed = _SumOverWorkers.apply(torch.cat([part.flatten() for part in parts]), group)
    split = summed.split([part.numel() for part in parts])
    return tuple(piece.view(part.shape) for piece, part in zip(split, parts, strict=True))


def _padded(x: Tensor, batch: _Batch) -> Tensor:
    """x [..., B, d] between zeros, [..., total, d]: the sum over workers is the rows of all, in order of rank."""
    if _is_one(batch.group):
        return x
    return torch.nn.functional.pad(x, (0, 0, batch.before, batch.total - batch.before - x.shape[-2]))


def _count(z: Tensor, group: dist.ProcessGroup | None) -> _Batch:
    return _means(z[..., :0], group)[0]


def _means(z: Tensor, group: dist.ProcessGroup | None) -> tuple[_Batch, Tensor]:
    """The global batch, and the means [m, d] of its views as constants. Raises ValueError for fewer than two images."""
    sums = z.detach().sum(1)
    if group is None or _is_one(group):
        counts, before = [z.shape[1]], 0
    else:
        workers, rank = dist.get_world_size(group), dist.get_rank(group)
        # Counts fit the moments' float32 up to 2^24 images.
        message = torch.cat([sums.new_zeros(workers), sums.flatten()])
        message[rank] = z.shape[1]
        dist.all_reduce(message, group=group)
        counts = [int(count) for count in message[:workers].tolist()]
        before, sums = sum(counts[:rank]), message[workers:].view_as(sums)
    total = sum(counts)
    if total < 2:
        raise ValueError(f"the global batch has {total} image, a loss needs 2 or more")
    return _Batch(total, before, group), sums / total
