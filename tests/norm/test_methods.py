"""Every method on every network: what each combination trains, and what none of them may do."""

import contextlib
import copy
import functools
import itertools

import pytest
import torch
import torchvision
from torch import nn

import models
from mbn import config
from mbn.config import ConfigError
from mbn.layers import from_config, gn
from mbn.methods import METHODS
from mbn.norm.base import norm_layers
from mbn.norm.propagation import unit_layers
from mbn.norm.renorm import set_renorm
from mbn.training.iteration import Update
from mbn.training.run import Run

CPU = torch.device("cpu")
SMALL, LARGE = config.networks(32), config.networks(224)
# What networks are built for, the least that gives an ImageNet network, and what they are fed, which may be less.
SIZES = {"cifar10": 32, "imagenet": 65}
PIXELS = {"cifar10": 32, "imagenet": 33}
NETWORKS = [("cifar10", name) for name in SMALL] + [("imagenet", name) for name in LARGE]
ALLOWED = [
    (norm, dataset, name)
    for norm, (dataset, name) in itertools.product(METHODS, NETWORKS)
    if not (norm == "normprop" and name.startswith("resnet"))
]
every_pair = pytest.mark.parametrize(
    ("norm", "dataset", "name"), ALLOWED, ids=["-".join(combination) for combination in ALLOWED]
)


def loaded(*overrides):
    return config.load(list(overrides))


@functools.cache
def section(group, option):
    """A group's section as the command line gives it; composing takes a while, so each option is composed once."""
    large = [option] if group == "model" and option in LARGE and option not in SMALL else []
    beside = ["dataset=imagenet"] if large else ["model=nin"] if option == "normprop" else []
    beside += ["model=vgg16"] if option == "imagenet" else []
    return config.to_dict(loaded(f"{group}={option}", *beside))[group]


def combined(norm, dataset, name, **top):
    base = copy.deepcopy(_base())
    chosen = {"norm": section("norm", norm), "dataset": section("dataset", dataset), "model": section("model", name)}
    return config.from_dict(base | copy.deepcopy(chosen) | top)


@functools.cache
def _base():
    return config.to_dict(loaded())


def configuration(norm, dataset, name, forwards):
    settings = combined(norm, dataset, name, forwards=forwards, batch_size=2)
    settings.dataset.image_size = SIZES[dataset]
    config.check(settings)
    return settings


class NarrowLinear(nn.Linear):
    """VGG-16 for ImageNet holds 120 of its 138 million weights in maps from and to 4096 features: here 64."""

    def __init__(self, in_features, out_features):
        super().__init__(*(64 if n == 4096 else n for n in (in_features, out_features)))


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(nn, "Linear", NarrowLinear)


def build(settings):
    return models.build(layers=from_config(settings), **config.network(settings))


@contextlib.contextmanager
def without_initial_weights():
    """Networks built meanwhile hold whatever is in memory: what a state dict leaves out shows, and it is faster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield


class Training:
    """A network with its optimiser and its Update, and the gradients of its last step."""

    def __init__(self, settings):
        torch.manual_seed(0)
        self.model = build(settings)
        # Open, so that it matters whether batch renormalisation's averages are kept.
        set_renorm(self.model, 3.0, 5.0)
        # Small enough for normalisation propagation, which at 0.1 diverges within a few batches of noise.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=torch.tensor(0.01), momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.optimizer.register_step_pre_hook(self._note)
        self.update = Update(self.model, self.optimizer, settings.forwards, "eager", "fp32", CPU)
        self.model.train()

    def _note(self, *_):
        self.gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def iterate(self, number, size):
        torch.manual_seed(100 + number)  # for dropout too
        self.update(torch.randn(2, 3, size, size), torch.randint(0, 10, (2,)))
        return self.update.drain()[0][0]

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_the_combinations_tried_here_are_those_the_configuration_allows():
    """Of each norm with each network, and of nothing else: an option that is added is tried, or this fails."""
    assert set(config.options("norm")) == set(METHODS)
    assert set(config.options("model")) == {*SMALL, *LARGE}
    allowed = []
    for norm, (dataset, name) in itertools.product(METHODS, NETWORKS):
        try:
            combined(norm, dataset, name)
        except ConfigError:
            continue
        allowed.append((norm, dataset, name))
    assert allowed == ALLOWED
    assert len(allowed) == 5 * 8 - 5


@every_pair
@pytest.mark.parametrize("forwards", [1, 2])
def test_trains_at_batch_size_2_and_goes_on_from_a_state_dict_with_the_same_bits(norm, dataset, name, forwards, narrow):
    settings = configuration(norm, dataset, name, forwards)
    training = Training(settings)
    losses = [training.iterate(0, PIXELS[dataset])]
    half_way = copy.deepcopy(training.state())
    losses.append(training.iterate(1, PIXELS[dataset]))

    assert all(torch.isfinite(torch.tensor(losses)))
    parameters = dict(training.model.named_parameters())
    assert training.gradients.keys() == parameters.keys()
    for parameter, gradient in training.gradients.items():
        assert gradient.isfinite().all(), parameter
    # Each part of the network learns: a gradient that is zero throughout is a part that is cut off.
    assert all(training.gradients[p].any() for p in parameters if p.endswith("weight") and parameters[p].dim() == 4)
    end = training.state()["model"]
    assert all(tensor.isfinite().all() for tensor in end.values())
    assert not any(torch.equal(half_way["model"][p], end[p]) for p in parameters if parameters[p].dim() == 4)

    memories = [layer.memory_count for layer in norm_layers(training.model) if norm == "mbn"]
    assert all(memory.count_nonzero() == 2 < len(memory) for memory in memories)

    with without_initial_weights():
        other = Training(settings)
    other.load(half_way)
    other.iterate(1, PIXELS[dataset])
    again = other.state()
    assert all(torch.equal(again["model"][key], end[key]) for key in end)
    momenta = training.state()["optimizer"]["state"]
    assert all(
        torch.equal(again["optimizer"]["state"][i]["momentum_buffer"], momenta[i]["momentum_buffer"]) for i in momenta
    )


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("norm", ["bn", "brn", "mbn"])
def test_each_iteration_takes_one_batch_into_the_statistics(norm, forwards):
    training = Training(configuration(norm, "cifar10", "resnet20", forwards))
    for number in range(3):
        training.iterate(number, 32)
    layers = norm_layers(training.model)
    assert len(layers) == 19
    for layer in layers:
        seen = layer.memory_count.count_nonzero() if norm == "mbn" else layer.num_batches_tracked
        assert seen == 3


# Names.


def vgg_or_nin(dataset, name):
    """Indices of the convolutions, and the names of what follows them."""
    if name == "nin":
        return (0, 3, 6, 11, 14, 17, 22, 25, 28), []
    linear = ["classifier"] if dataset == "cifar10" else ["classifier.0", "classifier.3", "classifier.6"]
    return (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40), linear


def cifar_resnet_names(blocks):
    names = ["conv1.weight", "bn1.weight", "bn1.bias"]
    for stage, block, i in itertools.product((1, 2, 3), range(blocks), (1, 2)):
        names += [f"layer{stage}.{block}.{n}" for n in (f"conv{i}.weight", f"bn{i}.weight", f"bn{i}.bias")]
    return [*names, "fc.weight", "fc.bias"]


def expected_names(norm, dataset, name):
    if dataset == "imagenet" and norm != "normprop":
        with torch.device("meta"):
            theirs = getattr(torchvision.models, "vgg16_bn" if name == "vgg16" else name)(num_classes=10)
        return [key for key, _ in theirs.named_parameters()]
    if name.startswith("resnet"):
        return cifar_resnet_names({"resnet20": 3, "resnet56": 9}[name])
    convolutions, linear = vgg_or_nin(dataset, name)
    names = []
    for i in convolutions:
        if norm == "normprop":
            names += [f"features.{i}.{n}" for n in ("weight", "gain", "shift")]
        else:
            names += [f"features.{i}.weight", f"features.{i + 1}.weight", f"features.{i + 1}.bias"]
    return names + [f"{layer}.{n}" for layer in linear for n in ("weight", "bias")]


@every_pair
def test_parameters_have_the_expected_names_and_the_shapes_of_the_bn_version(norm, dataset, name):
    with torch.device("meta"):
        model, reference = (build(configuration(n, dataset, name, 1)) for n in (norm, "bn"))
    shapes = {key: p.shape for key, p in model.named_parameters()}
    assert list(shapes) == expected_names(norm, dataset, name)
    theirs = {key: p.shape for key, p in reference.named_parameters()}
    if norm == "normprop":
        assert {key: s for key, s in shapes.items() if key in theirs}.items() <= theirs.items()
        for key in shapes:
            if key.endswith((".gain", ".shift")):
                assert shapes[key] == shapes[key.rpartition(".")[0] + ".weight"][:1]
    else:
        assert shapes == theirs


# Normalisation propagation.


@pytest.mark.parametrize(
    ("dataset", "name"), [(d, n) for d, n in NETWORKS if n.startswith("resnet")], ids=lambda value: value
)
def test_normprop_on_a_residual_network_is_refused_in_one_sentence_that_says_why(dataset, name):
    with pytest.raises(ConfigError) as caught:
        loaded("norm=normprop", f"dataset={dataset}", f"model={name}")
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message
    assert "normprop" in message
    assert "residual" in message
    assert "nin, vgg16" in message
    assert name in message


def test_rows_of_normprop_have_unit_norm_before_and_after_every_step():
    training = Training(configuration("normprop", "cifar10", "nin", 1))
    for number in range(3):
        norms = torch.cat([layer.weight.detach().flatten(1).norm(dim=1) for layer in unit_layers(training.model)])
        torch.testing.assert_close(norms, torch.ones(len(norms)))
        training.iterate(number, 32)


# Two forwards.


@pytest.mark.parametrize("norm", METHODS)
def test_a_second_forward_has_no_gradients_and_is_skipped_with_one_warning_where_nothing_remembers(
    norm, tmp_path, capsys
):
    name = "nin" if norm == "normprop" else "resnet20"
    settings = loaded(
        *("dataset=digits", f"norm={norm}", f"model={name}", "forwards=2", "machine.threads=1", "machine.device=cpu"),
        *("machine.mode=eager", f"machine.results={tmp_path}"),
    )
    run = Run(settings, lambda layers: models.build(layers=layers, **config.network(settings)), tmp_path / "run")
    remembers = norm in ("bn", "brn", "mbn")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (0 if remembers else 1)
    for warning in warnings:
        assert warning.startswith("warning: ")
        assert norm in warning
        assert "second forward" in warning

    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert calls == ([True, False] if remembers else [True])
    assert capsys.readouterr().err == ""


# GroupNorm.


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        *((16, 4), (32, 8), (64, 16), (96, 24), (128, 32), (160, 32), (192, 32), (512, 32), (2048, 32)),
        # A layer of classes, NIN's last: the most groups that divide it, at most C // 4.
        *((10, 2), (100, 25), (1000, 25), (7, 1), (17, 1), (21, 3), (3, 1), (2, 1), (1, 1)),
    ],
)
def test_gn_has_a_group_for_each_4_channels_and_at_most_32(channels, groups):
    layer = gn(1).norm(channels)
    assert type(layer) is nn.GroupNorm
    assert layer.num_groups == groups
    assert layer.num_channels == channels
    assert layer.eps == 1e-5
    assert layer(torch.randn(2, channels, 3, 3)).isfinite().all()


@pytest.mark.parametrize("classes", [3, 7, 10, 17, 100])
def test_nin_with_gn_trains_for_any_number_of_classes(classes):
    settings = loaded("norm=gn", "model=nin", f"dataset.classes={classes}")
    model = build(settings)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_groups_of_gn_are_settings():
    model = build(loaded("norm=gn", "norm.groups=8", "norm.channels=1"))
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {8}
    model = build(loaded("norm=gn"))
    assert {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {
        16: 4,
        32: 8,
        64: 16,
    }
