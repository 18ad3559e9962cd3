"""accelerate: its loop, its checkpoints, and networks that begin without memory on the meta device."""

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from little import KINDS, differences, loader, network, remembers_in_second, sgd, train, train_accumulating

from mbn import convert, second_forward, set_lambda

pytestmark = pytest.mark.clients("accelerate")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def accelerator():
    yield lambda **settings: accelerate.Accelerator(cpu=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def loop(accelerator, net):
    """accelerate's usual loop."""
    model, optimizer, data = accelerator.prepare(net, sgd(net), loader())
    for images, labels in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and remembers_in_second(net):
            second_forward(model, images)
    return accelerator.unwrap_model(model)


@kinds
def test_training_equals_the_plain_loop_to_the_bit(kind, accelerator, figure):
    assert differences(loop(accelerator(), network(kind)), train(network(kind))) == 0
    figure("difference 0 after 6 iterations")


def test_the_second_forward_has_the_mixed_precision_of_the_first(accelerator, figure):
    class Autocast(torch.nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    net = loop(accelerator(mixed_precision="bf16"), network())
    assert differences(net, train(Autocast(*network()))) == 0
    assert differences(net, train(network())) > 0
    figure("difference 0 after 6 iterations in bf16")


def test_gradient_accumulation_remembers_after_the_step(accelerator, figure):
    net, plain = loop(accelerator(gradient_accumulation_steps=2), network()), train_accumulating(network())
    assert differences(net, plain) == 0
    figure("difference 0 after 3 steps of 2 batches")


def test_a_loaded_state_has_the_schedules_lambda(accelerator, figure, tmp_path):
    here = accelerator()
    net = network()
    model = here.prepare(net)
    set_lambda(model, 0.9)
    here.save_state(tmp_path)
    set_lambda(model, 0.1)
    here.load_state(tmp_path)
    assert net[1].lam == 0.9
    figure("lambda 0.9")


@pytest.mark.parametrize("include_buffers", [True, False])
@kinds
def test_a_network_without_weights_converts_and_trains_once_they_are_loaded(kind, include_buffers, figure, tmp_path):
    before = train(network(kind))
    torch.save(before.state_dict(), tmp_path / "weights.pt")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = convert(network(None), **KINDS[kind])
    assert all(p.is_meta for p in empty.parameters())
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "weights.pt"), device_map={"": "cpu"})
    assert differences(loaded, before) == 0
    assert differences(train(loaded), train(before)) == 0
    figure("difference 0 after 6 iterations more")


@kinds
def test_statistics_of_a_trained_batch_norm_count_once_they_are_loaded(kind, figure, tmp_path):
    before = convert(train(network(None)), **KINDS[kind])
    torch.save(before.state_dict(), tmp_path / "weights.pt")
    with accelerate.init_empty_weights(include_buffers=True):
        empty = convert(network(None), **KINDS[kind])
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path / "weights.pt"), device_map={"": "cpu"})
    assert differences(train(loaded), train(before)) == 0
    figure("difference 0 after 6 iterations more")
