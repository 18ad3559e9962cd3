"""convert on random networks: nested, with shared layers, hooks, layers in lists, and BatchNorms of several kinds."""

import copy
import inspect

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert_subclasses import BatchNormAct, random_state, with_function
from torch import nn
from torch.testing import assert_close

from mbn import convert, norm_layers, to_batch_norm
from mbn.norm.convert import NORMS


class Listed(nn.Module):
    """Runs its layers through a list that torch does not know of."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = [(i, layer) for i, layer in enumerate(layers)]

    def forward(self, x):
        for _, layer in self.order:
            x = layer(x)
        return x


BATCH_NORMS = {
    "plain": lambda: nn.BatchNorm2d(3),
    "eps": lambda: nn.BatchNorm2d(3, eps=0.1, momentum=None),
    "no affine": lambda: nn.BatchNorm2d(3, affine=False),
    "children": lambda: BatchNormAct(3, nn.SiLU, 0.3),
    "function": lambda: with_function(F.relu),
    "its own mode": lambda: nn.BatchNorm2d(3).eval(),
    "frozen": lambda: nn.BatchNorm2d(3).requires_grad_(False),
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    BATCH_NORMS["no bias"] = lambda: nn.BatchNorm2d(3, bias=False)
OTHERS = {"conv": lambda: nn.Conv2d(3, 3, 1), "relu": nn.ReLU, "group norm": lambda: nn.GroupNorm(1, 3)}
CONTAINERS = {"sequential": nn.Sequential, "listed": Listed}

kinds = st.sampled_from([*BATCH_NORMS, *OTHERS, "again"])
networks = st.recursive(
    st.tuples(kinds, st.booleans()),
    lambda inner: st.tuples(st.sampled_from([*CONTAINERS]), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


def build(drawn, made):
    """The network that was drawn, as nested pairs; made: its BatchNorms so far."""
    kind, more = drawn
    if kind in CONTAINERS:
        return CONTAINERS[kind](*(build(inner, made) for inner in more))
    if kind == "again" and made:
        return made[-1]
    if kind in OTHERS:
        return OTHERS[kind]()
    layer = random_state(BATCH_NORMS.get(kind, BATCH_NORMS["plain"])())
    made.append(layer)
    if more:
        layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


@settings(max_examples=60)
@given(drawn=networks, norm=st.sampled_from([*NORMS]))
def test_a_random_network_converts_there_and_back(drawn, norm):
    made = []
    model = nn.Sequential(nn.BatchNorm2d(3), build(drawn, made))
    old, x = copy.deepcopy(model).eval(), torch.randn(4, 3, 4, 4)
    parameters, modes = dict(model.named_parameters()), [layer.training for layer in made]
    assert convert(model, norm) is model

    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    assert len(norm_layers(model)) == len(made) + 1
    assert sorted(layer.training for layer in norm_layers(model)[1:]) == sorted(modes)
    assert_close(model.eval()(x), old(x))
    back = to_batch_norm(model)
    assert [type(layer) for layer in back.modules()] == [type(layer) for layer in old.modules()]
    assert list(back.state_dict()) == list(old.state_dict())
    assert_close(back(x), old(x))
    model.train()(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
