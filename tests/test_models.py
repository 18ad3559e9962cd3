"""The networks: sizes, shapes, layers handed to them, initial weights, and torchvision's where they are its own."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from mbn.config import NETWORKS, networks
from mbn.network_layers import Layers, bn, mbn

CIFAR, IMAGENET = networks(32), networks(224)
EVERY = [("cifar", name) for name in CIFAR] + [("imagenet", name) for name in IMAGENET]


def build(kind, name, layers=None, classes=10, **settings):
    builder = NETWORKS[name].builder(32 if kind == "cifar" else 65)
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


@pytest.mark.parametrize("name", CIFAR)
def test_the_registry_names_the_images_that_a_small_network_can_take(name):
    model = on_meta("cifar", name).eval()

    def takes(side):
        try:
            return model(torch.zeros(1, 3, side, side, device="meta")).shape == (1, 10)
        except RuntimeError:
            return False

    assert [side for side in range(1, 65) if takes(side)] == list(NETWORKS[name].sides)


def test_uniform_gamma_changes_nothing_else_of_a_network():
    def weights(**settings):
        torch.manual_seed(0)
        return build("cifar", "resnet20", **settings).state_dict()

    plain, drawn = weights(), weights(gamma="uniform")
    gammas = [name for name in plain if "bn" in name and name.endswith(".weight")]
    assert len(gammas) == 19
    assert [name for name in plain if not torch.equal(plain[name], drawn[name])] == gammas
    values = torch.cat([drawn[name] for name in gammas])
    assert values.min() < 0.01
    assert values.max() > 0.99
    assert abs(values.mean() - 0.5) < 0.05
    assert abs(values.std() - 12**-0.5) < 0.02


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
def test_every_convolution_norm_and_activation_is_one_that_was_given(kind, name):
    model = on_meta(kind, name, layers=Layers(MarkedConv, MarkedNorm, MarkedReLU))
    # Other modules that a network may name: none is a convolution, a normalisation or an activation.
    plumbing = {nn.Linear, nn.Sequential, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout}
    types = [type(module) for module in model.modules()]
    assert {t for t in types if t.__module__.startswith("torch.")} <= plumbing
    assert types.count(MarkedConv) == types.count(MarkedNorm) == CONVOLUTIONS[kind, name]
    assert types.count(MarkedReLU) > 0
    # The backward pass of AdaptiveAvgPool2d on a GPU is not deterministic; VGG's to 7x7 is torchvision's.
    pools = [module.output_size for module in model.modules() if isinstance(module, nn.AdaptiveAvgPool2d)]
    assert pools == ([(7, 7)] if (kind, name) == ("imagenet", "vgg16") else [])


def calls(model, image):
    """The types of the layers with a marker, in the order of a forward pass."""
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


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_networks_give_a_number_for_each_class(name):
    with torch.no_grad():
        assert build("cifar", name, classes=100)(torch.randn(2, 3, 32, 32)).shape == (2, 100)


def resnet(n):
    blocks = itertools.product((1, 2, 3), range(n), ("conv1", "bn1", "conv2", "bn2"))
    return ["conv1", "bn1", *(f"layer{stage}.{block}.{layer}" for stage, block, layer in blocks), "fc"]


def plain(*convolutions, end):
    """The indices of the convolutions, each with its normalisation behind it."""
    return [f"features.{i + after}" for i in convolutions for after in (0, 1)] + end


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", resnet(3)),
        ("resnet56", resnet(9)),
        ("vgg16", plain(0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40, end=["classifier"])),
        ("nin", plain(0, 3, 6, 11, 14, 17, 22, 25, 28, end=[])),
    ],
)
def test_layers_with_parameters_have_the_names_and_the_order_of_todays_checkpoints(name, expected):
    keys = [key for key, _ in on_meta("cifar", name).named_parameters()]
    assert list(dict.fromkeys(key.rpartition(".")[0] for key in keys)) == expected


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


def test_nin_by_hand():
    """Lin et al. 2014, their network for CIFAR-10, with normalisation after each convolution: by functions alone."""
    model = build("cifar", "nin").eval()
    state, x = model.state_dict(), torch.randn(2, 3, 32, 32)
    at = iter(sorted({int(name.split(".")[1]) for name in state}))
    y = x
    for block in range(3):
        for _ in range(3):
            conv, norm = (f"features.{next(at)}" for _ in range(2))
            weight = state[f"{conv}.weight"]
            y = F.conv2d(y, weight, padding=weight.shape[-1] // 2)
            averages = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
            y = F.batch_norm(y, *averages).relu()
        if block == 0:
            y = F.max_pool2d(y, 3, 2, ceil_mode=True)
        if block == 1:
            y = F.avg_pool2d(y, 3, 2, ceil_mode=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), y.mean((2, 3)))
    # Dropout is where the poolings end, and nowhere else.
    kinds = [type(module) for module in model.features]
    assert [kinds[i - 1] for i, kind in enumerate(kinds) if kind is nn.Dropout] == [nn.MaxPool2d, nn.AvgPool2d]


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


def randomise(model):
    """Random running statistics and affine parameters, so that no layer is near the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.normal_(0, 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize("layers", [bn(1), mbn(2, 0.1)], ids=["bn", "mbn"])
@pytest.mark.parametrize("name", IMAGENET)
def test_torchvisions_weights_load_and_give_its_outputs(name, layers, narrow):
    options = {"init_weights": False} if name == "vgg16" else {}
    theirs = THEIRS[name](num_classes=7, **options).eval()
    randomise(theirs)
    ours = build("imagenet", name, layers=layers, classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    x = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
