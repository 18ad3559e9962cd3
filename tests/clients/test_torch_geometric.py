"""torch_geometric, whose BatchNorm holds torch's as `module`."""

import pytest
import torch
import torch.nn.functional as F
from little import KINDS, remembers_in_second
from torch_geometric.nn import GCN, BatchNorm

from mbn import convert, second_forward
from mbn.norm.base import norm_layers

pytestmark = pytest.mark.clients("torch_geometric")
kinds = pytest.mark.parametrize("kind", KINDS)


def network():
    torch.manual_seed(3)
    return GCN(in_channels=4, hidden_channels=8, num_layers=3, out_channels=2, norm="BatchNorm")


def graph():
    random = torch.Generator().manual_seed(1)
    nodes = torch.randn(20, 4, generator=random)
    return nodes, torch.randint(20, (2, 60), generator=random), torch.randint(2, (20,), generator=random)


def trained(net, steps=3):
    x, edges, labels = graph()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        F.cross_entropy(net(x, edges), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if remembers_in_second(net):
            second_forward(net, x, edges)
    return net


@kinds
def test_its_wrappers_convert_with_the_same_outputs_and_train(kind, figure):
    net = trained(network())
    x, edges, _ = graph()
    expected = net.eval()(x, edges)
    convert(net.train(), **KINDS[kind])
    assert len(norm_layers(net)) == 2
    assert all(isinstance(norm, BatchNorm) for norm in net.norms[:2])
    assert (net.eval()(x, edges) - expected).abs().max() < 1e-5
    trained(net.train())
    assert net.eval()(x, edges).isfinite().all()
    figure("2 layers")


@kinds
def test_reset_parameters_of_a_network_resets_the_layers(kind, figure):
    net = convert(network(), **KINDS[kind])
    trained(net)
    remembered = [layer.running_mean.clone() for layer in norm_layers(net)]
    net.reset_parameters()
    for layer, mean in zip(norm_layers(net), remembered, strict=True):
        settings = {name: getattr(layer, name) for name in layer.settings}
        for name, value in type(layer)(8, **settings).state_dict().items():
            assert torch.equal(layer.state_dict()[name], value)
        assert mean.abs().max() > 0
    figure("as a new layer")


@pytest.mark.parametrize("kind", ["bn", "mbn"])
def test_a_single_node_is_normalised_by_the_running_statistics_where_it_is_allowed(kind, figure):
    """Its wrapper reads running_mean and running_var, which BatchRenorm does not have."""
    layer = convert(BatchNorm(4, allow_single_element=True), **KINDS[kind]).train()
    x = graph()[0]
    layer(x)
    second_forward(layer, x) if kind == "mbn" else None
    assert torch.equal(layer(x[:1]), layer.eval()(x[:1]))
    figure("equal to evaluation")
