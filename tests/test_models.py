"""The networks: sizes, shapes, layers handed to them, initial weights, and torchvision's where they are its own."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from mbn.config import NETWORKS, networks
from mbn.layers import Layers, bn, mbn
from models.resnet_cifar import Shortcut

CIFAR, IMAGENET = networks(32), networks(224)
EVERY = [("cifar", name) for name in CIFAR] + [("imagenet", name) for name in IMAGENET]


def build(kind, name, layers=None, classes=10, **settings):
    builder = NETWORKS[name].builder(64 if kind == "cifar" else 65)
    return models.build(builder, layers or bn(1), classes, **settings)


def on_meta(kind, name, **kwargs):
    """The network's structure without its weights: VGG-16 for ImageNet has 138 million of them."""
    with torch.device("meta"):
        return build(kind, name, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "name", "classes", "expected"),
    [
        ("cifar", "resnet20", 10, 269_722),
        ("cifar", "resnet56", 10, 853_018),
        ("cifar", "vgg16", 10, 14_724_042),
        ("cifar", "nin", 10, 968_404),
        ("cifar", "resnet20", 100, 269_722 + 90 * 65),
        ("imagenet", "resnet18", 1000, 11_689_512),
        ("imagenet", "resnet34", 1000, 21_797_672),
        ("imagenet", "resnet50", 1000, 25_557_032),
        ("imagenet", "vgg16", 1000, 138_365_992),
    ],
)
@pytest.mark.parametrize("layers", [bn(1), mbn(2, 0.1)], ids=["bn", "mbn"])
def test_number_of_parameters(kind, name, classes, expected, layers):
    assert parameters(on_meta(kind, name, classes=classes, layers=layers)) == expected


class MarkedConv(nn.Conv2d):
    pass


class MarkedNorm(nn.BatchNorm2d):
    pass


class MarkedReLU(nn.ReLU):
    pass


CONVOLUTIONS = {
    ("cifar", "resnet20"): 19,
    ("cifar", "resnet56"): 55,
    ("cifar", "vgg16"): 13,
    ("cifar", "nin"): 9,
    ("imagenet", "resnet18"): 20,
    ("imagenet", "resnet34"): 36,
    ("imagenet", "resnet50"): 53,
    ("imagenet", "vgg16"): 13,
}


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_convolution_norm_and_activation_is_one_that_was_handed_in(kind, name):
    model = on_meta(kind, name, layers=Layers(MarkedConv, MarkedNorm, MarkedReLU))
    # What else a network may name: no convolution, no normalisation, no activation.
    plumbing = {nn.Linear, nn.Sequential, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout}
    types = [type(module) for module in model.modules()]
    assert {t for t in types if t.__module__.startswith("torch.")} <= plumbing
    assert types.count(MarkedConv) == types.count(MarkedNorm) == CONVOLUTIONS[kind, name]
    assert types.count(MarkedReLU) > 0


def calls(model, image):
    """The types of the layers in the order in which a forward pass goes through them, those with a marker only."""
    seen = []
    for module in model.modules():
        if isinstance(module, (MarkedConv, MarkedNorm, MarkedReLU)):
            module.register_forward_hook(lambda module, *_: seen.append(type(module)))
    model(image)
    return seen


@pytest.mark.parametrize("name", ["vgg16", "nin"])
def test_plain_networks_run_convolution_norm_activation_in_this_order(name):
    model = build("cifar", name, layers=Layers(MarkedConv, MarkedNorm, MarkedReLU))
    expected = [MarkedConv, MarkedNorm, MarkedReLU] * CONVOLUTIONS["cifar", name]
    assert calls(model, torch.randn(2, 3, 32, 32)) == expected


def test_a_residual_block_activates_after_the_sum():
    model = build("cifar", "resnet20", layers=Layers(MarkedConv, MarkedNorm, MarkedReLU))
    seen = calls(model.layer2[0], torch.randn(2, 16, 8, 8))
    assert seen == [MarkedConv, MarkedNorm, MarkedReLU, MarkedConv, MarkedNorm, MarkedReLU]


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_networks_give_a_number_for_each_class(name, classes):
    model = build("cifar", name, classes=classes)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, classes)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_give_a_number_for_each_class(name):
    model = on_meta("imagenet", name, classes=17).eval()
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 17)


def test_the_sizes_of_the_images_decide_between_the_two_vggs():
    assert parameters(on_meta("cifar", "vgg16")) < 15e6 < parameters(on_meta("imagenet", "vgg16"))


# Option A.


def test_the_option_a_shortcut_takes_every_second_pixel_between_zero_channels():
    x = torch.randn(2, 16, 8, 8)
    y = Shortcut(16, 32, 2)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_the_shortcut_is_the_identity_within_a_stage():
    x = torch.randn(2, 16, 8, 8)
    assert Shortcut(16, 16, 1)(x) is x


def test_shortcuts_have_no_parameters_and_lie_where_stages_begin():
    model = build("cifar", "resnet20")
    shortcuts = [(n, m) for n, m in model.named_modules() if isinstance(m, Shortcut)]
    assert sum(parameters(m) for _, m in shortcuts) == 0
    strided = [name for name, m in shortcuts if m.stride == 2]
    assert strided == ["layer2.0.shortcut", "layer3.0.shortcut"]


def test_a_cifar_resnet_by_hand():
    """He et al. 2016, section 4.2, written with functions alone."""
    model = build("cifar", "resnet20").eval()
    state = model.state_dict()
    x = torch.randn(2, 3, 32, 32)

    def conv_bn(x, conv, norm, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        return F.batch_norm(x, *(state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    y = conv_bn(x, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            short = y
            if stride == 2:
                zeros = torch.zeros_like(y[:, : y.shape[1] // 2, ::2, ::2])
                short = torch.cat([zeros, y[:, :, ::2, ::2], zeros], 1)
            z = conv_bn(y, f"{name}.conv1", f"{name}.bn1", stride).relu()
            y = (conv_bn(z, f"{name}.conv2", f"{name}.bn2") + short).relu()
    expected = F.linear(y.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


# Initial weights.


def assert_normal(weights, std):
    """Mean 0 and this standard deviation, within five standard errors."""
    n = weights.numel()
    assert abs(weights.mean().item()) < 5 * std / n**0.5
    assert abs(weights.std().item() / std - 1) < 5 / (2 * n) ** 0.5


@pytest.mark.parametrize(("kind", "name"), [*(("cifar", n) for n in CIFAR), ("imagenet", "resnet18")])
def test_convolutions_start_as_he_et_al_fan_out_and_linear_maps_as_torchs(kind, name):
    model = build(kind, name, classes=100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            height, width = module.kernel_size
            assert_normal(module.weight, math.sqrt(2 / (module.out_channels * height * width)))
            assert module.bias is None
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert module.weight.abs().max() <= bound
            assert_normal(module.weight, bound / math.sqrt(3))
            assert 0 < module.bias.abs().max() <= bound
        if hasattr(module, "running_mean"):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_the_same_seed_gives_the_same_weights_whatever_the_norm():
    """So that methods are compared from the same start."""
    weights = []
    for layers in (bn(1), mbn(2, 0.1)):
        torch.manual_seed(3)
        weights.append(dict(build("cifar", "resnet20", layers=layers).named_parameters()))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_dropout_is_a_setting_of_nin():
    rates = [m.p for m in build("cifar", "nin", dropout=0.25).modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.25, 0.25]
    default = [m.p for m in build("cifar", "nin").modules() if isinstance(m, nn.Dropout)]
    assert default == [0.5, 0.5]


# torchvision's.

THEIRS = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "vgg16": torchvision.models.vgg16_bn,
}


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_have_torchvisions_names_and_shapes(name):
    with torch.device("meta"):
        theirs = THEIRS[name]()
    ours = on_meta("imagenet", name, classes=1000)
    assert shapes(ours) == shapes(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


def randomise(model):
    """Random running statistics and affine parameters, so that no layer is near the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_weights_load_and_give_its_outputs(name):
    theirs = THEIRS[name](num_classes=7).eval()
    randomise(theirs)
    ours = build("imagenet", name, classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_torchvisions_weights_load_into_a_memorized_network_and_serve_at_test_time():
    theirs = THEIRS["resnet18"](num_classes=7).eval()
    randomise(theirs)
    ours = build("imagenet", "resnet18", layers=mbn(2, 0.1), classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_torchvisions_vgg16_loads_and_gives_its_outputs(monkeypatch):
    """With its 4096-wide linear maps made 8 wide, in both: they hold 120 of its 138 million weights."""

    class NarrowLinear(nn.Linear):
        def __init__(self, in_features, out_features):
            super().__init__(*(8 if n == 4096 else n for n in (in_features, out_features)))

    monkeypatch.setattr(nn, "Linear", NarrowLinear)
    theirs = torchvision.models.vgg16_bn(num_classes=7, init_weights=False).eval()
    ours = build("imagenet", "vgg16", classes=7).eval()
    monkeypatch.undo()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_no_network_pools_with_adaptive_means_over_all_pixels(kind, name):
    """The backward pass of AdaptiveAvgPool2d on a GPU is not deterministic; VGG's to 7x7 is torchvision's."""
    pools = [m for m in on_meta(kind, name).modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    assert [pool.output_size for pool in pools] == ([(7, 7)] if (kind, name) == ("imagenet", "vgg16") else [])
