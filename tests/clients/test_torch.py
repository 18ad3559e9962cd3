"""torch's own ways with a module and a loop that the layers meet outside this project."""

import pytest
import torch
import torch.nn.functional as F
from little import KINDS, loader, network, remembers_in_second, sgd
from torch import nn

from mbn import BatchNorm2d, BatchRenorm2d, MemorizedBatchNorm2d, second_forward

pytestmark = pytest.mark.clients("torch")
layers = pytest.mark.parametrize("layer", [BatchNorm2d, BatchRenorm2d, MemorizedBatchNorm2d])


@layers
def test_skip_init_and_reset_parameters_give_a_new_layer(layer, figure):
    made = nn.utils.skip_init(layer, 5, forwards=2)
    made.reset_parameters()
    for name, value in layer(5, forwards=2).state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    figure("same state")


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_an_inf_pixel_costs_one_step_and_evaluation_stays_finite(kind, figure):
    """60 iterations with a GradScaler; torch's BatchNorm loses one step too, and evaluates to NaN from then on."""
    net = network(kind)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", growth_interval=10**6)
    data = list(loader()) * 10
    lost = 0
    for i, (images, labels) in enumerate(data):
        if i == 30:
            images = images.clone()
            images[0, 0, 0, 0] = torch.inf
        before = net[0].weight.detach().clone()
        scaler.scale(F.cross_entropy(net(images), labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        lost += torch.equal(net[0].weight, before)
        if kind and remembers_in_second(net):
            second_forward(net, images)
    finite = bool(net.eval()(data[0][0]).isfinite().all())
    assert lost == 1
    assert finite == (kind not in (None, "bn"))
    figure(f"{lost} step of 60 lost, scale {scaler.get_scale():.0f}, evaluation {'finite' if finite else 'NaN'}")
