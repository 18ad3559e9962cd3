"""BatchNorms that do more than normalise, and layers that convert does not know."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_kinds import SHAPES, shapes
from torch import nn
from torch.testing import assert_close

from mbn import convert, norm_layers, second_forward, to_batch_norm
from mbn.norm.convert import NORMS

TORCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
norms = pytest.mark.parametrize("norm", NORMS)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: its own dropout, then its own activation."""

    def __init__(self, channels, act=nn.ReLU, p=0.0):
        super().__init__(channels)
        self.drop = nn.Dropout(p)
        self.act = act(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class ActBatchNorm(BatchNormAct):
    """The children are applied in another order than registered, in which dropout draws other outputs."""

    def forward(self, x):
        return self.drop(self.act(super(BatchNormAct, self).forward(x)))


class OwnFormula(nn.BatchNorm2d):
    """Batch normalisation written by hand, and a slope that is an attribute."""

    def __init__(self, channels):
        super().__init__(channels)
        self.slope = 0.37

    def forward(self, x):
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return F.leaky_relu(y * self.weight.view(shape) + self.bias.view(shape), self.slope)


class Unused(nn.BatchNorm2d):
    """A child that forward does not apply."""

    def __init__(self, channels):
        super().__init__(channels)
        self.observer = nn.Linear(2, 2)


def with_function(function, base=nn.BatchNorm2d):
    """A layer of a class whose forward applies the function."""

    class WithFunction(base):
        def forward(self, x):
            return function(super().forward(x))

    return WithFunction(3)


def random_state(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-2, 2)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def seeded(layer, x):
    torch.manual_seed(5)
    return layer(x.clone())


ACTIVATIONS = (
    *(F.relu, F.relu6, F.leaky_relu, lambda x: F.leaky_relu(x, 0.2), F.elu, F.selu, F.gelu, F.silu, F.mish),
    *(lambda x: F.gelu(x, approximate="tanh"), F.hardswish, F.hardsigmoid, F.hardtanh, torch.sigmoid, torch.tanh),
    *(F.softplus, F.softsign, lambda x: x, torch.relu_),
)
LAYERS = {
    "children": lambda: BatchNormAct(3),
    "another activation": lambda: BatchNormAct(3, nn.SiLU),
    "dropout": lambda: BatchNormAct(3, nn.SiLU, 0.4),
    "another order": lambda: ActBatchNorm(3, nn.SiLU, 0.4),
    "own formula": lambda: OwnFormula(3),
    "unused child": lambda: Unused(3),
    **{f"function {i}": lambda f=f: with_function(f) for i, f in enumerate(ACTIVATIONS)},
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@layers
def test_a_subclass_becomes_our_layer_followed_by_what_it_does(make):
    """In training too, where an empty memory leaves batch norm; there and back it is of its own class."""
    old, x = random_state(make()), 9 * torch.randn(64, 3, 4, 4)
    new = convert(copy.deepcopy(old), pretrained_batches=0)
    assert [*new.state_dict()][:2] == ["weight", "bias"]
    assert {name for name, _ in old.named_parameters()} == {name for name, _ in new.named_parameters()}
    for training in (False, True):
        assert_close(seeded(new.train(training), x), seeded(old.train(training), x))
    second_forward(new, x)
    back = to_batch_norm(new.eval())
    assert type(back) is type(old)
    assert [*back.state_dict()] == [*old.state_dict()]
    assert [*dict(back.named_modules())] == [*dict(old.named_modules())]
    assert_close(seeded(back, x), seeded(new, x))
    assert not torch.equal(back.running_mean, old.running_mean)


@norms
@shapes
def test_it_does_so_for_every_norm_and_number_of_dimensions(norm, dims, shape):
    old, x = random_state(with_function(F.relu, TORCH[dims])).eval(), 9 * torch.randn(shape)
    new = convert(copy.deepcopy(old), norm)
    assert type(new) is NORMS[norm][dims - 1]
    assert (old(x) == 0).any()
    assert_close(new(x), old(x))
    assert_close(to_batch_norm(new)(x), old(x))


def test_gradients_pass_through_the_activation_also_in_place():
    old = random_state(BatchNormAct(3))
    new = convert(copy.deepcopy(old), pretrained_batches=0)
    x = torch.randn(SHAPES["2d"], requires_grad=True)
    dy = torch.randn(SHAPES["2d"])
    ours = torch.autograd.grad(new(x), [x, *new.parameters()], dy)
    assert_close(ours, torch.autograd.grad(old(x), [x, *old.parameters()], dy))


def test_children_stay_the_same_modules_and_can_be_exchanged():
    old = BatchNormAct(3)
    new = convert(nn.Sequential(old))[0]
    assert new.act is old.act
    assert [name for name, _ in new.named_modules()] == ["", "drop", "act"]
    new.act = nn.Sigmoid()
    assert new.eval()(torch.randn(SHAPES["2d"])).min() > 0
    assert isinstance(to_batch_norm(new).act, nn.Sigmoid)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_converted_layer_know_the_way_back(again):
    model = convert(nn.Sequential(BatchNormAct(3)))
    first, second = to_batch_norm(again(model)), to_batch_norm(model)
    assert type(first[0]) is type(second[0]) is BatchNormAct
    assert first[0].act is not second[0].act
    assert dict(model.named_modules()).keys() == {"", "0", "0.drop", "0.act"}


def test_nothing_is_disturbed_by_looking():
    model = nn.Sequential(random_state(BatchNormAct(3, p=0.5)), random_state(with_function(F.relu)))
    model[1].eval()
    tried = copy.deepcopy(model)
    model[0].register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    before = torch.get_rng_state()
    with torch.device("meta"):  # the user's default device
        convert(model)
    assert torch.equal(torch.get_rng_state(), before)
    for new, old in zip(model, tried, strict=True):
        assert new.training == old.training
        for name in ("running_mean", "running_var", "weight", "bias"):
            assert torch.equal(getattr(new, name), getattr(old, name))


def test_a_subclass_on_the_meta_device_is_tried_on_the_cpu():
    with torch.device("meta"):
        new = convert(BatchNormAct(3, lambda inplace: nn.PReLU()))
    assert new.followed_by == ("drop", "act")
    assert {t.device.type for t in new.state_dict().values()} == {"meta"}


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_subclass_of_sync_batch_norm_is_tried_where_it_cannot_train_on_the_cpu():
    old, x = SyncBatchNormAct(3), torch.randn(SHAPES["2d"])
    with pytest.raises(ValueError, match="expected input tensor to be on GPU"):
        old(x)
    new = convert(copy.deepcopy(old), sync=True)
    assert_close(new.eval()(x), old.eval()(x))
    back = to_batch_norm(new)
    assert type(back) is SyncBatchNormAct
    assert_close(back(x), old(x))


# What is refused.


class TwoInputs(nn.BatchNorm2d):
    def forward(self, x, y):
        return super().forward(x) + y


class AlwaysEval(nn.BatchNorm2d):
    """A frozen layer."""

    def train(self, mode=True):
        return super().train(False)


class PerhapsTwoInputs(nn.BatchNorm2d):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Halves(nn.BatchNorm2d):
    """As timm's SplitBatchNorm2d, whose statistics are taken over parts of the batch."""

    def forward(self, x):
        return torch.cat([super(Halves, self).forward(half) for half in x.chunk(2)])


class OfItsOwnKind(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        pass


@pytest.mark.parametrize(
    "old",
    [
        with_function(lambda x: F.dropout(x, 0.01)),
        with_function(lambda x: 1.001 * x),
        with_function(lambda x: x.clamp(0, 20)),
        with_function(lambda x: 0.5 * x + 0.5 * x.detach()),
        with_function(lambda x: x.detach()),
        with_function(lambda x: x.mean()),
        with_function(lambda x: (x, x)),
        TwoInputs(3),
        PerhapsTwoInputs(3),
        AlwaysEval(3),
        Halves(3),
        OfItsOwnKind(3),
    ],
)
def test_what_is_not_understood_is_refused_by_name(old):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(old))
    before = list(model.modules())
    name = type(old).__name__
    words = (
        rf"^layer 1\.0, a {name}, cannot .*convert\(model, replace=\{{{name}: function\}}\) says what takes its place$"
    )
    with pytest.raises(TypeError, match=words):
        convert(model)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


# replace.


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 2.0, "bias": 0.5, "running_mean": 1.0, "running_var": 3.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class FrozenMore(Frozen):
    pass


def thawed(old):
    new = nn.BatchNorm2d(len(old.weight))
    new.load_state_dict(old.state_dict(), strict=False)
    return nn.Sequential(new)


@norms
@pytest.mark.parametrize("cls", [Frozen, FrozenMore])
def test_replace_says_what_takes_the_place_of_a_layer_or_a_subclass_and_it_is_converted(norm, cls):
    shared, x = cls(3), torch.randn(SHAPES["2d"])
    model = nn.Sequential(shared, nn.Conv2d(3, 3, 1), shared, nn.BatchNorm2d(3)).eval()
    before = model(x)
    convert(model, norm, replace={Frozen: thawed})
    assert model[0] is model[2]
    assert [type(layer) for layer in norm_layers(model)] == [NORMS[norm][1]] * 2
    assert not any(layer.training for layer in model.modules())
    assert_close(model(x), before)


def test_the_nearest_class_of_replace_counts_and_what_returns_itself_stays():
    model = nn.Sequential(Frozen(3), FrozenMore(3), Halves(3))
    frozen, _, halves = model
    convert(model, replace={FrozenMore: thawed, Frozen: lambda old: old, nn.BatchNorm2d: lambda old: old})
    assert model[0] is frozen
    assert model[2] is halves
    assert len(norm_layers(model[1])) == 1


def test_replace_goes_before_all_rules_and_its_classes_do_not_count_in_what_it_returns():
    model = convert(nn.Sequential(Halves(3)), replace={nn.BatchNorm2d: lambda old: nn.Sequential(nn.BatchNorm2d(3))})
    assert len(norm_layers(model[0])) == 1


def test_replace_works_for_the_module_itself_and_may_keep_it_inside():
    calls, old = [], Frozen(3)
    handle = old.register_forward_hook(lambda module, *_: calls.append(module))
    new = convert(old, replace={Frozen: lambda old: nn.Sequential(old, nn.BatchNorm2d(3))})
    assert new[0] is old
    assert len(norm_layers(new)) == 1
    new(torch.randn(SHAPES["2d"]))
    assert calls == [new]
    handle.remove()
    new(torch.randn(SHAPES["2d"]))
    assert calls == [new]


def test_layers_of_ours_in_what_replace_returns_are_left():
    ours = convert(nn.BatchNorm2d(3))
    assert convert(Frozen(3), replace={Frozen: lambda old: ours}) is ours


def test_replace_that_returns_no_module_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), Frozen(3))
    with pytest.raises(TypeError, match="replace of Frozen must return a module, not NoneType"):
        convert(model, replace={Frozen: lambda old: None})
    assert type(model[0]) is nn.BatchNorm2d
