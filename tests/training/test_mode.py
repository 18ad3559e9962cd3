"""Which runs are compiled, and what happens where nothing can be."""

import gc
import weakref

import pytest
import torch
from running import TINY, Run, assert_same_run, run_here
from test_update import batch, prepare, state

import models
from mbn import config, layers
from mbn.layers import from_config
from mbn.system.errors import UserError
from mbn.training import execution, iteration
from mbn.training.execution import choose_mode, operations

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """A compiler that works, without the seconds of asking it."""
    monkeypatch.setattr(execution, "compiler_fault", lambda device: None)


def chosen(*overrides, wanted="auto", earlier=None, threads=2, device=CPU):
    run = config.load(list(overrides))
    model = models.build(layers=from_config(run), **config.network(run))
    return choose_mode(wanted, earlier, run, model, device, threads)


def test_auto_compiles_long_runs_only():
    assert chosen("experiment=quickstart") == "eager"
    assert chosen("model=resnet20", "schedule.epochs=1") == "eager"
    assert chosen("model=resnet20", "schedule.epochs=200") == "compile"
    assert chosen("model=resnet20", "batch_size=8", "schedule.iterations=78200") == "compile"
    # The same run is shorter on more threads.
    assert chosen("model=resnet20", "schedule.epochs=3", threads=1) == "compile"
    assert chosen("model=resnet20", "schedule.epochs=3", threads=16) == "eager"


def test_auto_keeps_to_what_a_run_began_with():
    assert chosen("experiment=quickstart", earlier="compile") == "compile"
    assert chosen("model=resnet20", earlier="eager") == "eager"


def test_what_is_asked_for_is_done():
    assert chosen("experiment=quickstart", wanted="compile", earlier="eager") == "compile"
    assert chosen("model=resnet20", wanted="eager", earlier="compile") == "eager"


def test_without_a_compiler_auto_warns_once_and_trains_eagerly(monkeypatch, capsys):
    monkeypatch.setattr(execution, "compiler_fault", lambda device: "no g++")
    assert chosen("model=resnet20") == "eager"
    assert capsys.readouterr().err == ("warning: torch.compile does not work here (no g++): training in eager mode.\n")
    with pytest.raises(UserError, match=r"no g\+\+.*machine\.mode=auto"):
        chosen("model=resnet20", wanted="compile")


CUDA = torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch):
    """A GPU on which something can be recorded."""
    monkeypatch.setattr(execution.cuda_graph, "fault", lambda device: None)


def test_auto_on_cuda_is_a_graph_and_compiled_where_that_pays(cuda):
    assert chosen("model=resnet20", "norm=mbn", device=CUDA) == "graph"
    assert chosen("model=resnet20", "norm=bn", device=CUDA) == "graph"
    assert chosen("model=resnet20", "schedule.iterations=29999", device=CUDA) == "graph-eager"
    assert chosen("experiment=quickstart", device=CUDA) == "graph-eager"
    assert chosen("experiment=quickstart", wanted="graph", device=CUDA) == "graph"
    assert chosen("model=resnet20", wanted="eager", device=CUDA) == "eager"
    assert chosen("model=resnet20", earlier="eager", device=CUDA) == "eager"


def test_a_run_begun_as_a_graph_goes_on_without_one_elsewhere(cuda):
    assert chosen("experiment=quickstart", earlier="graph") == "eager"
    assert chosen("experiment=quickstart", earlier="graph", device=CUDA) == "graph"


@pytest.mark.parametrize("wanted", ["graph", "graph-eager"])
def test_a_graph_is_refused_where_there_is_no_cuda(wanted):
    with pytest.raises(UserError, match=rf"machine\.mode={wanted} needs a CUDA device, not cpu"):
        chosen("model=resnet20", wanted=wanted)


def test_where_nothing_can_be_recorded_or_compiled_one_line_says_so(monkeypatch, capsys, cuda):
    monkeypatch.setattr(execution, "compiler_fault", lambda device: "no g++")
    assert chosen("model=resnet20", device=CUDA) == "graph-eager"
    assert capsys.readouterr().err == "warning: torch.compile does not work here (no g++): recording without it.\n"
    monkeypatch.setattr(execution.cuda_graph, "fault", lambda device: "an old driver")
    assert chosen("model=resnet20", device=CUDA) == "eager"
    assert capsys.readouterr().err == (
        "warning: iterations cannot be recorded here (an old driver): training in eager mode.\n"
    )


def test_runs_alike_in_one_process_share_what_is_compiled_and_nothing_else(monkeypatch):
    """One run after another, or lanes: only the first of a kind waits for the compiler."""
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
        model, _, compiled = prepare(layers.mbn(2, 0.1), 2, "compile", batch_size=8)
        torch.manual_seed(i)
        twin, _, eager = prepare(layers.mbn(2, 0.1), 2, "eager", batch_size=8)
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
    _, _, other = prepare(layers.mbn(2, 0.1, memory=3), 2, "compile", batch_size=8)
    other(*batch())
    assert len(graphs) == 4


def test_a_broken_tool_chain_is_found_out(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: g++ not found\nand more")

    monkeypatch.undo()
    execution.compiler_fault.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function: broken)
    assert execution.compiler_fault(CPU) == "RuntimeError: InvalidCxxCompiler: g++ not found"
    execution.compiler_fault.cache_clear()


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
