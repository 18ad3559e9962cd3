"""Statistics over groups of the images of a batch (group_size): each group is a batch of its own."""

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import (
    follow,
    inputs,
    kinds,
    make,
    one_or_two,
    remember,
    set_changing,
    shapes,
    snapshot,
    trained,
    unchanged,
)
from torch import nn
from torch.testing import assert_close

from mbn import BatchNorm2d, convert, second_forward, set_precise_statistics


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@one_or_two
@kinds
def test_groups_of_half_precision_follow_the_reference(kind, forwards, dtype):
    """More than 65,504 values a channel, which float16 cannot count, in groups and in all."""
    layer = make(kind, dtype=torch.float32, forwards=forwards, group_size=3)
    batches = [inputs(n, 3, *size, at=n, dtype=dtype) for n, size in ((4, (3, 2)), (6, (2, 2)))]
    follow(layer, batches)
    remember(layer, inputs(4, 3, 160, 160, dtype=dtype))
    assert all(value.isfinite().all() for value in snapshot(layer).values())
    if "mbn" in kind:
        assert layer.memory_count[0] == 4 * 160 * 160


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@one_or_two
@kinds
def test_groups_follow_the_reference(path, kind, forwards, dtype):
    """Whole groups, a smaller last one, of one image too, and batches that are smaller than a group."""
    steps = iter(range(10))

    def steer(layer, ref, x):
        t = next(steps)
        ref.lam, ref.r_max, ref.d_max = 0.1 + 0.09 * t, 1 + 0.1 * t, 0.2 * t
        set_changing(layer, ref.lam, ref.r_max, ref.d_max)

    draw = random.Random(1)
    sizes = (6, 3, 7, 2, 5, 8, 1, 4, 9, 6)
    of_image = [draw.choice([(3, 2), (2, 2), (4, 1)]) for _ in sizes]
    batches = [inputs(n, 3, *s, at=4 * draw.random(), dtype=dtype) for n, s in zip(sizes, of_image, strict=True)]
    layer = make(kind, dtype=dtype, forwards=forwards, group_size=3)
    follow(layer, batches, steer, {torch.float64: 1e-9, torch.float32: 2e-5}[dtype], gradients=True)


@shapes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@kinds
def test_groups_of_every_input_shape_and_without_affine(path, kind, affine, dims, shape):
    layer = make(kind, dims=max(dims + 1, len(shape)), affine=affine, forwards=1, group_size=2)
    layer.input_dims = (len(shape),)
    follow(layer, [inputs(size, *shape[1:], at=size) for size in (4, 2, 6)])


def test_averages_over_all_batches_in_groups_are_those_of_torch():
    ours, torchs = BatchNorm2d(3, momentum=None, group_size=4).double(), nn.BatchNorm2d(3, momentum=None).double()
    for t in range(3):
        x = inputs(4, 3, 2, 2, at=t)
        assert_close(ours(x), torchs(x))
        for name, value in torchs.state_dict().items():
            assert_close(ours.state_dict()[name], value)


@one_or_two
@kinds
def test_a_group_as_large_as_the_batch_is_the_batch(path, kind, forwards):
    results = []
    for size in (None, 4, 9):
        torch.manual_seed(0)
        layer = make(kind, forwards=forwards, group_size=size)
        outputs = []
        for t in range(3):
            x = inputs(4, 3, 2, 2, at=t).requires_grad_()
            y = layer(x)
            outputs += [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))]
            if forwards == 2:
                second_forward(layer, x)
        results.append((outputs, snapshot(layer)))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert_close(results[2], results[0], rtol=1e-12, atol=1e-12)


@kinds
def test_the_order_of_images_is_that_of_the_groups(path, kind):
    """What one group holds changes nothing in another."""
    layer, x = trained(kind, forwards=2, group_size=3), inputs(7, 3, 2, 2)
    y = layer(x)
    x[3:6] += torch.randn(3, 3, 2, 2)
    same = (layer(x) == y).flatten(1).all(1)
    assert same.tolist() == [True] * 3 + [False] * 3 + [True]


@kinds
def test_the_layout_is_kept_in_groups(path, kind):
    layer, x = trained(kind, forwards=2, group_size=2), inputs(5, 3, 4, 2)
    dl_dy, results = torch.randn_like(x), []
    for v in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = layer(v.requires_grad_())
        results.append([y, *torch.autograd.grad(y, [v, layer.weight, layer.bias], dl_dy)])
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    for other in results[1:]:
        assert_close(other, results[0], atol=1e-12, rtol=1e-12, check_stride=False)


@kinds
def test_second_derivatives_in_groups_are_those_of_numbers(kind):
    layer, x = trained(kind, forwards=2, group_size=2), inputs(3, 3, 2, 1).requires_grad_()
    if kind in ("brn", "mbn batch"):  # r and d are constants, which numbers do not know
        layer.bounds.copy_(torch.tensor([1.0, 0.0])) if kind == "brn" else set_changing(layer, 0.0, 1, 0)
    assert torch.autograd.gradgradcheck(lambda x, weight: F.gelu(_with(layer, x, weight)), [x, layer.weight])


def _with(layer, x, weight):
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


@kinds
def test_training_statistics_have_a_row_for_each_group(path, kind):
    layer, x = trained(kind, affine=False, forwards=2, group_size=2), inputs(5, 3, 2, 2)
    before = snapshot(layer)
    mu, sigma = layer.training_statistics(x)
    assert mu.shape == sigma.shape == (3, 3)
    assert unchanged(before, layer)
    rows = torch.arange(5) // 2
    expected = (x - mu[rows, :, None, None]) / sigma[rows, :, None, None]
    assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "n"), [(1, 3), (3, 4), (2, 1)])
@kinds
def test_a_group_of_one_value_a_channel_is_refused_by_name(path, kind, size, n):
    layer = make(kind, dims=2, group_size=size)
    with pytest.raises(ValueError, match=rf"more than 1 value .* in a group of the batch \(group_size={size}\)"):
        layer(inputs(n, 3))
    layer = make(kind, group_size=size)
    assert layer(inputs(n, 3, 1, 2)).isfinite().all()


def test_a_memory_makes_groups_of_one_value_meaningful(path):
    follow(make("mbn paper", forwards=1, group_size=1), [inputs(4, 3, 2, 1), inputs(3, 3, 1, 1)])


@kinds
def test_an_empty_batch_is_not_remembered_in_groups(kind):
    layers = [make(kind, forwards=1, group_size=size) for size in (None, 2)]
    for layer in layers:
        layer(torch.zeros(0, 3, 2, 2, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert unchanged(snapshot(layers[0]), layers[1])
    assert layers[1].weight.grad.tolist() == [0, 0, 0]
    assert [each.shape for each in layers[1].training_statistics(torch.zeros(0, 3, 2, 2))] == [(0, 3)] * 2


@kinds
def test_copies_pickles_and_the_representation_keep_the_groups(kind):
    layer = make(kind, group_size=2)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.group_size == 2
        assert "group_size=2" in repr(other)
    del layer.__dict__["group_size"]  # a pickle from before there were groups
    assert copy.deepcopy(layer).group_size is None


def test_converted_layers_are_refused_another_group_size():
    net = convert(nn.Sequential(nn.BatchNorm2d(3)), group_size=2)
    assert convert(net, group_size=2) is net
    with pytest.raises(ValueError, match="with group_size=2 and not 4"):
        convert(net, group_size=4)


@kinds
def test_precise_statistics_are_those_of_all_values(kind):
    """Of a layer alone: those of the images themselves, however they are cut."""
    batches = [inputs(5, 3, 2, 2, at=t) for t in range(3)]
    layers = [make(kind, forwards=2, group_size=size) for size in (None, 2)]
    for layer in layers:
        set_precise_statistics(layer, batches)
    assert_close(layers[1].test_statistics(), layers[0].test_statistics(), rtol=1e-12, atol=1e-12)


@kinds
def test_groups_compile_into_one_graph(kind):
    """With a last group that is smaller; the forward overwrites what the backward pass needs."""
    eager = nn.Sequential(*(make(kind, forwards=1, group_size=3) for _ in range(2)))
    net = copy.deepcopy(eager)
    torch._dynamo.reset()
    function, results = torch.compile(net, backend="aot_eager", fullgraph=True), []
    for call, model in ((eager, eager), (function, net)):
        torch.manual_seed(0)
        result = []
        for t in range(3):
            x = inputs(7, 3, 2, 2, at=t).requires_grad_()
            y = call(x)
            result += [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], torch.randn_like(y))]
        results.append([*result, *model.buffers()])
    assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
