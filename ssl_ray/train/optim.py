"""Optimisers by name and the learning rate of a step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rises linearly over `warmup_steps` to `peak`, then falls along a cosine, to 0 after `total_steps`; steps from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float):
    """adam, adamw, sgd (momentum .9) or lars; weight decay as each defines it."""
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
    raise ValueError(f"unknown optimizer {name!r}")


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888) with momentum .9 and trust coefficient .001.

    Vectors (biases, normalisation) take neither the adaptation nor the weight decay, as is usual for self-supervision.
    """

    def __init__(self, params, *, lr: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = self._adapted(p, weight_decay=group["weight_decay"])
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(0.9).add_(update)
                p.add_(state["momentum_buffer"], alpha=-group["lr"])

    @staticmethod
    def _adapted(p: Tensor, *, weight_decay: float) -> Tensor:
        if p.ndim < 2:
            return p.grad  # type: ignore[return-value]
        update = p.grad + weight_decay * p  # type: ignore[operator]
        p_norm, u_norm = p.norm(), update.norm()
        rate = torch.where((p_norm > 0) & (u_norm > 0), 1e-3 * p_norm / u_norm, torch.ones_like(p_norm))
        return update * rate
