import numpy as np
import pytest
import torch
from torch import nn

from ssl_ray.errors import TrainingError
from ssl_ray.evaluate.features import calibrate_batch_norm, features


def some_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 6, 5), np.uint8)


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=0.2),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 7),
        nn.BatchNorm1d(7),
    )


def encoder_of(net):
    return lambda images: net(images.float() / 255)


@pytest.mark.parametrize("batch", [1, 4, 10, 256])
def test_features_are_those_of_each_image_alone_whatever_the_batch(batch):
    images, net = some_images(10), small_net().eval()
    h = features(encoder_of(net), images, batch=batch)
    alone = np.concatenate([features(encoder_of(net), images[i : i + 1]) for i in range(10)])
    assert h.dtype == np.float32
    assert h.shape == (10, 7)
    np.testing.assert_allclose(h, alone, rtol=1e-5, atol=1e-6)


def test_features_take_read_only_images_and_give_float32_from_bfloat16(tmp_path):
    np.save(tmp_path / "images.npy", some_images(5))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    h = features(lambda x: x.flatten(1).to(torch.bfloat16), mapped, batch=2)
    assert h.dtype == np.float32
    np.testing.assert_array_equal(h, some_images(5).reshape(5, -1))  # integers to 255 are exact in bfloat16


def test_features_build_no_graph():
    seen = []
    features(lambda x: seen.append(torch.is_inference_mode_enabled()) or x.flatten(1), some_images(3))
    assert seen == [True]


def test_an_encoder_that_gives_nan_is_a_training_error_that_counts_the_images():
    def encode(images):
        h = images.flatten(1).float()
        h[0, 1] = torch.nan
        h[1:2, 0] = torch.inf
        return h

    with pytest.raises(TrainingError, match=r"NaN or infinity for 3 of 6 images"):
        features(encode, some_images(6), batch=5)


@pytest.mark.parametrize(
    "images", [np.zeros((0, 3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.float32)]
)
def test_wrong_images_are_named(images):
    with pytest.raises(ValueError, match="expected uint8"):
        features(lambda x: x.flatten(1), images)


def test_calibration_sets_the_statistics_of_the_activations_themselves():
    images, net = some_images(12), small_net()
    calibrate_batch_norm(net, images, batch=4, encode=encoder_of(net))
    conv, first, second = net[0], net[1], net[6]
    with torch.no_grad():
        batches = [torch.from_numpy(part).float() / 255 for part in np.split(images, 3)]
        maps = [conv(part).double() for part in batches]
        normed = [(a - a.mean((0, 2, 3), keepdim=True)) / (a.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt() for a in maps]
        hidden = [net[5](a.relu().flatten(1).float()).double() for a in normed]  # no dropout
    torch.testing.assert_close(first.running_mean.double(), torch.cat(maps).mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    variance = torch.stack([a.var((0, 2, 3)) for a in maps]).mean(0)
    torch.testing.assert_close(first.running_var.double(), variance, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.running_mean.double(), torch.cat(hidden).mean(0), rtol=1e-4, atol=1e-5)
    variance = torch.stack([a.var(0) for a in hidden]).mean(0)
    torch.testing.assert_close(second.running_var.double(), variance, rtol=1e-4, atol=1e-5)
    assert first.num_batches_tracked == 3


def test_calibrated_in_one_batch_the_features_have_mean_0_and_variance_1():
    images, net = some_images(40), small_net()
    calibrate_batch_norm(net, images, batch=64, encode=encoder_of(net))
    h = features(encoder_of(net.eval()), images)
    np.testing.assert_allclose(h.mean(0), 0, atol=0.01)  # the first layer's running variance has n - 1 below
    np.testing.assert_allclose(h.std(0), 1, atol=0.05)


def test_calibration_changes_nothing_else_and_forgets_what_was_there():
    images, net = some_images(9), small_net()
    net.train()
    net[3].eval()
    before = {key: value.clone() for key, value in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    calibrate_batch_norm(net, images, batch=3, encode=encoder_of(net))
    once = [net[1].running_var.clone(), net[6].running_mean.clone()]
    net[1].running_mean.fill_(1e3)
    calibrate_batch_norm(net, images, batch=3, encode=encoder_of(net))
    assert torch.equal(once[0], net[1].running_var)
    assert torch.equal(once[1], net[6].running_mean)
    assert [m.training for m in net.modules()] == modes
    assert (net[1].momentum, net[6].momentum) == (0.2, 0.1)
    assert all(torch.equal(before[key], value) and value.grad is None for key, value in net.named_parameters())


@pytest.mark.parametrize(("n", "batch"), [(2, 1), (5, 4), (7, 3), (9, 1)])
def test_calibration_uses_every_image_and_leaves_none_alone_in_a_batch(n, batch):
    images, net, sizes = some_images(n), small_net(), []
    calibrate_batch_norm(net, images, batch=batch, encode=lambda x: sizes.append(len(x)) or net(x.float()))
    assert sum(sizes) == n
    assert min(sizes) >= 2
    assert max(sizes) <= max(batch, 3)
    assert max(sizes) - min(sizes) <= 1


def test_a_failed_calibration_restores_modes_and_momentum():
    net = small_net().train()

    def encode(_):
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        calibrate_batch_norm(net, some_images(4), batch=2, encode=encode)
    assert all(m.training for m in net.modules())
    assert (net[1].momentum, net[6].momentum) == (0.2, 0.1)


def test_one_image_has_no_variance_to_calibrate_with():
    with pytest.raises(ValueError, match="n >= 2"):
        calibrate_batch_norm(small_net(), some_images(1), batch=4, encode=lambda x: x)
