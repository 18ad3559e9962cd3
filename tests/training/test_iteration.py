"""One iteration of training: what is remembered when, and what is reported."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import reference_of, set_changing
from running import Small, follow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mbn.network_layers import bn, brn, gn, mbn
from mbn.norm.base import norm_layers
from mbn.training import iteration as update_module
from mbn.training.iteration import READ_EVERY, Update

CPU = torch.device("cpu")


def batch(size=8, dtype=torch.float64):
    return torch.randn(size, 3, 6, 6, dtype=dtype), torch.randint(0, 10, (size,))


def prepare(layers, forwards, mode="eager", dtype=torch.float64, batch_size=None, **settings):
    """A small network, the learning rate its optimiser reads, and its Update."""
    model = Small(layers, **settings).to(dtype)
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, fused=True)
    update = Update(model, optimizer, forwards, mode=mode, precision="fp32", device=CPU, batch_size=batch_size)
    return model, lr, update


def state(model):
    return copy.deepcopy(model.state_dict())


METHODS = {
    "bn 1": (bn(1), 1),
    "bn 2": (bn(2), 2),
    "brn 1": (brn(1), 1),
    "brn 2": (brn(2), 2),
    "mbn 1": (mbn(1, 0.1, memory=3), 1),
    "mbn 2": (mbn(2, 0.1, memory=3), 2),
    "mbn 2 batch": (mbn(2, 0.1, memory=3, gradient="batch"), 2),
    "bn 1 in groups": (bn(1, group=2), 1),
    "brn 2 in groups": (brn(2, group=2), 2),
    "mbn 1 in groups": (mbn(1, 0.1, memory=3, group=2), 1),
    "mbn 2 batch in groups": (mbn(2, 0.1, memory=3, gradient="batch", group=2), 2),
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_each_batch_is_remembered_once_with_the_new_weights_where_there_are_two_forwards(method):
    layers, forwards = METHODS[method]
    model, _, update = prepare(layers, forwards)
    references = [reference_of(layer) for layer in norm_layers(model)]
    for size in (8, 8, 5, 8):
        before = model.conv1.weight.detach().clone()
        images, labels = batch(size)
        if forwards == 1:
            follow(model, references, images)
        update(images, labels)
        assert not torch.equal(model.conv1.weight, before)
        if forwards == 2:
            follow(model, references, images)
        for layer, expected in zip(norm_layers(model), references, strict=True):
            for name, value in expected.buffers().items():
                torch.testing.assert_close(getattr(layer, name), value)


def test_bn_with_one_forward_is_torchs_under_a_learning_rate_that_changes():
    model, lr, update = prepare(bn(1), forwards=1)
    plain = copy.deepcopy(model)
    for name in ("norm1", "norm2"):
        theirs = nn.BatchNorm2d(getattr(plain, name).num_features, dtype=torch.float64)
        theirs.load_state_dict(getattr(plain, name).state_dict())
        setattr(plain, name, theirs)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for rate in (0.1, 0.1, 0.02, 0.0):
        lr.fill_(rate)
        optimizer.param_groups[0]["lr"] = rate
        images, labels = batch()
        update(images, labels)
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
        torch.testing.assert_close(state(model), state(plain))


def test_the_second_forward_changes_no_weight():
    """It only remembers: after the first iteration, weights are the same with one and with two forwards."""
    images, labels = batch()
    weights = []
    for forwards in (1, 2):
        torch.manual_seed(0)
        model, _, update = prepare(mbn(forwards, 0.5), forwards)
        update(images, labels)
        weights.append({name: p.detach() for name, p in model.named_parameters()})
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_no_second_forward_where_nothing_would_remember():
    model, _, update = prepare(gn(2), forwards=2)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    update(*batch())
    assert len(passes) == 1
    model, _, update = prepare(mbn(2, 0.1), forwards=2)
    model.register_forward_hook(lambda *_: passes.append(1))
    update(*batch())
    assert len(passes) == 3


def test_dropout_draws_a_fresh_mask_in_the_second_forward():
    model, _, update = prepare(mbn(2, 0.1), forwards=2, dropout=0.5)
    masks = []
    model.dropout.register_forward_hook(lambda _, x, y: masks.append(y == 0))
    update(*batch(64))
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_drain_gives_losses_and_errors_in_order():
    model, _, update = prepare(bn(1), forwards=1)
    for count in (3, 1, READ_EVERY, 0, 2):
        expected = []
        for _ in range(count):
            images, labels = batch()
            with torch.no_grad():
                logits = copy.deepcopy(model)(images)
            expected.append((F.cross_entropy(logits, labels).item(), int((logits.argmax(1) != labels).sum())))
            update(images, labels)
        assert update.pending == count
        measured = update.drain()
        assert [m[0] for m in measured] == pytest.approx([e[0] for e in expected], rel=1e-6)
        assert [m[1] for m in measured] == [e[1] for e in expected]
        assert update.pending == 0


def test_a_non_finite_loss_is_reported_as_it_is():
    model, _, update = prepare(bn(1), forwards=1)
    update(*batch())
    with torch.no_grad():
        model.fc.bias.fill_(float("inf"))
    update(*batch())
    finite, infinite = [loss for loss, _ in update.drain()]
    assert finite == finite
    assert not infinite < float("inf")


# Only this method uses the slow C++ compiler. The others are compiled without it, which tests the same graphs.
FULLY_COMPILED = ("mbn 2",)


@every_method
def test_compiled_iterations_equal_eager_ones(method, monkeypatch):
    """50 iterations in float64, and with Inductor 3 in float32: equal weights, losses, memories and moving averages.

    The learning rate and lambda change meanwhile, and some batches are smaller. Nothing is compiled twice.

    The learning rate is not 0.1: then rounding errors grow tenfold an iteration, and the last digits say nothing.
    """
    layers, forwards = METHODS[method]
    monkeypatch.setattr(update_module, "_compiled", {})
    cases = [(torch.float64, 50, 1e-8), (torch.float32, 3, 1e-4)]
    if method not in FULLY_COMPILED:
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend="aot_eager"))
        del cases[1:]
    for dtype, iterations, tolerance in cases:
        batches = [batch(8 if t % 7 != 5 else 3, dtype) for t in range(iterations)]
        results = []
        torch._dynamo.reset()
        for mode in ("eager", "compile"):
            torch.manual_seed(0)
            model, lr, update = prepare(layers, forwards, mode, dtype, batch_size=8)
            for t, (images, labels) in enumerate(batches):
                phase = 3 * t // iterations
                lr.fill_([0.01, 0.005, 0.001][phase])
                set_changing(model, [0.1, 0.5, 0.9][phase], [1.0, 2.0, 3.0][phase], [0.0, 0.5, 5.0][phase])
                with torch._dynamo.config.patch(error_on_recompile=t > 0):
                    update(images, labels)
            results.append((state(model), update.drain()))
        torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)


def test_the_second_forward_keeps_nothing_for_a_backward_pass():
    _, _, update = prepare(mbn(2, 0.1), forwards=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(update.layers[0].phase) or t, lambda t: t):
        update(*batch())
    assert set(kept) == {"first"}


@pytest.mark.parametrize("layers", [mbn(2, 0.1), mbn(2, 0.1, group=3), brn(2, group=3), bn(2, group=3)])
def test_fifty_iterations_read_from_the_device_once(layers, reads):
    """Reading a value, a list or a copy on the host waits for a GPU."""
    _, _, update = prepare(layers, forwards=2)

    class Values(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*args, **(kwargs or {}))

    batches = [batch() for _ in range(READ_EVERY)]
    reads.clear()
    with Values():
        for images, labels in batches:
            update(images, labels)
        assert reads == []
        assert len(update.drain()) == READ_EVERY
    assert reads == ["tolist"]
