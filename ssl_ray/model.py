"""Encoder and projector, and batch norm over all workers."""

import difflib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_ray.errors import UsageError

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
"""Pixels, 0 to 1, are shifted and scaled by these, whatever the data set."""
SMALL_IMAGE_PX = 64
"""Up to this size ResNets get a 3x3 stem of stride 1 without max-pool, as is usual for CIFAR and STL-10."""

# The base of BatchNorm1d, 2d and 3d.
_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Normalize(torch.autograd.Function):
    """Standardises x [n, C, ...] by mean and variance over all workers, with weight and bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup):
        axes = [axis for axis in range(x.ndim) if axis != 1]
        local_variance, local_mean = torch.var_mean(x.float(), axes, correction=0)
        count, mean, variance = _combine(x.numel() // x.shape[1], local_mean, local_variance, group)
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.group, ctx.count, ctx.axes = group, count, axes
        ctx.mark_non_differentiable(mean, variance)
        gain = _channels(weight * scale, x)
        y = torch.addcmul(_channels(bias - mean * weight * scale, x), x.float(), gain).to(x.dtype)
        return y, mean, variance, count

    @staticmethod
    def backward(ctx, dy: Tensor, *_):  # type: ignore[override]
        x, weight, mean, scale = ctx.saved_tensors
        dy_f = dy.float()
        normal = (x.float() - _channels(mean, x)) * _channels(scale, x)
        sums = torch.stack([dy_f.sum(ctx.axes), (dy_f * normal).sum(ctx.axes)])
        d_bias, d_weight = sums.clone()
        dist.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_normal = sums / ctx.count
        dx = dy_f - _channels(mean_dy, x) - normal * _channels(mean_dy_normal, x)
        return (dx * _channels(weight * scale, x)).to(x.dtype), d_weight, d_bias, None, None


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...]."""
    return values.view(1, -1, *(1,) * (like.ndim - 2))


def _combine(
    count: int, mean: Tensor, variance: Tensor, group: dist.ProcessGroup
) -> tuple[int, Tensor, Tensor]:
    """Count, mean and population variance over all workers, from each one's (Chan et al., 1979), in float64."""
    parts = torch.zeros(dist.get_world_size(group), 1 + 2 * len(mean), dtype=torch.float64, device=mean.device)
    parts[dist.get_rank(group)] = torch.cat([mean.new_tensor([count]), mean, variance])
    dist.all_reduce(parts, group=group)
    counts, means, variances = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
    total = counts.sum()
    whole = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - whole).square())).sum(0) / total
    return int(total), whole.to(mean.dtype), spread.to(mean.dtype)


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of all workers' batches; torch's SyncBatchNorm refuses CPU tensors.

    Parameters, buffers and evaluation are those of nn.BatchNorm; so is training with one worker. Shares may be unequal.
    Under DDP the gradients average to those of one process with the whole batch.
    """

    def __init__(self, num_features: int, *, eps: float, momentum: float | None, group: dist.ProcessGroup):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        y, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), rate)
        return y


def globalize_batch_norm(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replaces every nn.BatchNorm below `module` by a GlobalBatchNorm of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            new = GlobalBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum, group=group)
            new.load_state_dict(child.state_dict())
            setattr(module, name, new)
        else:
            globalize_batch_norm(child, group)


# Encoders -----------------------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, stride: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.first, self.second = _conv(inputs, outputs, stride), _conv(outputs, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, stride, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class SmallEncoder(nn.Module):
    """Residual encoder for CPUs: [B, C, H, W] -> [B, 128]; a stem and three blocks, halving the image in each but one."""

    num_features = 128

    def __init__(self, channels: int):
        super().__init__()
        self.stem = _conv(channels, 32, stride=2)
        self.blocks = nn.Sequential(_Block(32, 32, 1), _Block(32, 64, 2), _Block(64, 128, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x))).mean((2, 3))


class _TorchvisionEncoder(nn.Module):
    """A torchvision classifier without its last linear layer; one channel is repeated to the three that it takes."""

    def __init__(self, name: str, size_px: int):
        super().__init__()
        from torchvision import models

        known = models.list_models(module=models)
        if name not in known:
            near = difflib.get_close_matches(name, ["small", *known], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"model.encoder: no encoder {name}, expected small or a torchvision classifier.{hint}")
        options = {"image_size": size_px} if name.startswith("vit_") else {}
        try:
            self.body = models.get_model(name, weights=None, **options)
        except (ValueError, AssertionError) as error:
            raise UsageError(f"model.encoder: {name} does not take images of {size_px} px ({error}).") from error
        if isinstance(self.body, models.ResNet) and size_px <= SMALL_IMAGE_PX:
            width = self.body.conv1.out_channels
            self.body.conv1 = nn.Conv2d(3, width, 3, 1, padding=1, bias=False)
            self.body.maxpool = nn.Identity()  # type: ignore[assignment]
        linear = [(where, module) for where, module in self.body.named_modules() if isinstance(module, nn.Linear)]
        where, last = linear[-1]
        parent, _, attribute = where.rpartition(".")
        setattr(self.body.get_submodule(parent), attribute, nn.Identity())
        self.num_features = last.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.expand(-1, 3, -1, -1))


def build_encoder(name: str, *, channels: int, size_px: int) -> nn.Module:
    """`small`, or a torchvision classifier by name (no weights): float [B, C, H, W] -> [B, num_features].

    Raises UsageError for an unknown name, or an encoder that does not give one feature vector for such images.
    """
    if name == "small":
        return SmallEncoder(channels)
    encoder = _TorchvisionEncoder(name, size_px)
    try:
        encoder.eval()
        with torch.no_grad():
            h = encoder(torch.zeros(1, channels, size_px, size_px))
        fits = isinstance(h, Tensor) and h.shape == (1, encoder.num_features)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"model.encoder: {name} does not take images of {size_px} px ({error}).") from error
    finally:
        encoder.train()
    if not fits:
        raise UsageError(f"model.encoder: {name} does not end in a linear layer on one feature vector. Use another.")
    return encoder


def build_projector(inputs: int, *, dim: int, width: int, depth: int, norm: str) -> nn.Sequential:
    """[B, inputs] -> [B, dim]: `depth` linear layers; `norm` and ReLU between them, of `width` features."""
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers.append(nn.Linear(inputs, width, bias=norm == "none"))
        if norm != "none":
            layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
        layers.append(nn.ReLU())
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, dim))


class Network(nn.Module):
    """Views to embeddings; `features` is what is kept after pretraining."""

    def __init__(self, encoder: nn.Module, projector: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def features(self, images: Tensor) -> Tensor:
        """h [n, D] of uint8 [n, C, H, W], normalised on the device of the weights."""
        device = next(self.parameters()).device
        x = images.to(device).to(memory_format=torch.channels_last)
        return self.encoder(x.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD))

    def forward(self, views: Tensor) -> Tensor:
        """z [m, B, d] of uint8 [B, m, C, H, W]: all views in one pass, with joint batch statistics."""
        batch, m = views.shape[:2]
        z = self.projector(self.features(views.flatten(0, 1)))
        # [B m, d], image by image -> [m, B, d]
        return z.view(batch, m, -1).transpose(0, 1)


def build_network(
    encoder: str,
    *,
    channels: int,
    size_px: int,
    projector_dim: int,
    projector_width: int | None,
    projector_depth: int,
    projector_norm: str,
    seed: int,
    global_batch_norm: dist.ProcessGroup | None,
) -> Network:
    """The network with initial weights drawn from `seed` alone.

    global_batch_norm: the workers over which batch norm takes its statistics; None: each for itself.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = build_encoder(encoder, channels=channels, size_px=size_px)
        width = projector_dim if projector_width is None else projector_width
        inputs: int = body.num_features  # type: ignore[assignment]
        head = build_projector(inputs, dim=projector_dim, width=width, depth=projector_depth, norm=projector_norm)
        network = Network(body, head)
    if global_batch_norm is not None:
        globalize_batch_norm(network, global_batch_norm)
    return network.to(memory_format=torch.channels_last)
