"""Encoder, projector and global batch norm, against torch's own in one process with the whole batch."""

import copy
from concurrent.futures import ThreadPoolExecutor

import gloo
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_ray import losses
from ssl_ray.errors import UsageError
from ssl_ray.model import (
    PIXEL_MEAN,
    PIXEL_STD,
    Network,
    build_encoder,
    build_network,
    build_projector,
    convert_batch_norm,
)


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def small_network(*, seed: int = 0, norm: str = "batch", group=None) -> Network:
    return build_network(
        "small",
        channels=3,
        size_px=8,
        projector_dim=16,
        projector_width=24,
        projector_depth=2,
        projector_norm=norm,
        seed=seed,
        global_batch_norm=group,
    )


# Global batch norm


def batch_norm_of(x: Tensor, **options) -> nn.Module:
    """nn.BatchNorm for x [n, C] or [n, C, H, W] with weights that are not all alike."""
    made = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(x.shape[1], dtype=x.dtype, **options)
    with torch.no_grad():
        made.weight.copy_(normal(x.shape[1], seed=1))
        made.bias.copy_(normal(x.shape[1], seed=2))
    return made


def two_steps(norm: nn.Module, x: Tensor, target: Tensor, factor: int) -> dict[str, Tensor]:
    """Output, gradients of factor * sum(output * target) and statistics after two training steps."""
    norm(x + 1)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = norm(x)
    (factor * (y * target).sum()).backward()
    gradients = {"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {"y": y.detach(), **gradients, "mean": norm.running_mean, "var": norm.running_var}


def norm_of_worker(group, norm: nn.Module, x: Tensor, target: Tensor, channels_last: bool) -> dict[str, Tensor]:
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    return two_steps(convert_batch_norm(norm, group), x, target, group.size())


def inputs(shape: tuple[int, ...], *, shift: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Batch norm's input, its mean rising with the sample from 0 to 2 on top of `shift`, and its gradient."""
    rising = torch.linspace(0, 2, shape[0], dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1))
    return (normal(*shape, seed=3) + rising + shift).to(dtype), normal(*shape, seed=4, dtype=dtype)


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    assert error <= tolerance, f"{name}: {error:.1e}"


def assert_workers_equal_one(x: Tensor, target: Tensor, sizes: list[int], tolerance: float, **options) -> None:
    channels_last = options.pop("channels_last", False)
    norm = batch_norm_of(x, **options)
    arguments = [(norm, *share, channels_last) for share in zip(x.split(sizes), target.split(sizes), strict=True)]
    replies = gloo.run(norm_of_worker, arguments)
    one = two_steps(copy.deepcopy(norm).double(), x.double(), target.double(), 1)
    for name in ("y", "x", "weight", "bias"):
        parts = [reply[name] for reply in replies]
        # DDP averages the gradients of weights; that of x is every worker's own, times their number.
        whole = torch.cat(parts) if name in ("y", "x") else torch.stack(parts).mean(0)
        assert_close(whole / (len(sizes) if name == "x" else 1), one[name], tolerance, name)
    for reply in replies:
        assert_close(reply["mean"], one["mean"], tolerance, "running mean")
        assert_close(reply["var"], one["var"], tolerance, "running variance")


SIZES = [[9], [5, 4], [1, 8], [3, 1, 5], [1, 4, 2, 2]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(9, 6), (9, 3, 4, 5)], ids=["1d", "2d"])
def test_workers_normalise_as_one_process_with_the_whole_batch(sizes: list[int], shape: tuple[int, ...]):
    x, target = inputs(shape, shift=0, dtype=torch.float64)
    assert_workers_equal_one(x, target, sizes, 1e-12)
    assert_workers_equal_one(x, target, sizes, 1e-12, channels_last=len(shape) == 4, momentum=None, eps=1e-2)


@pytest.mark.parametrize("shape", [(24, 6), (12, 3, 4, 5)], ids=["1d", "2d"])
def test_float32_statistics_withstand_means_of_30_stds(shape: tuple[int, ...]):
    x, target = inputs(shape, shift=30, dtype=torch.float32)
    count = shape[0]
    for sizes in ([count], [1, count - 1], [count - 5, 3, 2], [2, 3, 4, count - 9]):
        assert_workers_equal_one(x, target, sizes, 1e-5)


def test_bfloat16_input_keeps_float32_statistics():
    x, target = inputs((12, 3, 4, 4), shift=5, dtype=torch.bfloat16)
    norm = batch_norm_of(x.float())
    shares = zip(x.split([5, 7]), target.split([5, 7]), strict=True)
    replies = gloo.run(norm_of_worker, [(norm, *share, True) for share in shares])
    one = two_steps(copy.deepcopy(norm).double(), x.double(), target.double(), 1)
    for name in ("y", "x"):
        whole = torch.cat([reply[name] for reply in replies])
        assert whole.dtype == torch.bfloat16
        assert_close(whole / (2 if name == "x" else 1), one[name], 1e-2, name)
    for reply in replies:
        # The only rounding is that of the first step's x + 1 to bfloat16.
        assert_close(reply["mean"], one["mean"], 1e-3, "running mean")
        assert_close(reply["var"], one["var"], 1e-2, "running variance")


def of_one_worker(group, norm: nn.Module, x: Tensor, target: Tensor) -> bool:
    ours = two_steps(convert_batch_norm(copy.deepcopy(norm), group), x, target, 1)
    native = two_steps(norm, x, target, 1)
    return all(torch.equal(ours[name], native[name]) for name in native)


def test_one_worker_normalises_as_torch_does_bit_for_bit():
    x, target = inputs((9, 3, 4, 5), shift=1, dtype=torch.float32)
    norm = batch_norm_of(x)
    assert gloo.run(of_one_worker, [(norm, x, target)]) == [True]
    assert of_one_worker(None, norm, x, target)


def evaluated_after_training(group, norm: nn.Module, x: Tensor) -> Tensor:
    converted = convert_batch_norm(norm, group)
    converted(x)
    return converted.eval()(x)


def test_evaluation_uses_the_running_statistics_of_the_whole_batch():
    x, _ = inputs((9, 6), shift=2, dtype=torch.float64)
    norm = batch_norm_of(x)
    replies = gloo.run(evaluated_after_training, [(norm, x[:2]), (norm, x[2:])])
    norm(x)
    torch.testing.assert_close(torch.cat(replies), norm.eval()(x), rtol=1e-12, atol=1e-12)


def test_conversion_keeps_names_values_types_and_mode():
    network = small_network().double().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    convert_batch_norm(network, None)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert not any(part.training for part in network.modules())
    assert all(value.requires_grad for value in network.parameters())


# The whole network in DDP


def loss_of(name: str, z: Tensor, group) -> Tensor:
    if name == "vicreg":
        return losses.vicreg(z, invariance=25, variance=25, covariance=1, group=group).total
    if name == "spectral":
        return losses.spectral(z, group=group).total
    return losses.barlow_twins(z, beta=0.1, form=name, group=group).total


def one_step(network: Network, module: nn.Module, views: Tensor, name: str, group) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient of all parameters and all buffers, as vectors."""
    loss = loss_of(name, module(views), group)
    loss.backward()
    gradient = torch.cat([value.grad.flatten() for value in network.parameters()])
    return loss.item(), gradient, torch.cat([value.flatten().to(gradient) for value in network.buffers()])


def ddp_step(group, dtype: torch.dtype, views: Tensor, name: str) -> tuple[float, Tensor, Tensor]:
    network = small_network(group=group).to(dtype)
    return one_step(network, DistributedDataParallel(network, process_group=group), views, name, group)


def views_of(batch: int, m: int, dtype: torch.dtype) -> Tensor:
    """[B, m, 3, 8, 8] normalised floats: noisy copies of an image, brighter from sample to sample."""
    views = normal(batch, 1, 3, 8, 8, seed=5) + 0.5 * normal(batch, m, 3, 8, 8, seed=6)
    return (views + torch.linspace(-1, 1, batch, dtype=torch.float64).view(-1, 1, 1, 1, 1)).to(dtype)


def assert_ddp_equals_one_process(views: Tensor, sizes: list[int], name: str, tolerance: float) -> None:
    network = small_network().double()
    loss, gradient, buffers = one_step(network, network, views.double(), name, None)
    for reply in gloo.run(ddp_step, [(views.dtype, share, name) for share in views.split(sizes)]):
        assert reply[0] == pytest.approx(loss, rel=tolerance)
        assert_close(reply[1], gradient, tolerance, "gradient")
        assert_close(reply[2], buffers, tolerance, "buffers")


FORMS = [("mean", 3), ("pairs", 3), ("classic", 2), ("vicreg", 3), ("spectral", 3)]


@pytest.mark.parametrize("sizes", [[6, 6], [1, 11], [5, 1, 6]], ids=str)
@pytest.mark.parametrize(("name", "m"), FORMS)
def test_ddp_gives_the_loss_and_gradients_of_one_process(sizes: list[int], name: str, m: int):
    assert_ddp_equals_one_process(views_of(12, m, torch.float64), sizes, name, 1e-9)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [3, 1, 8]], ids=str)
@pytest.mark.parametrize(("name", "m"), FORMS)
def test_ddp_in_float32_agrees_to_rounding(sizes: list[int], name: str, m: int):
    assert_ddp_equals_one_process(views_of(12, m, torch.float32), sizes, name, 1e-5)


# Building


def test_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = small_network(seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = small_network(seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = small_network(seed=8).state_dict()
    assert not torch.equal(first["encoder.stem.0.weight"], other["encoder.stem.0.weight"])


def test_embeddings_are_by_view_then_image():
    network = small_network().eval()
    views = torch.randint(0, 256, (3, 2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = network(views)
        assert z.shape == (2, 3, 16)
        for image in range(3):
            for view in range(2):
                alone = network.projector(network.features(views[image, view][None]))[0]
                torch.testing.assert_close(z[view, image], alone, rtol=1e-5, atol=1e-6)


def test_bytes_are_normalised_and_floats_taken_as_they_are():
    network = small_network().eval()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = (images.float() / 255 - PIXEL_MEAN) / PIXEL_STD
    before = floats.clone()
    with torch.no_grad():
        torch.testing.assert_close(network.features(images), network.features(floats), rtol=1e-5, atol=1e-5)
    assert torch.equal(floats, before)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_the_projector_normalises_every_hidden_layer_and_not_the_last(norm: str):
    x = 5 * normal(64, 10, dtype=torch.float32) + 3
    projector = build_projector(10, dim=4, width=12, depth=3, norm=norm)
    assert projector(x).shape == (64, 4)
    assert [layer.weight.shape for layer in projector if isinstance(layer, nn.Linear)] == [(12, 10), (12, 12), (4, 12)]
    for before_relu in (projector[:2](x), projector[:5](x)) if norm != "none" else ():
        over = {"batch": 0, "layer": 1}[norm]
        torch.testing.assert_close(before_relu.mean(over), torch.zeros(before_relu.shape[1 - over]), rtol=0, atol=1e-4)
    assert projector[-1].bias is not None


def test_a_projector_of_depth_1_is_one_linear_layer():
    (layer,) = build_projector(10, dim=4, width=12, depth=1, norm="batch")
    assert layer.weight.shape == (4, 10)


ENCODERS = {
    "small": 128,
    "resnet18": 512,
    "resnet50": 2048,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "vit_b_32": 768,
    "swin_t": 768,
    "regnet_y_400mf": 440,
    "densenet121": 1024,
    "googlenet": 1024,
}


@pytest.mark.parametrize(("name", "width"), ENCODERS.items())
def test_encoders_give_one_feature_vector_an_image_in_training_too(name: str, width: int):
    encoder = build_encoder(name, channels=1, size_px=64)
    assert encoder.training
    assert encoder.num_features == width
    with torch.no_grad():
        assert encoder(normal(2, 1, 64, 64, dtype=torch.float32)).shape == (2, width)


def test_no_dropout_stands_between_encoder_and_features():
    encoder = build_encoder("mobilenet_v3_small", channels=3, size_px=32)
    images = normal(4, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(encoder(images), encoder(images))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_32"])
def test_one_channel_gives_what_three_equal_channels_would(name: str):
    built = []
    for channels in (1, 3):
        torch.manual_seed(0)
        built.append(build_encoder(name, channels=channels, size_px=32).eval())
    grey = normal(2, 1, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(built[0](grey), built[1](grey.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)


def test_resnets_keep_the_resolution_of_small_images():
    stems = {px: build_encoder("resnet18", channels=3, size_px=px).body for px in (32, 64, 65)}
    for px, height in ((32, 32), (64, 64), (65, 17)):
        body = stems[px]
        x = normal(1, 3, px, px, dtype=torch.float32)
        assert body.maxpool(body.relu(body.bn1(body.conv1(x)))).shape == (1, 64, height, height)


@pytest.mark.parametrize(
    ("name", "size_px", "message"),
    [
        ("resnet19", 32, "got resnet19, expected small or a torchvision classification model. Did you mean resnet1"),
        ("smal", 32, "Did you mean small?"),
        ("xyz", 32, "got xyz, expected small or a torchvision classification model. For example resnet18."),
        ("squeezenet1_1", 64, "squeezenet1_1 has no linear layer"),
        ("vit_b_16", 40, "vit_b_16 does not take images of 40 px"),
        ("inception_v3", 32, "inception_v3 does not take images of 32 px"),
    ],
)
def test_an_encoder_that_cannot_serve_is_a_usage_error(name: str, size_px: int, message: str):
    with pytest.raises(UsageError) as caught:
        build_encoder(name, channels=3, size_px=size_px)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_networks_built_in_several_threads_have_the_weights_of_their_seeds():
    def weights(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for p in small_network(seed=seed).parameters()])

    alone = [weights(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for together in (pool.map(weights, range(8)), pool.map(weights, range(8))):
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
