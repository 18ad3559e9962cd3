"""Several processes whose batches are normalised as one (sync=True): equal to one process on the joint batch."""

import copy
import functools
import inspect
import itertools
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from layer_kinds import (
    SHAPES,
    inputs,
    kinds,
    make,
    network,
    one_or_two,
    remember,
    set_changing,
    snapshot,
    trained,
    unchanged,
)
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

import mbn.norm.base as base
import mbn.norm.functional as functional
from mbn import MemorizedBatchNorm2d, convert, second_forward, set_precise_statistics
from mbn.norm.base import norm_layers
from mbn.norm.memories import AllMemories
from mbn.norm.second_forward import phase

# How many images of each batch the processes get, in turn.
TWO = ((4, 4), (3, 5), (1, 7), (0, 8))
THREE = ((3, 4, 1), (0, 1, 7), (2, 3, 3), (0, 8, 0))
# The same in whole groups of 3, the last one of a batch of 2.
IN_GROUPS = ((3, 5, 0), (6, 0, 2), (0, 8, 0))
ITERATIONS = 12
KEEPS_BUFFERS = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


def alone():
    return not dist.is_initialized()


def mine(sizes):
    """The part of a batch that is this process's, of so many images for each; all of it in the tests' own process."""
    if alone():
        return slice(None)
    ends = list(itertools.accumulate(sizes, initial=0))
    return slice(*ends[dist.get_rank() :][:2])


def add_up(tensors):
    """Sum over all processes, in place."""
    if not alone():
        for tensor in tensors:
            dist.all_reduce(tensor)


def train(kind, forwards, sizes, dtype=torch.float64, wrap=None, together=False, iterations=ITERATIONS, **settings):
    """Train a network on this process's part of every batch; its outputs, and its state in the end.

    wrap: settings of DistributedDataParallel, which then adds up the gradients. together: the layers' memories are
    entered at once, as the trainer does.
    """
    torch.manual_seed(1)
    model = net = network(kind, forwards=forwards, sync=None if alone() else True, **settings).to(dtype)
    if wrap is not None and not alone():
        model = DistributedDataParallel(net, **wrap)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    memories = AllMemories(list(norm_layers(net))) if together else None
    outputs = []
    for t in range(iterations):
        set_changing(net, 0.1 + 0.8 * t / iterations, 1 + t / iterations, 2 * t / iterations)
        part = mine(sizes[t % len(sizes)])
        x, labels = inputs(8, 3, 5, 5, at=t % 4, dtype=dtype)[part], torch.randint(3, (8,))[part]
        y = model(x)
        # DistributedDataParallel takes the mean over processes.
        loss = F.cross_entropy(y, labels, reduction="sum") / 8 * (dist.get_world_size() if model is not net else 1)
        optimizer.zero_grad()
        loss.backward()
        if model is net:
            add_up(p.grad for p in net.parameters())
        optimizer.step()
        outputs.append(y.detach())
        if memories is None and forwards == 2:
            outputs.append(second_forward(model, x))
        elif forwards == 2:
            with torch.no_grad(), phase(memories.layers, "second"):
                outputs.append(model(x))
        if memories is not None:
            memories.enter()
    return outputs, snapshot(net)


train_alone = functools.cache(train)


def equal(got, expected, tolerance):
    """Within a tolerance that is relative to the largest number."""
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def assert_as_one(results, expected, tolerance=1e-12):
    """What each process has computed is what one has on the joint batch."""
    expected_outputs, expected_state = expected
    for *parts, whole in zip(*(outputs for outputs, _ in results), expected_outputs, strict=True):
        equal(torch.cat(parts), whole, tolerance)
    for _, state in results:
        assert state.keys() == expected_state.keys()
        for name, value in state.items():
            equal(value, expected_state[name], tolerance)


@one_or_two
@kinds
def test_two_processes_train_as_one(processes, kind, forwards):
    assert_as_one(processes.run(2, train, kind, forwards, TWO), train_alone(kind, forwards, TWO))


def test_three_processes_train_as_one(processes):
    assert_as_one(processes.run(3, train, "mbn paper", 2, THREE), train_alone("mbn paper", 2, THREE))


@kinds
def test_in_float32_they_differ_by_rounding(processes, kind):
    f32 = torch.float32
    assert_as_one(processes.run(2, train, kind, 2, TWO, f32), train_alone(kind, 2, TWO, f32), 3e-5)


@pytest.mark.parametrize("kind", ["bn", "mbn paper"])
def test_distributed_data_parallel_trains_as_one_process(processes, kind):
    """With its default flags, and without a warning: buffers that are broadcast are the same everywhere."""
    results = processes.run(2, train, kind, 2, TWO, wrap={})
    assert_as_one(results, train_alone(kind, 2, TWO))


@one_or_two
@kinds
def test_memories_that_are_entered_at_once_are_the_same(processes, kind, forwards):
    results = processes.run(2, train, kind, forwards, TWO, together=True, iterations=8)
    assert_as_one(results, train_alone(kind, forwards, TWO, iterations=8))


@pytest.mark.parametrize("together", [False, True], ids=["each", "at once"])
@one_or_two
@kinds
def test_groups_of_images_lie_within_processes_and_all_are_remembered(processes, kind, forwards, together):
    settings = {"iterations": 6, "group_size": 3}
    results = processes.run(3, train, kind, forwards, IN_GROUPS, together=together, **settings)
    assert_as_one(results, train_alone(kind, forwards, IN_GROUPS, **settings), 1e-11)


# One layer at a time.


def step(layer, sizes, x, twice=False):
    """y, its gradients and training_statistics for this process's part of x; the state after x is remembered."""
    torch.manual_seed(2)
    layer = copy.deepcopy(layer)
    layer.sync = not alone()
    part = mine(sizes)
    x, dl_dy = x[part].requires_grad_(), torch.randn(x.shape, dtype=torch.float64).to(x.dtype)[part]
    statistics = layer.training_statistics(x.detach())
    y = layer(x)
    dx, *affine = torch.autograd.grad(y, [x, *layer.parameters()], dl_dy)
    add_up(affine)
    if layer.forwards == 2:
        second_forward(nn.Sequential(layer, nn.ReLU(), layer) if twice else layer, x.detach())
    return [y.detach(), dx], [*statistics, *affine, *layer.state_dict().values()]


def assert_same_step(processes, sizes, layer, x, tolerance=1e-12, **settings):
    results = processes.run(len(sizes), step, layer, sizes, x, **settings)
    parts, common = step(layer, sizes, x, **settings)
    for *each, whole in zip(*(parts for parts, _ in results), parts, strict=True):
        assert whole.dtype == each[0].dtype
        equal(torch.cat(each), whole, tolerance)
    for _, got in results:
        for value, expected in zip(got, common, strict=True):
            equal(value, expected, min(tolerance, 1e-5))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@kinds
def test_each_layer_takes_the_joint_statistics(processes, kind, shape):
    assert_same_step(processes, (0, 1, 3), trained(kind, len(shape), forwards=1), inputs(*shape, at=2))


@kinds
def test_moments_are_pooled_without_sums_of_squares(processes, kind):
    """Which would lose twelve digits here, and the mean loses six."""
    assert_same_step(processes, (3, 5), make(kind, forwards=1), inputs(8, 3, 2, 2) + 1e6, 1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@kinds
def test_in_half_precision_they_differ_by_rounding(processes, kind, dtype, tolerance):
    layer = trained(kind, dtype=torch.float32, forwards=2)
    assert_same_step(processes, (3, 5), layer, inputs(8, 3, 2, 2, dtype=dtype), tolerance)


@kinds
def test_a_layer_without_gamma_and_beta(processes, kind):
    assert_same_step(processes, (3, 5), trained(kind, affine=False), inputs(8, 3, 2, 2))


@kinds
def test_a_layer_that_is_called_twice_pools_its_joint_batches(processes, kind):
    assert_same_step(processes, (3, 5), trained(kind, forwards=2), inputs(8, 3, 2, 2), twice=True)


@pytest.mark.parametrize("forwards", [1, 2])
def test_the_statistics_of_a_pretrained_network_count_in_joint_batches(processes, forwards):
    layer = make("mbn paper", forwards=forwards)
    old = nn.BatchNorm2d(3).double()
    old(inputs(8, 3, 2, 2, at=1))
    layer.load_state_dict(old.state_dict(), strict=False)
    assert_same_step(processes, (3, 5), layer, inputs(8, 3, 2, 2))


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("kind", ["brn", "mbn paper", "mbn batch"])
def test_a_batch_that_is_not_finite_in_one_process_is_remembered_by_none(processes, kind, forwards):
    results = processes.run(2, overflow, kind, forwards)
    assert results == 2 * [True]


def overflow(kind, forwards):
    layer = trained(kind, forwards=forwards, sync=True)
    before, x = snapshot(layer), inputs(4, 3, 2, 2)
    if dist.get_rank() == 0:
        x[0, 0, 0, 0] = torch.inf
    remember(layer, x)
    return unchanged(before, layer)


# Few values.


@kinds
def test_one_value_in_the_joint_batch_is_refused_by_every_process(processes, kind):
    assert processes.run(3, one_value, kind) == 3 * [True]


def one_value(kind):
    """It goes on with one value in each."""
    layer = make(kind, dims=2, forwards=1, sync=True)
    for sizes in ((1, 0, 0), (0, 1, 0)):
        before = snapshot(layer)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            layer(inputs(3, 3)[:1][mine(sizes)])
        assert unchanged(before, layer)
    layer(inputs(3, 3)[mine((1, 1, 1))])
    return not unchanged(before, layer)


def test_a_memory_makes_one_value_in_the_joint_batch_meaningful(processes):
    assert_same_step(processes, (0, 1), trained("mbn paper", dims=2), inputs(1, 3))


@kinds
def test_precise_statistics_are_those_of_all_processes(processes, kind):
    for statistics in processes.run(2, precise, kind):
        equal(statistics, precise(kind), 1e-12)


def precise(kind):
    torch.manual_seed(1)
    net = nn.Sequential(*(make(kind, sync=None if alone() else True) for _ in range(2)))
    some, *others = [inputs(8, 3, 2, 2, at=t)[mine(sizes)] for t, sizes in enumerate(TWO)]
    none = some[:0]  # in all processes
    set_precise_statistics(net, [none, some, none, *others])
    return torch.stack([t for layer in net for t in layer.test_statistics()])


@one_or_two
@kinds
@pytest.mark.parametrize("group_size", [None, 2])
def test_a_joint_batch_without_a_value_does_what_it_does_in_one_process(processes, kind, forwards, group_size):
    layer = trained(kind, forwards=forwards, group_size=group_size)
    results = processes.run(2, empty, layer)
    assert results == 2 * [empty(layer)]


def empty(layer):
    layer = copy.deepcopy(layer)
    layer.sync = not alone()
    before, x = snapshot(layer), torch.zeros(0, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = remember(layer, x)
    if y.requires_grad:
        y.sum().backward()
    changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
    return y.shape, changed, None if layer.weight.grad is None else layer.weight.grad.tolist()


# Messages.


@kinds
def test_a_forward_sends_one_message_a_layer_and_its_backward_another(processes, kind):
    mean_variance_count, two_sums = [2 * c + 1 for c in (4, 5, 6)], [2 * c for c in (6, 5, 4)]
    expected = [*mean_variance_count, *two_sums], mean_variance_count, [], []
    assert processes.run(2, messages, kind) == 2 * [expected]


def messages(kind, group_size=None):
    """The numbers in each message of a forward and backward, a second forward, evaluation, and without sync."""
    sent = []
    gather, reduce = functional._all_gather, dist.all_reduce
    functional._all_gather = lambda every, own, group: (sent.append(own.numel()), gather(every, own, group=group))
    dist.all_reduce = lambda own, group: (sent.append(own.numel()), reduce(own, group=group))
    try:
        net, other = (network(kind, forwards=2, sync=sync, group_size=group_size) for sync in (True, False))
        x = inputs(4, 3, 5, 5)
        runs = (
            lambda: net(x).sum().backward(),
            lambda: second_forward(net, x),
            lambda: net.eval()(x),
            lambda: other(x).sum().backward(),
        )
        return tuple((sent.clear(), run(), list(sent))[2] for run in runs)
    finally:
        functional._all_gather, dist.all_reduce = gather, reduce


# What is refused.


@kinds
def test_in_groups_only_the_forward_that_remembers_sends_a_message(processes, kind):
    expected = [], [2 * c + 1 for c in (4, 5, 6)], [], []
    assert processes.run(2, messages, kind, 2) == 2 * [expected]


@kinds
def test_second_derivatives_and_torch_func_are_refused(processes, kind):
    for errors in processes.run(2, refused, kind):
        assert "no second derivatives" in errors[0]
        assert all("sync=True does not work under torch.func" in error for error in errors[1:])
        assert len(errors) == 3
        assert not any(". " in error for error in errors)


@forward_ad.dual_level()
def dual(layer, x):
    return layer(x)


def refused(kind):
    layer, errors = make(kind, sync=True, forwards=1), []
    x = inputs(4, 3, 2, 2).requires_grad_()
    for call in (
        lambda: torch.autograd.grad(layer(x).square().sum(), x, create_graph=True),
        lambda: torch.func.grad(lambda x: layer(x).square().sum())(x),
        lambda: dual(layer, x),
    ):
        try:
            call()
        except RuntimeError as error:
            errors.append(str(error))
    return errors


# Groups.


def test_a_group_of_some_processes(processes):
    *pair, outside = processes.run(3, grouped)
    torch.manual_seed(0)
    expected = make("mbn paper", forwards=1)(inputs(8, 3, 2, 2)).detach()
    equal(torch.cat([y for y, _ in pair]), expected, 1e-12)
    equal(torch.cat([again for _, again in pair]), expected, 1e-12)
    assert "this process is not in process_group" in outside


def grouped():
    group = dist.new_group([0, 1])
    layer = convert(nn.BatchNorm2d(3).double(), forwards=1, memory=3, decay=0.8, lam=0.7, process_group=group)
    torch.manual_seed(0)
    x = inputs(8, 3, 2, 2)[mine((3, 5, 0))]
    try:
        copied = copy.deepcopy(layer)
        assert copied.process_group is layer.process_group is group
        return layer(x).detach(), copied(x).detach()
    except RuntimeError as error:
        assert layer.eval()(x).shape == x.shape
        return str(error)


@kinds
def test_in_a_world_of_one_sync_changes_nothing(processes, kind):
    (got,) = processes.run(1, lonely, kind)
    for value, expected in zip(got, lonely(kind), strict=True):
        assert torch.equal(value, expected)


def lonely(kind):
    torch.manual_seed(0)
    layer = make(kind, sync=True, forwards=1)
    return [layer(inputs(4, 3, 2, 2)).detach(), *layer.state_dict().values()]


# Compiled.


@pytest.mark.parametrize(("sizes", "group_size"), [((3, 4), None), ((0, 7), None), ((4, 3), 2)])
def test_a_compiled_network_computes_the_same(processes, sizes, group_size):
    """In one graph, but where a process has no image: there it is asked whether the others have any."""
    for differences in processes.run(2, compiled, sizes, group_size):
        assert max(differences) < 1e-12


def compiled(sizes, group_size):
    """The relative differences of a compiled network's outputs, gradients and memories from an eager one's."""
    warnings.simplefilter("ignore")  # the compiler's own, and what it logs of a graph that it cuts
    torch._logging.set_logs(dynamo=logging.ERROR)
    eager = nn.Sequential(*(make(k, forwards=1, sync=True, group_size=group_size) for k in ("mbn paper", "brn")))
    net = copy.deepcopy(eager)
    function = torch.compile(net, backend="aot_eager", fullgraph=min(sizes) > 0)
    results = []
    for model, call in ((eager, eager), (net, function)):
        torch.manual_seed(0)
        result = []
        for _ in range(2):
            x = inputs(7, 3, 2, 2)[mine(sizes)].requires_grad_()
            y = call(x)
            result += [y, *torch.autograd.grad(y, [x, *model.parameters()], torch.randn_like(y))]
        results.append([*result, *model.buffers()])
    return [float(((a - b).abs().sum() / (b.abs().sum() + 1)).detach()) for a, b in zip(*results, strict=True)]


# Without sync.


@pytest.mark.parametrize("begin", ["forward", "train"])
def test_without_sync_one_warning_names_both_remedies(processes, begin):
    for said, silent in processes.run(2, unsynchronised, begin):
        (text,) = said
        assert "convert(model, sync=True)" in text
        assert "sync=False" in text
        assert "forward_sync_buffers=False" in text
        assert "broadcast_buffers=False" in text
        assert ". " not in text
        assert not silent


def unsynchronised(begin):
    """The warnings of layers with the default, at each of two calls, and of layers with sync=False."""
    texts = []
    for sync in (None, False):
        base.warn_once.cache_clear()
        net = network("mbn paper", sync=sync)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            net.eval()(inputs(4, 3, 5, 5))
            assert not said
            for _ in range(2):
                if begin == "train":
                    net.train()
                else:
                    for layer in net:
                        layer.training = True
                    net(inputs(4, 3, 5, 5))
        texts.append([str(warning.message) for warning in said])
    return texts


def test_buffers_of_distributed_data_parallel(processes):
    """What the warning says: with the default flags the first process's memory is everywhere."""
    first, second = processes.run(2, buffers)
    for same in ("sync", "broadcast"):
        equal(first[same], second[same], 1e-12)
    equal(first["kept"], first["broadcast"], 1e-12)
    assert (first["kept"] - second["kept"]).abs().min() > 0.1
    assert (first["sync"] - first["broadcast"]).abs().min() > 0.1


def buffers():
    settings = {"sync": ({}, True), "broadcast": ({}, False), "kept": (KEEPS_BUFFERS, False)}
    means = {}
    for name, (flags, sync) in settings.items():
        layer = MemorizedBatchNorm2d(3, forwards=1, sync=sync).double()
        model = DistributedDataParallel(layer, **flags)
        for rank_0 in range(2):
            torch.manual_seed(0)
            model(inputs(8, 3, 2, 2, at=rank_0)[4 * dist.get_rank() :][:4] + 5 * dist.get_rank())
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, 2, 2, dtype=torch.float64))  # broadcasts
        means[name] = layer.running_mean.clone()
    return means


def test_torchs_own_conversion_leaves_the_layers_alone():
    net = network("mbn paper")
    before = list(net.modules())
    assert list(nn.SyncBatchNorm.convert_sync_batchnorm(net).modules()) == before
