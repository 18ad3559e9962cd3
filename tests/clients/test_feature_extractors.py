"""torch.fx: the feature extractors of torchvision and timm on a converted network."""

import pytest
import timm
import torch
import torchvision
from little import KINDS, differences, remembers_in_second
from timm.models._features_fx import FeatureGraphNet
from torchvision.models.feature_extraction import create_feature_extractor

from mbn import convert, second_forward
from mbn.norm.base import norm_layers

kinds = pytest.mark.parametrize("kind", KINDS)


def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.clients("torchvision")
@kinds
def test_an_extractor_of_torchvision_from_a_converted_network_has_its_features_and_trains(kind, figure):
    net = convert(torchvision.models.resnet18(), **KINDS[kind])
    extractor = create_feature_extractor(net, ["layer1", "layer2"])
    found = {}
    for name in ("layer1", "layer2"):
        net.get_submodule(name).register_forward_hook(lambda module, args, y, name=name: found.update({name: y}))
    for mode in (True, False):
        net.train(mode)
        extractor.train(mode)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        net(images())
        net.load_state_dict(state)
        y = extractor(images())
        assert y.keys() == found.keys()
        assert all(torch.equal(y[name], found[name]) for name in y)
        if mode and remembers_in_second(extractor):
            second_forward(extractor, images())
    layer = extractor.get_submodule("layer1.1.bn2")
    assert layer is net.layer1[1].bn2
    assert layer.running_mean.abs().max() > 0
    figure("features with the same bits, in training and evaluation")


@pytest.mark.clients("timm")
@kinds
def test_a_graph_of_timm_from_a_converted_network_has_its_features(kind, figure):
    net = convert(timm.create_model("resnet18", num_classes=4), **KINDS[kind]).eval()
    graph = FeatureGraphNet(net, out_indices=(1, 2), out_map=["layer1", "layer2"]).eval()
    expected = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(images())))))
    assert torch.equal(graph(images())[0], expected)
    figure("features with the same bits")


@pytest.mark.clients("timm")
@kinds
def test_a_graph_of_timm_converts_and_keeps_its_features(kind, figure):
    net = timm.create_model("resnet18", features_only=True, feature_cfg={"feature_cls": "fx"}).eval()
    expected = net(images())
    convert(net, **KINDS[kind])
    assert len(norm_layers(net)) == 20
    apart = max(float((a - b).detach().abs().max()) for a, b in zip(net(images()), expected, strict=True))
    assert apart < 1e-4
    figure(f"20 layers, within {apart:.0e}")


@pytest.mark.clients("torch")
@kinds
def test_a_traced_network_is_the_network(kind, figure):
    net = convert(torchvision.models.resnet18(num_classes=4), **KINDS[kind]).train()
    traced = torch.fx.symbolic_trace(net)
    assert differences(net, traced) == 0
    assert sum(node.op == "call_module" and "bn" in str(node.target) for node in traced.graph.nodes) == 17
    net.eval()
    traced.eval()
    assert torch.equal(traced(images()), net(images()))
    figure("same outputs; a layer is a node of the graph")
