"""Captured iterations equal eager ones to the bit, with a stand-in for CUDA graphs on the CPU."""

import contextlib
import copy
import gc
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import pytest
import torch
from fake_cuda_graph import capture
from layer_kinds import set_changing
from test_iteration import METHODS, batch, prepare, state
from torch.utils._python_dispatch import TorchDispatchMode

from mbn.measure.evaluation import evaluate
from mbn.network_layers import bn, brn, gn, mbn, normprop
from mbn.norm import memorized
from mbn.norm.base import norm_layers
from mbn.norm.memories import enter_noted
from mbn.norm.renorm import _BatchRenorm, set_renorm
from mbn.norm.second_forward import second_forward
from mbn.system import cuda_graph
from mbn.training.iteration import Update

ITERATIONS = 40
ALL = METHODS | {"gn": (gn(1, groups=2, channels=1), 1), "normprop": (normprop(1), 1)}


def batches(dtype, sizes=(8, 3)):
    """Batches; every seventh is smaller, as an epoch's last one is."""
    return [batch(sizes[0] if t % 7 != 5 else sizes[1], dtype) for t in range(ITERATIONS)]


def train(layers, forwards, mode, dtype, given):
    """Train a network on batches. The learning rate, lambda and bounds change after each third of them."""
    torch.manual_seed(0)
    model, lr, update = prepare(layers, forwards, mode, dtype, batch_size=8)
    for t, (images, labels) in enumerate(given):
        phase = 3 * t // len(given)
        lr.fill_([0.05, 0.02, 0.01][phase])
        set_changing(model, [0.1, 0.5, 0.9][phase], [1.0, 2.0, 3.0][phase] + t / 100, [0.0, 0.5, 5.0][phase])
        update(images, labels)
    return update, (state(model), update.optimizer.state_dict()["state"], update.drain(), update.watch.norms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", ALL)
def test_captured_iterations_are_eager_ones_to_the_bit(method, dtype, graphs):
    layers, forwards = ALL[method]
    given = batches(dtype)
    _, eager = train(layers, forwards, "eager", dtype, given)
    assert not graphs
    _, replayed = train(layers, forwards, "graph-eager", dtype, given)
    assert len(graphs) == 2  # one for each size of batch
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


# A value from the host is fixed at capture: the stand-in must show that, as a GPU would.


def plant(monkeypatch, fault):
    """Use a value from the host where a tensor should be."""
    if fault == "learning rate":
        original = Update._iterate

        def iterate(self, images, labels):
            kept = self.optimizer.param_groups[0]["lr"]
            self.optimizer.param_groups[0]["lr"] = float(kept)
            original(self, images, labels)
            self.optimizer.param_groups[0]["lr"] = kept

        monkeypatch.setattr(Update, "_iterate", iterate)
    elif fault == "lambda":
        original = memorized.memorized_batch_norm

        def normalise(x, m, v, W, *rest):
            return original(x, m, v, torch.full_like(W, W.item()), *rest)

        monkeypatch.setattr(memorized, "memorized_batch_norm", normalise)
    elif fault == "labels":
        original = Update._first
        monkeypatch.setattr(
            Update, "_first", lambda self, images, labels: original(self, images, torch.tensor(labels.tolist()))
        )
    elif fault == "bounds":
        original = _BatchRenorm._correction

        def correction(self, mu, *rest):
            kept, self.bounds = self.bounds, torch.tensor([self.r_max, self.d_max], dtype=mu.dtype)
            r_and_d = original(self, mu, *rest)
            self.bounds = kept
            return r_and_d

        monkeypatch.setattr(_BatchRenorm, "_correction", correction)


@pytest.mark.parametrize("fault", ["none", "learning rate", "lambda", "labels", "bounds"])
def test_a_value_taken_from_the_host_is_noticed(fault, monkeypatch, graphs):
    plant(monkeypatch, fault)
    given = batches(torch.float64)
    layers = brn(2) if fault == "bounds" else mbn(2, 0.1, memory=3)
    _, eager = train(layers, 2, "eager", torch.float64, given)
    _, replayed = train(layers, 2, "graph-eager", torch.float64, given)
    equal = all(torch.equal(eager[0][key], replayed[0][key]) for key in eager[0])
    assert equal == (fault == "none")


# The order of things.


def test_the_first_three_iterations_of_a_batch_size_train_without_a_graph(graphs):
    model, _, update = prepare(mbn(2, 0.1), 2, "graph-eager")
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    weights = []
    for t in range(6):
        update(*batch())
        weights.append(model.conv1.weight.detach().clone())
        assert len(graphs) == (t >= 3)
    assert len(runs) == 2 * (3 + 1)  # three without capturing, and one to capture
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    update(*batch(3))
    assert len(runs) == 2 * 5
    assert len(graphs) == 1


def test_a_batch_that_is_changed_after_the_call_does_not_matter(graphs):
    """The iteration works on its own copy, so that the images may lie anywhere."""
    results = []
    for spoil in (False, True):
        torch.manual_seed(0)
        model, _, update = prepare(bn(1), 1, "graph-eager")
        for _ in range(6):
            images, labels = batch()
            update(images, labels)
            if spoil:
                images.zero_()
        results.append(state(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_what_cannot_be_captured_goes_on_in_eager_mode_with_one_warning(monkeypatch, capsys, graphs):
    """Capturing fails in the middle of an iteration: nothing of it may stay."""
    given = batches(torch.float64)
    _, eager = train(mbn(2, 0.1, memory=3), 2, "eager", torch.float64, given)

    def fails(function):
        def half():
            with monkeypatch.context() as patch:
                patch.setattr(torch.optim.SGD, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("no\nnot here")))
                function()

        return capture(half)

    monkeypatch.setattr(cuda_graph, "capture", fails)
    update, replayed = train(mbn(2, 0.1, memory=3), 2, "graph-eager", torch.float64, given)
    assert update.mode == "eager"
    assert capsys.readouterr().err == (
        "warning: iterations cannot be captured here (RuntimeError: no): training in eager mode.\n"
    )
    torch.testing.assert_close(replayed, eager, rtol=0, atol=0)


def test_whether_anything_can_be_captured_is_tried_on_a_small_function(monkeypatch, graphs):
    cpu, fault = torch.device("cpu"), cuda_graph.fault.__wrapped__
    assert fault(cpu) is None

    def does_it_at_once(function):
        function()
        return function

    def cannot(function):
        raise RuntimeError("an old driver\nand more")

    monkeypatch.setattr(cuda_graph, "capture", does_it_at_once)
    assert fault(cpu) is not None
    monkeypatch.setattr(cuda_graph, "capture", cannot)
    assert fault(cpu) == "RuntimeError: an old driver"


# All layers together.


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("norm", ["paper", "batch", "brn"])
def test_entering_all_memories_at_once_gives_the_same_bits_as_layer_by_layer(forwards, dtype, norm):
    """With entries of different sizes, and until after the memory is full; from shared tensors, and as second_forward.

    Widths are as in networks: with fewer channels than a CPU vector holds, the sum has another order.
    """
    results = []
    given = batches(dtype)
    for way in ("shared tensors", "joined", "each"):
        torch.manual_seed(0)
        layers = brn(forwards) if norm == "brn" else mbn(forwards, 0.3, memory=5, decay=0.8, gradient=norm)
        model, _, update = prepare(layers, forwards, dtype=dtype, widths=(64, 32))
        if norm == "brn":
            set_renorm(model, 1.2, 0.3)
        if way != "shared tensors":
            own_memories(model)
            update.memories.enter = partial(enter_noted if way == "joined" else enter_each, norm_layers(model))
        for images, labels in given:
            update(images, labels)
        results.append((state(model), update.drain()))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def own_memories(model):
    """Take the layers' memories out of the shared tensors again; forwards still only note their batch."""
    for layer in norm_layers(model):
        for name in layer.statistics:
            setattr(layer, name, getattr(layer, name).clone())


def enter_each(layers):
    for layer in layers:
        ((mu, s2, n),) = layer.noted
        layer.noted = ()
        layer.enter(mu, s2, n)


def test_the_state_dict_and_a_copy_are_those_of_layers_on_their_own():
    model, _, update = prepare(mbn(2, 0.3, memory=3), 2)
    before = {key: (value.shape, value.dtype) for key, value in state(model).items()}
    update(*batch())
    model.load_state_dict(state(model))
    update(*batch())
    assert {key: (value.shape, value.dtype) for key, value in model.state_dict().items()} == before
    copied = copy.deepcopy(model)
    assert not any(layer.deferred for layer in norm_layers(copied))
    kept = state(model)
    second_forward(copied, batch()[0])
    assert all((layer.memory_count > 0).all() for layer in norm_layers(copied))
    torch.testing.assert_close(state(model), kept, rtol=0, atol=0)


def test_a_layer_that_was_moved_or_has_not_run_is_an_error():
    model, _, update = prepare(mbn(2, 0.3, memory=3), 2)
    with pytest.raises(RuntimeError, match="did not run"):
        update.memories.enter()
    model.float()
    with pytest.raises(RuntimeError, match="moved or cast"):
        update.memories.enter()


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("norm", "most"), [("mbn", 39), ("brn", 28)])
def test_the_operations_that_enter_a_batch_into_all_memories_do_not_grow_with_the_layers(norm, most):
    """On a GPU these are launches."""
    for memory in (3, 20):
        model, _, update = prepare(mbn(2, 0.1, memory=memory) if norm == "mbn" else brn(2), 2)
        layers = norm_layers(model)
        update(*batch())
        for _ in range(2):  # the first time numbers of values are brought to the device
            for layer in layers:
                layer.noted = ((torch.ones(layer.num_features), torch.ones(layer.num_features), 4),)
            with Count() as count:
                update.memories.enter()
        assert count.calls <= most


def test_the_shared_thread_works_in_the_modes_of_the_thread_that_asks(graphs):
    def modes():
        return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def found():
        threads.append(threading.current_thread().name)
        return modes()

    def fail():
        raise KeyError("of the work")

    threads, device = [], torch.device("cpu")
    with cuda_graph.shared_thread():
        for gradients, casts in itertools.product((True, False), repeat=2):
            with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=casts):
                assert cuda_graph.uncaptured(found, device) == modes() == (gradients, casts, torch.bfloat16)
        with pytest.raises(KeyError, match="of the work"):
            cuda_graph.uncaptured(fail, device)
    assert set(threads) == {"uncaptured_0"}
    cuda_graph.uncaptured(found, device)
    assert threads[-1] == threading.current_thread().name


def test_the_shared_thread_casts_weights_anew_after_they_have_changed(graphs):
    """An autocast around the work's own, even one that casts nothing, keeps the cast weights of the work's first."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)

    def twice():
        with torch.autocast("cpu", torch.bfloat16):
            before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        with torch.autocast("cpu", torch.bfloat16):
            return (layer(x) - before).float()

    with cuda_graph.shared_thread():
        change = cuda_graph.uncaptured(twice, torch.device("cpu"))
    torch.testing.assert_close(change, torch.full((2, 4), 4.0), rtol=0, atol=0.1)


@pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="this torch has no cuDNN")
def test_beside_other_runs_trials_of_algorithms_keep_memory_and_tests_try_none(monkeypatch):
    def found():
        return torch.backends.cudnn.benchmark, torch._C._cuda_get_conv_benchmark_empty_cache()

    during = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with cuda_graph.without_trials():
        assert found() == (True, True)
    with cuda_graph.shared_thread():
        assert found() == (True, False)
        with cuda_graph.without_trials():
            assert found() == (False, False)
        evaluate(lambda x: (during.append(found()), x)[1], [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))])
        assert during == [(False, False)]
        assert found() == (True, False)
    assert found() == (True, True)


def test_where_nothing_can_be_captured_other_threads_do_not_wait():
    began = threading.Barrier(2, timeout=200)
    work = partial(cuda_graph.uncaptured, began.wait, torch.device("cpu"))
    with cuda_graph.shared_thread(), ThreadPoolExecutor(2) as pool:
        assert sorted(future.result() for future in [pool.submit(work), pool.submit(work)]) == [0, 1]


class NotedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    calls: ClassVar[list[str]] = []

    def capture_begin(self, capture_error_mode):
        self.calls.append(f"begin {capture_error_mode}")

    def capture_end(self):
        self.calls.append("end")
        if self.calls[-2] != "work":
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self):
        self.calls.append("replay")


@pytest.mark.parametrize(
    ("beside_others", "free", "tidies"), [(False, 9, True), (True, 9, False), (True, 4, True)], ids=str
)
def test_memory_is_given_back_before_a_capture_unless_that_makes_other_runs_wait(
    monkeypatch, beside_others, free, tidies
):
    calls = NotedGraph.calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", NotedGraph)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("tidy"))
    with cuda_graph.shared_thread() if beside_others else contextlib.nullcontext():
        replay = cuda_graph.capture(lambda: calls.append("work"))
        replay()
        assert calls == ["tidy"] * tidies + ["begin thread_local", "work", "end", "replay"]
        del calls[:]
        with pytest.raises(ZeroDivisionError):  # and not what ending it raises then
            cuda_graph.capture(lambda: 1 / 0)
    assert calls[-1] == "end"  # else the stream would go on capturing
    assert gc.isenabled()
