"""On which device, with how many threads and in which mode a run is executed."""

import gc
import inspect
import os
import weakref

import pytest
import torch
from running import TINY, Run, assert_same_run, run_here
from test_iteration import batch, prepare, state

import models
from mbn import config, network_layers
from mbn.network_layers import from_config
from mbn.system.errors import UserError
from mbn.system.processes import Processes
from mbn.training import execution, iteration
from mbn.training.execution import choose_device, choose_mode, choose_threads, operations, set_arithmetic

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILER_FAULT = execution.compiler_fault


@pytest.fixture(autouse=True)
def faults(monkeypatch):
    """A function that sets the reasons why nothing can be compiled, or captured. At first both are None."""

    def put(compiler=None, graph=None):
        monkeypatch.setattr(execution, "compiler_fault", lambda device: compiler)
        monkeypatch.setattr(execution.cuda_graph, "fault", lambda device: graph)

    put()
    return put


def chosen(overrides, wanted="auto", earlier=None, threads=2, device=CPU, left=1.0):
    run = config.load(overrides.split())
    model = models.build(layers=from_config(run), **config.network(run))
    return choose_mode(wanted, earlier, run, model, device, threads, left=left)


QUICK, LONG = "experiment=quickstart", "model=resnet20"


@pytest.mark.parametrize(
    ("overrides", "settings", "mode"),
    [
        # Long runs are compiled; the same run is shorter on more threads.
        (QUICK, {}, "eager"),
        (f"{LONG} schedule.epochs=1", {}, "eager"),
        (f"{LONG} schedule.epochs=200", {}, "compile"),
        (f"{LONG} batch_size=8 schedule.iterations=78200", {}, "compile"),
        (f"{LONG} schedule.epochs=3", {"threads": 1}, "compile"),
        (f"{LONG} schedule.epochs=3", {"threads": 16}, "eager"),
        # As the run began, or as asked for.
        (QUICK, {"earlier": "compile"}, "compile"),
        (LONG, {"earlier": "eager"}, "eager"),
        (QUICK, {"wanted": "compile", "earlier": "eager"}, "compile"),
        (LONG, {"wanted": "eager", "earlier": "compile"}, "eager"),
        # On CUDA a graph, compiled where that pays.
        (f"{LONG} norm=mbn", {"device": CUDA}, "graph"),
        (f"{LONG} norm=bn", {"device": CUDA}, "graph"),
        (f"{LONG} schedule.iterations=29999", {"device": CUDA}, "graph-eager"),
        (QUICK, {"device": CUDA}, "graph-eager"),
        (QUICK, {"device": CUDA, "wanted": "graph"}, "graph"),
        (LONG, {"device": CUDA, "wanted": "eager"}, "eager"),
        (LONG, {"device": CUDA, "earlier": "eager"}, "eager"),
        # What is left counts where a run goes on on another kind of device.
        (f"{LONG} norm=mbn", {"device": CUDA, "left": 0.1}, "graph-eager"),
        (f"{LONG} norm=mbn", {"device": CUDA, "left": 0.1, "earlier": "graph"}, "graph"),
        (f"{LONG} schedule.epochs=200", {"left": 0.01}, "eager"),
        # A run that began as a graph goes on without one elsewhere.
        (QUICK, {"earlier": "graph"}, "eager"),
        (QUICK, {"device": CUDA, "earlier": "graph"}, "graph"),
    ],
)
def test_the_mode_follows_from_the_run_the_device_and_what_is_asked_for(overrides, settings, mode):
    assert chosen(overrides, **settings) == mode


@pytest.mark.parametrize(
    ("device", "why", "mode", "warning"),
    [
        (CPU, {"compiler": "no g++"}, "eager", "torch.compile does not work here (no g++): training in eager mode"),
        (CUDA, {"compiler": "no g++"}, "graph-eager", "torch.compile does not work here (no g++): capturing without"),
        (CUDA, {"graph": "an old driver"}, "eager", "iterations cannot be captured here (an old driver): training in"),
    ],
)
def test_where_nothing_can_be_compiled_or_captured_auto_warns_once(faults, capsys, device, why, mode, warning):
    faults(**why)
    assert chosen(LONG, device=device) == mode
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {warning}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("compile", r"no g\+\+.*machine\.mode=auto"),
        ("graph", r"machine\.mode=graph needs a CUDA device, not cpu"),
        ("graph-eager", r"machine\.mode=graph-eager needs a CUDA device, not cpu"),
    ],
)
def test_what_is_asked_for_and_cannot_be_done_is_refused(faults, wanted, says):
    faults(compiler="no g++")
    with pytest.raises(UserError, match=says):
        chosen(LONG, wanted=wanted)


def test_choices_are_made_once(monkeypatch):
    assert choose_threads(None, 3) == 3
    assert choose_threads(None, None) == min(execution.TORCHS_THREADS, execution.cores())
    monkeypatch.setattr(execution, "cores", lambda: 2)
    monkeypatch.setattr(execution, "TORCHS_THREADS", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as an earlier run of this process has set it
    assert choose_threads(None, None) == 2  # a container may use 2 of 64
    assert choose_device("auto", "cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted, earlier, says in (("cuda", None, "no cuda here"), ("auto", "cuda", "the run began on it")):
        with pytest.raises(UserError, match=says):
            choose_device(wanted, earlier)


def test_a_gpu_of_a_number_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1", None) == torch.device("cuda:1")
    with pytest.raises(UserError, match=r"^there is no cuda:2 here: machine\.device=cuda uses the first GPU, "):
        choose_device("cuda:2", None)


@pytest.mark.parametrize("gpus", [0, 2])
def test_several_processes_need_a_gpu_each_or_a_cpu(monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("cpu", None, Processes(1, 3, 1, 3)) == CPU
    says = ["3 processes need a GPU each, and there are 2 here", "there is no cuda here"][gpus == 0]
    for device, why in (("cuda", says), ("mps", "machine.device=mps is for one process")):
        with pytest.raises(UserError, match=why) as error:
            choose_device(device, None, Processes(1, 3, 1, 3))
        assert error.value.code == 2
    if gpus:
        assert choose_device("auto", None, Processes(1, 2, 1, 2)) == torch.device("cuda", 1)


def test_runs_of_one_kind_share_compiled_code_and_nothing_else(monkeypatch):
    """Runs one after another, or in lanes: only the first of a kind waits for the compiler."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **settings: compiler(f, backend=backend, **settings))
    monkeypatch.setattr(iteration, "_compiled", {})
    kept = []
    for i in range(10):  # torch compiles a code object eight times at most
        torch.manual_seed(i)
        model, _, compiled = prepare(network_layers.mbn(2, 0.1), 2, "compile", batch_size=8)
        torch.manual_seed(i)
        twin, _, eager = prepare(network_layers.mbn(2, 0.1), 2, "eager", batch_size=8)
        for images, labels in (batch(), batch()):
            compiled(images, labels)
            eager(images, labels)
        torch.testing.assert_close(compiled.drain(), eager.drain())
        torch.testing.assert_close(state(model), state(twin))
        kept.append(weakref.ref(model))
        assert len(graphs) == 2  # a first and a second forward
    del model, compiled
    gc.collect()
    assert [alive() for alive in kept] == [None] * 10
    _, _, other = prepare(network_layers.mbn(2, 0.1, memory=3), 2, "compile", batch_size=8)
    other(*batch())
    assert len(graphs) == 4


def test_a_broken_compiler_is_noticed(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: g++ not found\nand more")

    fault = COMPILER_FAULT.__wrapped__  # without its cache
    monkeypatch.setattr(torch, "compile", lambda function: broken)
    assert fault(CPU) == "RuntimeError: InvalidCxxCompiler: g++ not found"


@pytest.mark.parametrize(("network", "millions"), [("resnet20", 40.55), ("vgg16", 313.2)])
def test_operations_are_two_a_multiplication_and_leave_the_model_as_it_was(network, millions):
    """He et al. 2016 and others print these numbers of multiplications."""
    run = config.load([f"model={network}", "norm=mbn"])
    model = models.build(layers=from_config(run), **config.network(run))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert operations(model, 32) == pytest.approx(2e6 * millions, rel=1e-3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_deterministic_gives_the_same_bits_twice_and_neither_it_nor_tf32_is_part_of_the_name(
    capsys, monkeypatch, tmp_path
):
    asked = ["machine.deterministic=true", "machine.tf32=false"]
    for folder in ("one", "other"):
        outcome = run_here(capsys, monkeypatch, *TINY, f"machine.results={tmp_path / folder}", *asked)
        assert outcome.code == 0, outcome.err
        assert torch.are_deterministic_algorithms_enabled()
    one, other = (Run(tmp_path / folder, TINY) for folder in ("one", "other"))
    assert_same_run(one, other)
    assert one.record()["config"]["machine"]["deterministic"] is True
    assert one.record()["config"]["machine"]["tf32"] is False
    run_here(capsys, monkeypatch, *TINY, f"machine.results={tmp_path / 'third'}")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_arithmetic_on_a_gpu(tf32, deterministic, monkeypatch):
    """The settings alone, which need no GPU."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    monkeypatch.setattr(cudnn, "allow_tf32", not tf32)
    monkeypatch.setattr(cudnn, "benchmark", deterministic)
    try:
        set_arithmetic(torch.device("cuda"), tf32, deterministic)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert (cudnn.allow_tf32, cudnn.benchmark) == (tf32, not deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)


def test_the_compiler_does_not_say_that_there_is_no_gpu(caplog):
    from torch.utils import cpp_extension  # imports slowly

    caplog.clear()  # it may have said so when it was imported just now, before the filter
    assert 'logger.warning("No CUDA runtime is found' in inspect.getsource(cpp_extension)
    assert COMPILER_FAULT(CPU) is None
    for text in ("No CUDA runtime is found, using CUDA_HOME='%s'", "no compiler in %s"):
        cpp_extension.logger.warning(text, "/usr/local/cuda")
    assert [r.getMessage() for r in caplog.records if r.name == cpp_extension.__name__] == [
        "no compiler in /usr/local/cuda"
    ]
