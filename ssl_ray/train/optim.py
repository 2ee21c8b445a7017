"""Optimisers by name and the learning rate of a step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lars": 1, "muon": 1}
"""Numbers that an optimiser keeps for each weight (muon two for those of vectors, which are few)."""


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rises linearly over `warmup_steps` to `peak`, then falls along a cosine, to 0 after `total_steps`; steps from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float):
    """adam, adamw, sgd (momentum .9), lars or muon; weight decay as each defines it."""
    parameters = list(parameters)
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        case "sgd":
            return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)
        case "lars":
            return Lars(parameters, lr=lr, weight_decay=weight_decay)
        case "muon":
            return Muon(parameters, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"unknown optimizer {name!r}")


class _EachAlone(torch.optim.Optimizer):
    """Steps parameter by parameter, as `_step_of` says."""

    def __init__(self, params, *, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_of(p, p.grad, lr=group["lr"], weight_decay=group["weight_decay"])

    def _step_of(self, p: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        raise NotImplementedError

    def _slot(self, p: Tensor, name: str, like: Tensor) -> Tensor:
        """The tensor `name` of the state of `p`; zeros like `like` before the first step."""
        state = self.state[p]
        if name not in state:
            state[name] = torch.zeros_like(like)
        return state[name]


class Lars(_EachAlone):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888) with momentum .9 and trust coefficient .001.

    Vectors (biases, normalisation) take neither the adaptation nor the weight decay, as is usual for self-supervision.
    """

    def _step_of(self, p: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        momentum = self._slot(p, "momentum_buffer", p)
        momentum.mul_(0.9).add_(self._adapted(p, grad, weight_decay=weight_decay))
        p.add_(momentum, alpha=-lr)

    @staticmethod
    def _adapted(p: Tensor, grad: Tensor, *, weight_decay: float) -> Tensor:
        if p.ndim < 2:
            return grad
        update = grad + weight_decay * p
        p_norm, u_norm = p.norm(), update.norm()
        rate = torch.where((p_norm > 0) & (u_norm > 0), 1e-3 * p_norm / u_norm, torch.ones_like(p_norm))
        return update * rate


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition U S V^T of a matrix (a, b), about: singular values of 0.7 to 1.2.

    Five iterations of a polynomial (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), in the type of `matrix`.
    """
    is_tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if is_tall else x


class Muon(_EachAlone):
    """Momentum .95, made orthogonal (see there): every direction of a weight matrix moves as far as every other.

    That is lr * .2 sqrt(max(a, b)) of a matrix (a, b), about as with Adam (Liu et al., arXiv 2502.16982); a convolution is one of
    outputs x all else. Vectors take Adam's steps, betas .9 and .95. Weight decay comes off the matrices, as with adamw.
    """

    def _step_of(self, p: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        if p.ndim < 2:
            self._step_vector(p, grad, lr=lr)
        else:
            self._step_matrix(p, grad, lr=lr, weight_decay=weight_decay)

    def _step_matrix(self, p: Tensor, grad: Tensor, *, lr: float, weight_decay: float) -> None:
        momentum = self._slot(p, "momentum_buffer", p).lerp_(grad, 0.05)
        update = orthogonal(grad.lerp(momentum, 0.95).flatten(1))
        p.mul_(1 - lr * weight_decay).add_(update.view_as(p), alpha=-lr * 0.2 * max(update.shape) ** 0.5)

    def _step_vector(self, p: Tensor, grad: Tensor, *, lr: float) -> None:
        step = self._slot(p, "step", torch.zeros(())).add_(1).item()
        mean = self._slot(p, "exp_avg", p).lerp_(grad, 0.1)
        square = self._slot(p, "exp_avg_sq", p).lerp_(grad.square(), 0.05)
        p.addcdiv_(mean / (1 - 0.9**step), (square / (1 - 0.95**step)).sqrt() + 1e-8, value=-lr)
