"""One iteration of training: what is remembered when, and what is reported."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mbn.layers import bn, brn, gn, mbn
from mbn.norm.base import norm_layers
from mbn.norm.memorized import set_lambda
from mbn.norm.renorm import set_renorm
from mbn.training import iteration as update_module
from mbn.training.iteration import READ_EVERY, Update

CPU = torch.device("cpu")


class Small(nn.Module):
    """Two convolutions with norms, so that the second one's input depends on what the first one normalises by."""

    def __init__(self, layers, dropout=0.0, widths=(4, 5)):
        super().__init__()
        a, b = widths
        self.conv1, self.norm1, self.act1 = layers.conv(3, a, 3, padding=1, bias=False), layers.norm(a), layers.act()
        self.conv2, self.norm2, self.act2 = layers.conv(a, b, 3, stride=2, bias=False), layers.norm(b), layers.act()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(b, 10)

    def forward(self, x):
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


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


def channel_moments(x):
    """Mean and biased variance of each channel, and the number of values in one."""
    mu = x.sum((0, 2, 3)) / (x.numel() / x.shape[1])
    s2 = (x - mu.view(1, -1, 1, 1)).square().sum((0, 2, 3)) / (x.numel() / x.shape[1])
    return mu, s2, x.numel() // x.shape[1]


def by_hand(x, remembered, layer, lam, eta=0.9, eps=1e-5):
    """Eq. 6 and 7 on x with a list of remembered (mu, s2, n), newest first."""
    entries = [(1.0, *channel_moments(x))] + [(lam * eta**age, *entry) for age, entry in enumerate(remembered)]
    total = sum(alpha * n for alpha, _, _, n in entries)
    mu = sum(alpha * n * m for alpha, m, _, n in entries) / total
    s2 = sum(alpha * n * ((m - mu) ** 2 + v) for alpha, m, v, n in entries) / total
    shape = (1, -1, 1, 1)
    xhat = (x - mu.view(shape)) / (s2.view(shape) + eps).sqrt()
    return layer.weight.view(shape) * xhat + layer.bias.view(shape)


@pytest.mark.parametrize("gradient", ["paper", "batch"])
def test_two_forwards_remember_the_moments_under_the_new_weights_one_entry_a_batch(gradient):
    lam = 0.5
    model, _, update = prepare(mbn(2, lam, memory=2, gradient=gradient), forwards=2)
    first, second = [], []  # what each layer should remember, newest first
    for iteration, size in enumerate((8, 8, 5)):
        before = model.conv1.weight.detach().clone()
        images, labels = batch(size)
        update(images, labels)
        assert not torch.equal(model.conv1.weight, before)
        with torch.no_grad():  # the whole network again, with the weights as they are now
            x = F.conv2d(images, model.conv1.weight, padding=1)
            moments1 = channel_moments(x)
            x = by_hand(x, first, model.norm1, lam).relu()
            x = F.conv2d(x, model.conv2.weight, stride=2)
            moments2 = channel_moments(x)
        first, second = [moments1, *first][:2], [moments2, *second][:2]
        for layer, expected in ((model.norm1, first), (model.norm2, second)):
            assert int((layer.memory_count > 0).sum()) == min(iteration + 1, 2)
            for age, (mu, s2, n) in enumerate(expected):
                torch.testing.assert_close(layer.memory_mean[age], mu)
                torch.testing.assert_close(layer.memory_var[age], s2)
                assert layer.memory_count[age] == n


def test_one_forward_remembers_the_moments_under_the_old_weights():
    model, _, update = prepare(mbn(1, 0.5, memory=3), forwards=1)
    images, labels = batch()
    with torch.no_grad():
        mu, s2, n = channel_moments(model.conv1(images))
    update(images, labels)
    torch.testing.assert_close(model.norm1.memory_mean[0], mu)
    torch.testing.assert_close(model.norm1.memory_var[0], s2)
    assert model.norm1.memory_count.tolist() == [n, 0, 0]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("layers", [bn, brn], ids=["bn", "brn"])
def test_averages_move_once_an_iteration_whatever_the_number_of_forwards(layers, forwards):
    model, _, update = prepare(layers(forwards), forwards)
    for iteration in range(1, 4):
        update(*batch())
        assert [layer.num_batches_tracked.item() for layer in norm_layers(model)] == [iteration] * 2


def test_bn_with_two_forwards_averages_under_the_new_weights():
    model, _, update = prepare(bn(2, momentum=0.25), forwards=2)
    images, labels = batch()
    update(images, labels)
    with torch.no_grad():
        mu, s2, n = channel_moments(model.conv1(images))
    torch.testing.assert_close(model.norm1.running_mean, 0.25 * mu)
    torch.testing.assert_close(model.norm1.running_var, 0.75 + 0.25 * s2 * n / (n - 1))


def test_bn_with_one_forward_is_torchs():
    model, _, update = prepare(bn(1), forwards=1)
    plain = copy.deepcopy(model)
    for name in ("norm1", "norm2"):
        theirs = nn.BatchNorm2d(getattr(plain, name).num_features, dtype=torch.float64)
        theirs.load_state_dict(getattr(plain, name).state_dict())
        setattr(plain, name, theirs)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        images, labels = batch()
        update(images, labels)
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(state(model), state(plain))


def test_the_second_forward_changes_no_weight():
    """It only remembers: with one and with two forwards the first iteration's weights are the same."""
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


def test_a_new_learning_rate_in_the_tensor_takes_effect():
    model, lr, update = prepare(bn(1), forwards=1)
    update(*batch())
    lr.fill_(0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    update(*batch())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    lr.fill_(0.5)
    update(*batch())
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sgd_is_plain_momentum_with_decay_on_every_parameter():
    """v = 0.9 v + (g + 1e-4 w), w -= lr v: no Nesterov, no dampening, biases and gammas decayed too."""
    model, lr, update = prepare(bn(1), forwards=1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in weights.items()}
    for rate in (0.1, 0.1, 0.02):
        lr.fill_(rate)
        images, labels = batch()
        copied = copy.deepcopy(model)
        F.cross_entropy(copied(images), labels).backward()
        update(images, labels)
        for name, p in copied.named_parameters():
            speed[name] = 0.9 * speed[name] + p.grad + 1e-4 * weights[name]
            weights[name] = weights[name] - rate * speed[name]
        torch.testing.assert_close(dict(model.named_parameters()), weights)


METHODS = {
    "bn 1": (bn(1), 1),
    "bn 2": (bn(2), 2),
    "brn 1": (brn(1), 1),
    "brn 2": (brn(2), 2),
    "mbn 1": (mbn(1, 0.1, memory=3), 1),
    "mbn 2": (mbn(2, 0.1, memory=3), 2),
    "mbn 2 batch": (mbn(2, 0.1, memory=3, gradient="batch"), 2),
}
# Compiling with the C++ compiler takes long; what is compiled is the same with autograd's half alone.
QUICK = ("mbn 2",)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_iterations_equal_eager_ones(method, monkeypatch):
    """50 in float64 and 3 in float32: weights, losses, memories and moving averages, with a learning rate and a lambda
    that change, and a smaller batch on the way; and nothing is compiled twice.

    At a learning rate of 0.1 rounding errors grow tenfold an iteration, so that the last digits say nothing.
    """
    layers, forwards = METHODS[method]
    monkeypatch.setattr(update_module, "_compiled", {})
    if method not in QUICK:
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend="aot_eager"))
    for dtype, iterations, tolerance in ((torch.float64, 50, 1e-8), (torch.float32, 3, 1e-4)):
        batches = [batch(8 if t % 7 != 5 else 3, dtype) for t in range(iterations)]
        results = []
        torch._dynamo.reset()
        for mode in ("eager", "compile"):
            torch.manual_seed(0)
            model, lr, update = prepare(layers, forwards, mode, dtype, batch_size=8)
            for t, (images, labels) in enumerate(batches):
                phase = 3 * t // iterations
                lr.fill_([0.01, 0.005, 0.001][phase])
                set_lambda(model, [0.1, 0.5, 0.9][phase])
                set_renorm(model, [1.0, 2.0, 3.0][phase], [0.0, 0.5, 5.0][phase])
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


def test_fifty_iterations_read_from_the_device_once(monkeypatch):
    """What waits for a GPU: a value, a list or a copy on the host."""
    _, _, update = prepare(mbn(2, 0.1), forwards=2)
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, original=original, name=name):
            reads.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Values(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*args, **(kwargs or {}))

    batches = [batch() for _ in range(READ_EVERY)]
    with Values():
        for images, labels in batches:
            update(images, labels)
        assert reads == []
        assert len(update.drain()) == READ_EVERY
    assert reads == ["tolist"]
