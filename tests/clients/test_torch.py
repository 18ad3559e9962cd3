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


@pytest.mark.parametrize("fault", ["an inf pixel", "a million in float16"])
@pytest.mark.parametrize("kind", [None, *KINDS], ids=["nn.BatchNorm", *KINDS])
def test_a_batch_that_overflows_costs_one_step_and_is_not_remembered(kind, fault, figure):
    """60 iterations with a GradScaler. Moving averages of torch's BatchNorm, and of ours, are NaN from then on."""
    net = network(kind)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", 2.0**10, growth_interval=10**6)
    data = list(loader()) * 10
    lost = 0
    for i, (images, labels) in enumerate(data):
        if i == 30 and fault == "an inf pixel":
            images = images.index_put((torch.tensor(0),) * 4, torch.tensor(torch.inf))
        elif i == 30:
            images = images * 1e6
        before = net[0].weight.detach().clone()
        with torch.autocast("cpu", torch.float16, enabled="float16" in fault):
            scaler.scale(F.cross_entropy(net(images), labels)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            lost += torch.equal(net[0].weight, before)
            if kind and remembers_in_second(net):
                second_forward(net, images)
    finite = bool(net.eval()(data[0][0]).isfinite().all())
    assert lost == 1
    assert scaler.get_scale() == 2**9
    assert finite == (kind not in (None, "bn"))
    figure(f"{lost} step of 60 lost, scale halved once, evaluation {'finite' if finite else 'NaN'}")
