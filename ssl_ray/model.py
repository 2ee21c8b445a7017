"""Encoder and projector, and batch norm over all workers."""

import difflib
import threading

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_ray.errors import UsageError

PIXEL_MEAN, PIXEL_STD = 0.5, 0.25
"""Pixels, 0 to 1, are shifted and scaled by these, whatever the data set."""
SMALL_IMAGE_PX = 64
"""Up to this size ResNets get a 3x3 stem of stride 1 without max-pool, as is usual for CIFAR and STL-10."""

default_generator_lock = threading.Lock()
"""Held by whoever seeds torch's default generator until the draws are made: in one process a read-out may build its network
in one thread while another trains, and either would draw from the other's numbers."""

# The base of BatchNorm1d, 2d and 3d.
_BatchNorm = nn.modules.batchnorm._BatchNorm


class _Normalize(torch.autograd.Function):
    """Standardises x [n, C, ...] by mean and variance over all workers, with weight and bias; passes are torch's own.

    x may be bfloat16 with float32 weights: everything per channel then is float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup):
        # The buffers, which momentum 0 leaves alone, make statistics of their own type of bfloat16 input.
        local = torch.batch_norm_update_stats(x, torch.zeros_like(weight), torch.ones_like(weight), 0.0)
        count, mean, variance = _combine(x.numel() // x.shape[1], *local, group)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.group, ctx.count, ctx.eps = group, count, eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, weight, mean, variance = ctx.saved_tensors
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        # dx here is that of given statistics: weight / std * dy.
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([d_weight, d_bias])
        dist.all_reduce(sums, group=ctx.group)
        # What the statistics add: -weight / std * (mean of dy + normal * mean of dy * normal), normal standardised x.
        d_normal, d_mean = sums * (weight * (variance + ctx.eps).rsqrt() / -ctx.count)
        return dx.add_(F.batch_norm(x, mean, variance, d_normal, d_mean, eps=ctx.eps)), d_weight, d_bias, None, None


def _combine(count: int, mean: Tensor, variance: Tensor, group: dist.ProcessGroup) -> tuple[int, Tensor, Tensor]:
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

    Parameters, buffers and evaluation are those of nn.BatchNorm; so is training with one worker. Shares may be unequal,
    but not empty.
    Under DDP the gradients average to those of one process with the whole batch.
    """

    def __init__(self, num_features: int, *, eps: float, momentum: float | None, group: dist.ProcessGroup | None):
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, f"batch norm of shape {list(input.shape)}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.group is None or dist.get_world_size(self.group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        y, mean, variance, count = _Normalize.apply(input, self.weight, self.bias, self.eps, self.group)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * (count / (count - 1)), rate)
        return y


def convert_batch_norm(module: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """`module` with a GlobalBatchNorm over `group` of the same name and tensors for every nn.BatchNorm1d and 2d in it.

    Changes `module` in place and returns it, or its replacement if it is a batch norm itself.
    """
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        new = GlobalBatchNorm(module.num_features, eps=module.eps, momentum=module.momentum, group=group)
        new.load_state_dict(module.state_dict(), assign=True)  # assign: keeps device and dtype
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child, group))
    return module


# Encoders


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
    """Residual encoder for CPUs: [B, C, H, W] -> [B, 128]; stem and three blocks, all but the first halving H and W."""

    num_features = 128

    def __init__(self, channels: int):
        super().__init__()
        self.stem = _conv(channels, 32, stride=2)
        self.blocks = nn.Sequential(_Block(32, 32, 1), _Block(32, 64, 2), _Block(64, 128, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x))).mean((2, 3))


class _TorchvisionEncoder(nn.Module):
    """A torchvision classifier without its last linear layer, whose name is `classifier`, and the dropout before it."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        where, last = [(name, part) for name, part in body.named_modules() if isinstance(part, nn.Linear)][-1]
        parent = body.get_submodule(where.rpartition(".")[0])
        for name, child in parent.named_children():
            if child is last or isinstance(child, nn.Dropout):
                setattr(parent, name, nn.Identity())
        self.classifier, self.num_features = where, last.in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def torchvision_options(name: str, *, size_px: int) -> dict[str, object]:
    """What torchvision's model `name` is made with for images of `size_px`."""
    if name.startswith("vit_"):
        return {"image_size": size_px}
    if name.startswith("maxvit_"):
        return {"input_size": (size_px, size_px)}
    # Else their output in training is a tuple with that of side classifiers.
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _torchvision_classifier(name: str, *, channels: int, size_px: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, ["small", *known], n=1)
        hint = f" Did you mean {near[0]}?" if near else " For example resnet18."
        raise UsageError(f"model.encoder: got {name}, expected small or a torchvision classification model.{hint}")
    body = models.get_model(name, weights=None, **torchvision_options(name, size_px=size_px))
    if not any(isinstance(part, nn.Linear) for part in body.modules()):
        raise UsageError(f"model.encoder: {name} has no linear layer whose input could be features. Use another.")
    if isinstance(body, models.ResNet) and size_px <= SMALL_IMAGE_PX:
        body.conv1 = nn.Conv2d(3, body.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNet
        body.maxpool = nn.Identity()
    if channels == 1:
        # Colours summed: the same function of a grey image as the original's of three equal channels.
        first = next(part for part in body.modules() if isinstance(part, nn.Conv2d))
        first.in_channels, first.weight = 1, nn.Parameter(first.weight.detach().sum(1, keepdim=True))
    return body


def build_encoder(name: str, *, channels: int, size_px: int) -> nn.Module:
    """`small`, or a torchvision classifier by name (no weights): float [B, C, H, W] -> [B, num_features].

    channels: C, 1 or 3.  size_px: H and W.  Its batch norms are torch's; see convert_batch_norm.
    Raises UsageError for an unknown name, or an encoder that does not give one feature vector for such images.
    """
    if name == "small":
        return SmallEncoder(channels)
    try:
        encoder = _TorchvisionEncoder(_torchvision_classifier(name, channels=channels, size_px=size_px)).eval()
        with torch.no_grad():
            h = encoder(torch.zeros(1, channels, size_px, size_px))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(
            f"model.encoder: {name} does not take images of {size_px} px ({reason}). "
            "Use another encoder or another views.size_px."
        ) from error
    if not isinstance(h, Tensor) or h.shape != (1, encoder.num_features):
        raise UsageError(f"model.encoder: {name} does not end in a linear layer on one feature vector. Use another.")
    return encoder.train()


def build_projector(in_dim: int, *, dim: int, width: int, depth: int, norm: str) -> nn.Sequential:
    """[B, in_dim] -> [B, dim]: `depth` linear layers, after each but the last `norm` and ReLU on `width` features.

    norm: `batch`, `layer` or `none`.  Only the last layer, and all with norm `none`, have a bias of their own.
    """
    layers: list[nn.Module] = []
    for _ in range(depth - 1):
        layers.append(nn.Linear(in_dim, width, bias=norm == "none"))
        match norm:
            case "batch":
                layers.append(nn.BatchNorm1d(width))
            case "layer":
                layers.append(nn.LayerNorm(width))
            case "none":
                pass
            case _:
                raise ValueError(f"norm: got {norm!r}, expected batch, layer or none")
        layers.append(nn.ReLU())
        in_dim = width
    return nn.Sequential(*layers, nn.Linear(in_dim, dim))


def normalized(images: Tensor) -> Tensor:
    """float32 of uint8 pixels, shifted and scaled by PIXEL_MEAN and PIXEL_STD."""
    return images.float().mul_(1 / (255 * PIXEL_STD)).sub_(PIXEL_MEAN / PIXEL_STD)


class Network(nn.Module):
    """Views to embeddings; `features` is what is kept after pretraining."""

    def __init__(self, encoder: nn.Module, projector: nn.Module):
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def features(self, images: Tensor) -> Tensor:
        """h [n, D] of images [n, C, H, W]: uint8, normalised on the weights' device, or floats, taken as they are."""
        device = next(self.parameters()).device
        x = images.to(device).to(memory_format=torch.channels_last)
        if x.dtype == torch.uint8:
            x = normalized(x)
        return self.encoder(x)

    def forward(self, views: Tensor) -> Tensor:
        """z [m, B, d] of views [B, m, C, H, W]: all views in one pass, with joint batch statistics."""
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
    """The network with initial weights drawn from `seed` alone; leaves the global generators as they are.

    projector_width: None for projector_dim.
    global_batch_norm: the workers over which batch norm takes its statistics; None: each for itself.
    Raises UsageError as build_encoder does.
    """
    with default_generator_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
        body = build_encoder(encoder, channels=channels, size_px=size_px)
        width = projector_dim if projector_width is None else projector_width
        inputs: int = body.num_features  # type: ignore[assignment]
        head = build_projector(inputs, dim=projector_dim, width=width, depth=projector_depth, norm=projector_norm)
        network = Network(body, head)
    if global_batch_norm is not None:
        convert_batch_norm(network, global_batch_norm)
    return network.to(memory_format=torch.channels_last)
