"""Averages of weights and buffers: timm's ModelEmaV3, torch's AveragedModel."""

import copy

import pytest
from little import KINDS, differences, loader, network, sgd, train
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from mbn import second_forward
from mbn.norm.base import norm_layers

CLIENTS = {
    "timm": lambda net: (ema := ModelEmaV3(net, decay=0.5), ema.update),
    "torch": lambda net: (
        ema := AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
        ema.update_parameters,
    ),
}
clients = pytest.mark.parametrize("client", [pytest.param(c, marks=pytest.mark.clients(c)) for c in CLIENTS])


def averaged(net, client):
    """An average with decay 0.5 over five iterations, and the networks of these."""
    average, update = CLIENTS[client](net)
    optimizer, seen = sgd(net), []
    for batch in list(loader())[:5]:
        train(net, [batch], optimizer)
        update(net)
        seen.append(copy.deepcopy(net))
    return average.eval(), seen


def mean_of(states, first):
    """The moving average, which begins with the first state or is it."""
    value = first
    for state in states:
        value = value + 0.5 * (state - value)
    return value


@clients
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_evaluates_by_the_averaged_statistics(client, kind, figure):
    net = network(kind)
    start = copy.deepcopy(net)
    average, seen = averaged(net, client)
    first, rest = (start, seen) if client == "timm" else (seen[0], seen[1:])
    for name in ("1.running_mean", "5.weight", "0.weight"):
        expected = mean_of([each.state_dict()[name] for each in rest], first.state_dict()[name])
        assert_close(average.module.state_dict()[name], expected)
    before = copy.deepcopy(average.module)
    assert average(next(iter(loader()))[0]).isfinite().all()
    assert differences(before, average.module) == 0
    figure("weights and statistics are the averages over 5 iterations")


@clients
def test_an_averages_memory_can_be_trained_on_after_k_second_forwards(client, figure):
    """The rows are averages over entries of different ages, and their counts are no numbers of values."""
    average, _ = averaged(network("mbn"), client)
    net = average.module.train()
    averages = net[1].memory_count.tolist()
    assert averages != [100, 100, 100]
    for images, _ in list(loader())[:3]:
        second_forward(net, images)
    assert net[1].memory_count.tolist() == [100, 100, 100]
    fresh = copy.deepcopy(net)
    for layer in norm_layers(fresh):
        layer.forget()
    for images, _ in list(loader())[:3]:
        second_forward(fresh, images)
    assert differences(net[1], fresh[1]) == 0
    figure(f"counts {', '.join(f'{c:.0f}' for c in averages)}; after 3 second forwards 100, 100, 100")
