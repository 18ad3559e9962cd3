"""Networks of timm and torchvision: each kind of norm layer that they have. tests/clients goes through all families."""

import pytest
import timm
import torch
import torchvision
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.testing import assert_close

from mbn import MemorizedBatchNorm2d, convert, norm_layers, second_forward, to_batch_norm

# BatchNorm2d; BatchNormAct2d; both; BatchNorm1d; Conv-BatchNorm pairs in lists.
NETWORKS = {
    "test_resnet": 64,
    "test_byobnet": 64,
    "test_efficientnet": 64,
    "test_coatnet": 160,
    "ghostnet_050": 64,
    "efficientvit_m0": 224,
}


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def randomise(model):
    """Let the statistics of the BatchNorms be other than 0 and 1; return these layers."""
    layers = batch_norms(model)
    for layer in layers:
        layer.running_mean.normal_(std=0.1)
        layer.running_var.uniform_(0.5, 1.5)
    return layers


def step(model, x):
    """One iteration with its second forward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(x).square().mean().backward()
    optimizer.step()
    second_forward(model, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_timm_converts_with_the_same_outputs_there_and_back_and_trains(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, NETWORKS[name], NETWORKS[name])
    classes, names = [type(layer) for layer in randomise(model)], [*dict(model.named_parameters())]
    with torch.no_grad():
        expected = model(x)
        assert_close(convert(model)(x), expected)
        assert [*dict(model.named_parameters())] == names
        back = to_batch_norm(model)
        assert [type(layer) for layer in batch_norms(back)] == classes
        assert_close(back(x), expected)
    step(model, x)
    assert all(layer.memory_count[0] > 0 for layer in norm_layers(model))


def test_the_synchronised_layers_of_timm_convert():
    model, x = timm.create_model("test_efficientnet").eval(), torch.randn(2, 3, 64, 64)
    randomise(model)
    with torch.no_grad():
        expected = model(x)
    model = convert_sync_batchnorm(model)
    classes = {type(layer) for layer in batch_norms(model)}
    assert {cls.__name__ for cls in classes} == {"SyncBatchNormAct"}
    convert(model, sync=True)
    with torch.no_grad():
        assert_close(model.eval()(x), expected)
    assert {type(layer) for layer in batch_norms(to_batch_norm(model))} == classes


@pytest.mark.parametrize(
    "make",
    [
        lambda norm: timm.create_model("test_resnet", norm_layer=norm, zero_init_last=True),
        lambda norm: torchvision.models.resnet18(norm_layer=norm, zero_init_residual=True),
        lambda norm: torchvision.models.mobilenet_v2(norm_layer=norm, width_mult=0.25),
        lambda norm: torchvision.models.mobilenet_v3_small(norm_layer=norm, width_mult=0.25),
    ],
)
def test_our_layer_can_be_handed_over_as_norm_layer(make):
    model = make(MemorizedBatchNorm2d)
    assert batch_norms(model) == []
    assert len(norm_layers(model)) == len(batch_norms(make(nn.BatchNorm2d)))
    step(model, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_frozen_layers_of_torchvision_become_ours_by_replace(eps):
    """As mbn/norm/README.md does it. torchvision gives the layers of COCO's detectors an eps of 0."""

    def thawed(old):
        new = nn.BatchNorm2d(len(old.weight), device=old.weight.device)
        new.load_state_dict(old.state_dict(), strict=False)
        new.running_var.add_(old.eps - new.eps).clamp_(min=0)
        return new

    frozen = torchvision.ops.FrozenBatchNorm2d
    model, x = torchvision.models.resnet18(norm_layer=frozen).eval(), torch.randn(2, 3, 64, 64)
    torchvision.models.detection._utils.overwrite_eps(model, eps)
    for layer in model.modules():
        if isinstance(layer, frozen):  # so small that eps counts
            layer.running_var.uniform_(1e-4, 1e-3)
            layer.weight.fill_(0.01)
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match="replace= says what takes the place of its FrozenBatchNorm2d"):
            convert(model)
        convert(model, replace={frozen: thawed})
        assert len(norm_layers(model)) == 20
        assert_close(model(x), expected)
