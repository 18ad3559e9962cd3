"""Every method on every network: what each combination must do, and what none may do."""

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from running import assert_same_bits, compose
from torch import nn

import models
from mbn import config
from mbn.config import ConfigError
from mbn.methods import METHODS
from mbn.network_layers import from_config, gn
from mbn.norm.base import norm_layers
from mbn.norm.normprop import unit_layers
from mbn.norm.renorm import set_renorm
from mbn.training.iteration import Update
from mbn.training.run import Run

CPU = torch.device("cpu")
SMALL, LARGE = config.networks(32), config.networks(224)
# The image size that networks are built for, the smallest for ImageNet's, and the size they are given, maybe less.
SIZES = {"digits": 32, "cifar10": 32, "imagenet": 65}
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


def configuration(norm, dataset, name, forwards=1):
    """The configuration. Composing takes a while, so each network and each method is composed only once."""
    settings = copy.deepcopy(compose(f"dataset={dataset}", f"model={name}"))
    settings.norm = copy.deepcopy(compose(f"norm={norm}", "model=nin").norm)
    settings.forwards, settings.batch_size, settings.dataset.image_size = forwards, 2, SIZES[dataset]
    config.check(settings)
    return settings


def build(settings):
    return models.build(layers=from_config(settings), **config.network(settings))


class Training:
    """A network with its optimiser and its Update, and the gradients of its last step."""

    def __init__(self, settings, seed=0):
        torch.manual_seed(seed)
        self.model = build(settings)
        if settings.norm.name == "brn":  # wide bounds, so that it matters whether its averages are kept
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
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def test_the_combinations_tried_here_are_those_the_configuration_allows():
    """Each norm with each network and nothing else: an option that is added must be tried here, or this fails."""
    assert set(config.options("norm")) == set(METHODS)
    assert set(config.options("model")) == {*SMALL, *LARGE}
    allowed, refused = [], {}
    for norm, (dataset, name) in itertools.product(METHODS, NETWORKS):
        try:
            configuration(norm, dataset, name)
        except ConfigError as error:
            refused[name] = str(error)
        else:
            allowed.append((norm, dataset, name))
    assert allowed == ALLOWED
    assert len(allowed) == 5 * 8 - 5
    for name, message in refused.items():
        sentence = rf"model must be one of nin, vgg16 with norm=normprop, which [^.]*residual[^.]*, not '{name}'\."
        assert re.fullmatch(sentence, message)


# With two forwards the methods that have statistics; with one the others, and on CIFAR's networks all.
TRAINED = [
    (*pair, forwards)
    for pair, forwards in itertools.product(ALLOWED, (1, 2))
    if (METHODS[pair[0]].statistics if forwards == 2 else not METHODS[pair[0]].statistics or pair[1] == "cifar10")
]


@pytest.mark.parametrize(
    ("norm", "dataset", "name", "forwards"), TRAINED, ids=["-".join(map(str, one)) for one in TRAINED]
)
def test_trains_at_batch_size_2_and_continues_from_a_state_dict_with_the_same_bits(
    norm, dataset, name, forwards, narrow
):
    settings = configuration(norm, dataset, name, forwards)
    training = Training(settings)
    losses = [training.iterate(0, PIXELS[dataset])]
    half_way = training.state()
    losses.append(training.iterate(1, PIXELS[dataset]))

    assert torch.tensor(losses).isfinite().all()
    parameters = dict(training.model.named_parameters())
    assert training.gradients.keys() == parameters.keys()
    for parameter, gradient in training.gradients.items():
        assert gradient.isfinite().all(), parameter
    end = training.state()
    assert all(tensor.isfinite().all() for tensor in end["model"].values())
    # Each part of the network learns: a gradient of zeros only would be a part that is cut off.
    for filters in (key for key, p in parameters.items() if p.dim() == 4):
        assert training.gradients[filters].any()
        assert not torch.equal(half_way["model"][filters], end["model"][filters])
    # Each iteration takes one batch into the statistics.
    for layer in norm_layers(training.model):
        assert (layer.memory_count.count_nonzero() if norm == "mbn" else layer.num_batches_tracked) == 2

    other = Training(settings, seed=1)
    other.load(half_way)
    other.iterate(1, PIXELS[dataset])
    assert_same_bits(other.state(), end)


@every_pair
def test_parameters_have_the_names_and_shapes_of_the_bn_version(norm, dataset, name):
    with torch.device("meta"):
        ours, expected = (
            [(key, p.shape) for key, p in build(configuration(n, dataset, name)).named_parameters()]
            for n in (norm, "bn")
        )
    if norm == "normprop":  # a gain and a shift for each filter, in the place of the layer that follows
        filters = [(key.removesuffix("weight"), shape) for key, shape in expected if len(shape) == 4]
        rest = [(key, shape) for key, shape in expected if key.startswith("classifier")]
        expected = [(f"{k}{n}", s if n == "weight" else s[:1]) for k, s in filters for n in ("weight", "gain", "shift")]
        expected += rest
    assert ours == expected


def test_rows_of_normprop_have_unit_norm_before_and_after_every_step():
    training = Training(configuration("normprop", "cifar10", "nin"))
    for number in range(3):
        norms = torch.cat([layer.weight.detach().flatten(1).norm(dim=1) for layer in unit_layers(training.model)])
        torch.testing.assert_close(norms, torch.ones(len(norms)))
        training.iterate(number, 32)


@pytest.mark.parametrize("norm", METHODS)
def test_a_second_forward_has_no_gradients_and_is_skipped_with_one_warning_where_nothing_remembers(
    norm, tmp_path, capsys
):
    name = "nin" if norm == "normprop" else "resnet20"
    settings = configuration(norm, "digits", name, forwards=2)
    settings.machine.threads, settings.machine.device, settings.machine.mode = 1, "cpu", "eager"
    run = Run(
        settings, lambda layers: models.build(layers=layers, **config.network(settings)), tmp_path / "run", lambda: None
    )
    remembers = norm in ("bn", "brn", "mbn")
    warning = rf"warning: .*norm={norm}.* second forward .*\n"
    assert re.fullmatch("" if remembers else warning, capsys.readouterr().err)

    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    run.update(torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))
    assert calls == ([True, False] if remembers else [True])
    assert capsys.readouterr().err == ""


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
    assert (layer.num_groups, layer.num_channels, layer.eps) == (groups, channels, 1e-5)
    assert layer(torch.randn(2, channels, 3, 3)).isfinite().all()


OTHER = {"eps": 0.01, "momentum": 0.3, "memory": 7, "decay": 0.5, "lam": [0.4], "gradient": "batch", "group": 3}


@pytest.mark.parametrize("norm", METHODS)
def test_every_setting_of_a_method_reaches_its_layer(norm):
    """That forwards does, too. The two of gn that make one number have a test of their own."""
    settings = configuration(norm, "cifar10", "nin", forwards=2)
    names = {field.name for field in dataclasses.fields(settings.norm)} - {"name", "groups", "channels"}
    for name in names:
        assert getattr(settings.norm, name) != OTHER[name]
        setattr(settings.norm, name, OTHER[name])
    layer = from_config(settings).norm(8)
    for name in names:
        wanted = OTHER[name][0] if name == "lam" else OTHER[name]
        assert getattr(layer, {"group": "group_size"}.get(name, name)) == wanted, name
    assert len(names) == {"bn": 3, "mbn": 6, "brn": 3, "gn": 1, "normprop": 0}[norm]
    assert getattr(layer, "forwards", 2) == 2


def test_every_setting_of_a_network_reaches_it():
    settings = config.load(["model=nin", "model.dropout=0.25", "model.gamma=uniform"])
    torch.manual_seed(0)
    model = build(settings)
    assert [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)] == [0.25, 0.25]
    gamma = torch.cat([layer.weight.detach() for layer in norm_layers(model)])
    assert ((gamma > 0) & (gamma < 1)).all()
    assert 0.4 < float(gamma.mean()) < 0.6


@pytest.mark.parametrize(("settings", "groups"), [([], [4, 8, 16]), (["norm.groups=8", "norm.channels=1"], [8, 8, 8])])
def test_the_groups_of_gn_are_settings(settings, groups):
    norm = from_config(compose("norm=gn", *settings)).norm
    assert [norm(channels).num_groups for channels in (16, 32, 64)] == groups
