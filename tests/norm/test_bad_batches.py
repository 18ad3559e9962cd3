"""Batches that are not finite, have one value a channel, or are empty, and statistics that lost their precision."""

import copy
import functools

import pytest
import torch
from layer_kinds import KINDS, inputs, kinds, make, one_or_two, remember, snapshot, trained, unchanged
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from mbn import convert, held, second_forward, set_lambda
from mbn.norm.base import norm_layers
from mbn.norm.convert import NORMS
from mbn.norm.memories import AllMemories
from mbn.norm.second_forward import phase

# torch's own averages take everything in, and ours are torch's.
REMEMBERS = [kind for kind in KINDS if kind != "bn"]
remembering = pytest.mark.parametrize("kind", REMEMBERS)
values = pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])


def spoilt(x, where, value):
    """x with one value that is not finite, in one channel or in all."""
    x = x.clone()
    x[1, slice(1, 2) if where == "one channel" else slice(None), 0] = value
    return x


# Batches that are not finite.


@pytest.mark.parametrize(
    ("value", "where", "dtype"),
    [
        (float("inf"), "one channel", torch.float32),
        (-float("inf"), "all channels", torch.float64),
        (float("nan"), "one channel", torch.float64),
        (float("inf"), "all channels", torch.float16),
    ],
)
@remembering
@one_or_two
def test_a_batch_that_is_not_finite_is_not_remembered(path, kind, forwards, value, dtype, where):
    """Wherever it stands, and in the memory's place of the next one: the run without it has the same bits."""
    good = [inputs(3 + t, 3, 2, at=t, dtype=dtype) for t in range(5)]
    layer, without = (make(kind, dims=3, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    for net in (layer, without):
        net.forwards = forwards
    remember(layer, spoilt(good[0], where, value))  # the very first
    assert unchanged(snapshot(without), layer)
    for x in good:
        remember(layer, x)
        remember(layer, spoilt(x, where, value))
        remember(without, x)
        assert unchanged(snapshot(without), layer)
    assert layer.eval()(good[0]).isfinite().all()


@pytest.mark.parametrize("number", [1, 2])
@remembering
def test_a_batch_that_is_too_large_to_be_pooled_is_not_remembered(path, kind, number):
    """Its moments are finite, but the square of its distance from an empty row, or from another such batch, is not."""
    layers = [make(kind, dims=2, dtype=torch.float32, forwards=2) for _ in range(number)]
    good, net = torch.randn(4, 3), nn.Sequential(*layers)
    for x in (good * 1e15 + 3e19, good, good - 3e19, good + 9e18, good - 9e18):
        second_forward(net, x)
        assert all(b.isfinite().all() for b in net.buffers())


@values
@remembering
def test_statistics_that_a_batch_norm_brought_wait_for_a_batch_that_is_finite(kind, value):
    old = nn.BatchNorm2d(3)
    old(torch.randn(8, 3, 4, 4) + 2)
    layer, without = (convert(copy.deepcopy(old), norm=kind.split()[0], forwards=1) for _ in range(2))
    remember(layer, spoilt(torch.randn(5, 3, 4, 4), "one channel", value))
    for net in (layer, without):
        net(torch.arange(96.0).view(2, 3, 4, 4))
    assert unchanged(snapshot(without), layer)


@pytest.mark.parametrize("together", [True, False])
@values
def test_in_a_network_each_layer_leaves_out_what_is_not_finite_for_it(value, together):
    """Of a batch that becomes infinite on its way the layers before have finite moments, and remember them."""

    class Plus(nn.Module):
        value = 0.0

        def forward(self, x):
            return x + self.value

    nets = []
    for spoils in (True, False):
        layers = [make(kind, 3, 2, forwards=2) for kind in [*REMEMBERS, *REMEMBERS]]
        net = nn.Sequential(*layers[:3], Plus(), *layers[3:])
        memories = AllMemories(layers) if together else None
        torch.manual_seed(1)
        for t in range(4):
            net[3].value = value if spoils and t == 2 else 0.0
            before = snapshot(net[4:])
            if together:
                with torch.no_grad(), phase(layers, "second"):
                    net(inputs(4, 3, at=t))
                memories.enter()
            else:
                second_forward(net, inputs(4, 3, at=t))
            if t == 2 and not spoils:
                net[4:].load_state_dict(before)
        nets.append(net)
    assert unchanged(snapshot(nets[1]), nets[0])


def loop(norm, forwards, bad):
    """Train for 30 iterations at float16's loss scale; return the network and the number of steps lost.

    In the tenth iteration a pixel is infinite, if bad; else that iteration is left out.
    """
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(64, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    lost = 0
    for t in range(30):
        torch.manual_seed(100 + t)
        x, labels = torch.randn(4, 1, 8, 8), torch.randint(2, (4,))
        if t == 10:
            if not bad:
                continue
            x[0, 0, 3, 3] = float("inf")
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(x), labels)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        lost += scaler.get_scale() < before
        if forwards == 2:
            second_forward(net, x)
    return net, lost


@pytest.mark.parametrize(
    ("kind", "lam"),
    [("bn", None), ("brn", None), *((f"mbn {g}", lam) for g in ("paper", "batch") for lam in (0.0, 0.9))],
)
@one_or_two
def test_with_a_grad_scaler_an_infinite_pixel_costs_one_step(kind, forwards, lam):
    settings = KINDS[kind] | ({"lam": lam} if kind.startswith("mbn") else {})
    norm = functools.partial(make, kind, dtype=torch.float32, forwards=forwards, **settings)
    (net, lost), (without, none) = loop(norm, forwards, bad=True), loop(norm, forwards, bad=False)
    assert (lost, none) == (1, 0)
    assert_close(list(net.parameters()), list(without.parameters()), atol=0, rtol=0)
    if kind != "bn":
        assert unchanged(snapshot(without), net)
        assert net.eval()(torch.randn(4, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("kind", ["mbn paper", "mbn batch"])
@values
def test_at_lambda_0_a_memory_that_is_not_finite_does_not_matter(path, kind, value):
    """W = 0 gives the batch's own moments exactly."""
    layer, x = trained(kind, lam=0.0), inputs(4, 3, 2, 2).requires_grad_()
    for name in ("memory_mean", "memory_var", "running_mean", "running_var"):
        getattr(layer, name).fill_(value)
    twin = nn.BatchNorm2d(3).double()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k in ("weight", "bias")}, strict=False)
    dy = torch.randn_like(x)
    with held(layer):
        results = [[y, *torch.autograd.grad(y, [x, *net.parameters()], dy)] for net in (layer, twin) for y in [net(x)]]
    assert_close(*results, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("together", [True, False])
@kinds
@one_or_two
def test_no_value_is_read_from_the_device(path, kind, forwards, together):
    """Fake tensors have none, and raise where one is asked for. Averages over all batches ask, in torch too."""
    with FakeTensorMode():
        layer = NORMS[kind.split()[0]][1]
        net = nn.Sequential(*(layer(3, forwards=forwards, **KINDS[kind]) for _ in range(2)))
        memories = AllMemories(norm_layers(net)) if together else None
        for n in (4, 2):
            x = torch.randn(n, 3, 2, 2, requires_grad=True)
            net(x).sum().backward()
            if forwards == 2 and together:
                with torch.no_grad(), phase(norm_layers(net), "second"):
                    net(x)
            if together:
                memories.enter()
            elif forwards == 2:
                second_forward(net, x)
        if kind.startswith("mbn"):
            set_lambda(net, 0.5)
        net.eval()(x)
        with pytest.raises(RuntimeError, match=r"local_scalar_dense|item"):
            net(x).sum().item()


@pytest.mark.parametrize("lam", [0.0, 0.9])
def test_a_square_that_overflows_gives_what_it_gives_in_torch(path, lam):
    """Values of 1e20 have a variance of inf, and y = beta; without a memory too."""
    layer = make("mbn paper", dims=2, dtype=torch.float32)
    for _ in range(2):
        set_lambda(layer, lam)
        x = (inputs(8, 3, dtype=torch.float32) * 1e20).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert_close(y, layer.bias.expand(8, 3), check_stride=False)
        assert x.grad.isfinite().all()
        assert layer.weight.grad.isfinite().all()
        remember(layer, inputs(8, 3, dtype=torch.float32))


# One value a channel.


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "trained") for kind in KINDS if kind != "mbn paper"),
        ("mbn paper", "empty"),
        ("mbn paper", "lambda 0"),
        ("mbn paper", "forgotten"),
    ],
)
@one_or_two
def test_one_value_a_channel_is_refused_where_its_gradient_would_be_zero(path, kind, how, shape, forwards):
    """In torch's words."""
    layer = (make if how == "empty" else trained)(kind, dims=3, forwards=forwards)
    if how == "lambda 0":
        set_lambda(layer, 0)
    if how == "forgotten":
        layer.forget()
    before = snapshot(layer)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        layer(torch.randn(shape).double())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as torchs:
        nn.BatchNorm1d(3)(torch.randn(shape))
    assert str(ours.value) == str(torchs.value)
    assert unchanged(before, layer)
    assert layer.eval()(torch.randn(shape).double()).shape == shape


def test_the_shape_of_one_image_is_named_as_it_came():
    with pytest.raises(ValueError, match=r"got input size torch\.Size\(\[1, 3, 1, 1\]\)"):
        make("mbn batch", dims=4)(torch.randn(1, 3, 1, 1).double())


@pytest.mark.parametrize("brought", [True, False])
@one_or_two
def test_one_value_a_channel_is_meaningful_beside_a_memory(path, forwards, brought):
    layer = trained("mbn paper", dims=2, forwards=forwards)
    if brought:  # by a BatchNorm, as so many batches of one value
        state = {"weight": layer.weight, "bias": layer.bias, "running_mean": torch.randn(3)}
        layer.load_state_dict(state | {"running_var": torch.rand(3) + 0.5, "num_batches_tracked": torch.tensor(9)})
    m, v, w, x = *layer.test_statistics(), layer.memory_weight.clone(), torch.randn(1, 3).double().requires_grad_()
    m, v = m.clone(), v.clone()
    w = 10 if brought else w
    rho = 1 / (1 + layer.lam * w)
    mu, s2 = m + rho * (x - m), (1 - rho) * v + rho * (1 - rho) * (x - m).square()
    expected = (x - mu) / (s2 + layer.eps).sqrt() * layer.weight + layer.bias
    y = remember(layer, x)
    assert_close(y, expected, atol=1e-10, rtol=1e-10, check_stride=False)
    if forwards == 1:
        results = [torch.autograd.grad(each.pow(3).sum(), [x])[0] for each in (y, expected)]
        assert_close(*results, atol=1e-10, rtol=1e-10)
        assert results[0].abs().min() > 1e-6
    assert layer.memory_count[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_refuses_one_value_a_channel_by_the_shape_alone(kind):
    torch._dynamo.reset()
    layer = trained(kind, dims=2)
    before = snapshot(layer)
    with pytest.raises(Exception, match=r"Expected more than 1 value per channel|Observed exception"):  # of torch 2.6
        torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(1, 3).double())
    assert unchanged(before, layer)


# Empty batches.


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 3, 5, 2), torch.float64), ((4, 3, 0, 5), torch.float32), ((0, 3, 1, 1), torch.float16)],
    ids=str,
)
@kinds
@one_or_two
def test_an_empty_batch_does_what_it_does_in_torch(path, kind, shape, dtype, forwards):
    wide = torch.promote_types(dtype, torch.float32)
    layer, torchs = trained(kind, dtype=wide, forwards=forwards), nn.BatchNorm2d(3).to(wide)
    x = torch.randn(shape).to(dtype).requires_grad_()
    before = snapshot(layer)
    tracked = getattr(layer, "num_batches_tracked", torch.tensor(0)).clone()
    results = []
    for net in (layer, torchs):
        y = net(x)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.sum(), [x, *net.parameters()])])
    assert_close(*results, atol=0, rtol=0)
    if forwards == 2:
        second_forward(layer, x)
    after = layer.state_dict()
    if kind == "bn":
        assert after.pop("num_batches_tracked") == tracked + 1
        assert torchs.num_batches_tracked == 1
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert layer.eval()(x).shape == shape


# Statistics that lost their precision.


@kinds
@one_or_two
def test_with_half_precision_as_the_default_statistics_are_in_float32(kind, forwards):
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        (layer,) = norm_layers(convert(nn.BatchNorm2d(3), kind.split()[0], forwards=forwards))
        for made in (layer, type(layer)(3, forwards=forwards), make(kind, dtype=torch.float16, forwards=forwards)):
            assert made.weight.dtype == torch.float16
            assert {getattr(made, name).dtype for name in made.statistics} == {torch.float32}
            x = (torch.randn(64, 3, 40, 40) + 5).half().requires_grad_()  # 102,400 values, above float16's largest
            y = made(x)
            y.sum().backward()
            if forwards == 2:
                second_forward(made, x)
            assert y.dtype == x.grad.dtype == torch.float16
            assert all(b.isfinite().all() for b in made.buffers())
            assert made.eval()(x).isfinite().all()
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
@kinds
def test_statistics_that_were_cast_behind_the_layers_back_are_refused_in_one_sentence(kind, narrow):
    """As FSDP's buffer_dtype does."""
    layer, x = trained(kind, dtype=torch.float32), inputs(4, 3, 2, 2, dtype=torch.float32)
    for buffer in layer.buffers():
        buffer.data = buffer.data.to(narrow)
    for mode in (True, False):
        with pytest.raises(
            RuntimeError, match=r"needs its statistics in float32.*buffer_dtype=torch\.float32"
        ) as caught:
            layer.train(mode)(x)
        assert str(caught.value).count(". ") == 0
    layer.float()  # back to a width that works
    assert remember(layer.train(), x).isfinite().all()
