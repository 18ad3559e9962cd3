"""scripts/check_gpu.py on the CPU: the comparisons find every fault, and the advice follows from the numbers."""

import json
import math
import re
import time
from dataclasses import replace

import pytest
import torch
from fake_cuda_graph import capture
from little_work import MBN2, SIZES, build, soon
from running import load_script
from test_graph import plant

from mbn.benchmark import equalities
from mbn.benchmark.equalities import Compared
from mbn.benchmark.jobs import NO_TIME
from mbn.benchmark.side_by_side import Rates
from mbn.benchmark.workload import PAIR, Case, arms
from mbn.norm import functional
from mbn.norm.memories import Memories
from mbn.system import cuda_graph
from mbn.training import iteration

script = load_script("check_gpu")
LANES = {4: (1, 2), 6: (1,)}
SHORT = replace(SIZES, arms=arms(PAIR, "graph-eager", "eager"), batches=(4, 6), lanes=LANES, compiled_lanes=LANES)
COMPARISONS = {job.name: job for job in equalities.jobs()}


@pytest.fixture(autouse=True)
def as_on_a_gpu(graphs, monkeypatch):
    """Graphs. And time enough for every job on a busy CPU."""
    todo = script.todo
    monkeypatch.setattr(script, "todo", lambda sizes: [job._replace(limit=1000.0) for job in todo(sizes)])


def compare(name, setup):
    found = COMPARISONS[name].work(replace(setup, sizes=SHORT), soon())
    assert not torch.are_deterministic_algorithms_enabled()
    return found


def check(*arguments):
    return script.main(["--device", "cpu", "--limit", "1000", *arguments], SHORT, build)


def test_all_jobs_end_with_the_advice_and_a_file(capsys, tmp_path, graphs):
    assert check("--out", str(tmp_path / "check.json")) == 0
    found = json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)
    names = [
        *(
            "layers",
            "bf16",
            "graph",
            "deterministic",
            "r20-b4",
            "r20-b6",
            "lanes-r20-b4-mbn",
            "lanes-r20-b6-mbn",
            "compiled",
        ),
    ]
    assert {name: case["status"] for name, case in found["cases"].items()} == dict.fromkeys(names, "done")
    assert graphs
    mode, (small, large) = found["advice"]["mode"], found["advice"]["lanes"]
    assert mode in ("graph", "graph-eager")
    assert small in (1, 2)
    assert large == 1
    measured = " (measured without compiling)" if mode == "graph" else ""  # as lanes always are
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"use: machine.mode={mode} ; reproduce.py --jobs {small} for batch 4, {large} for batch 6{measured}"
    )


# Faults.


def memory_off(monkeypatch):
    """Captured iterations make the memory wrong by a hundredth."""
    original = Memories.enter

    def enter(self):
        original(self)
        if captured_now:
            self.memory[3].mul_(1.01)  # m

    captured_now = []

    def recorder(function):
        captured_now.append(True)
        try:
            return capture(function)
        finally:
            captured_now.clear()

    monkeypatch.setattr(Memories, "enter", enter)
    monkeypatch.setattr(cuda_graph, "capture", recorder)


def formula_off(monkeypatch):
    original = functional._Moments.forward
    monkeypatch.setattr(
        functional._Moments, "forward", staticmethod(lambda ctx, x: tuple(1.01 * each for each in original(ctx, x)))
    )


def not_captured(monkeypatch):
    def fail(function):
        raise RuntimeError("no")

    monkeypatch.setattr(cuda_graph, "capture", fail)


def not_deterministic(monkeypatch):
    original = iteration.Update._iterate

    def iterate(self, images, labels):
        original(self, images, labels)
        with torch.no_grad():
            self.model.fc.bias.add_(time.monotonic() % 1)

    monkeypatch.setattr(iteration.Update, "_iterate", iterate)


def compiler_off(monkeypatch):
    def compiled(method, kind):
        def first(*batch):
            loss, measured = method(*batch)
            return 1.1 * loss, measured

        return first if method.__name__ == "_first" else method

    monkeypatch.setattr(iteration, "compiled", compiled)


def not_resumed(monkeypatch):
    monkeypatch.setattr(torch.optim.SGD, "load_state_dict", lambda self, state: None)


BN1, MBN1, BRN2, GN = (
    f"{name}, graph-eager" for name in ("BN 1 forward", "MBN 1 forward", "BRN 2 forwards", "GN 1 forward")
)
BATCH = f"{MBN2.name}, gradient batch"
EVERY = {BN1, MBN1, MBN2.name, BATCH, BRN2, GN}
TWO = {f"{name}, {mode}" for name in ("BN 1 forward", "MBN 2 forwards") for mode in ("eager", "graph-eager")}
FORMULAS = {f"{norm} {n}, eager" for norm in ("MBN", "BRN") for n in ("1 forward", "2 forwards")}
FORMULAS.add("MBN 2 forwards, eager, gradient batch")
FAULTS = {
    "none": (lambda patch: None, "layers", set()),
    "memory off": (memory_off, "graph", {MBN1, MBN2.name, BATCH}),
    "learning rate": (lambda patch: plant(patch, "learning rate"), "graph", EVERY),
    "lambda": (lambda patch: plant(patch, "lambda"), "graph", {MBN1, MBN2.name}),
    "bounds": (lambda patch: plant(patch, "bounds"), "graph", {BRN2}),
    "not captured": (not_captured, "graph", EVERY),
    "formula off": (formula_off, "layers", FORMULAS),
    "not deterministic": (not_deterministic, "deterministic", TWO),
    "not resumed": (not_resumed, "deterministic", TWO),
    "compiler off": (compiler_off, "compiled", {"MBN 2 forwards, graph"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_comparison_and_no_other(fault, monkeypatch, setup):
    put, name, wrong = FAULTS[fault]
    put(monkeypatch)
    found = compare(name, setup)
    assert found.missing == dict.fromkeys(wrong, "failed: does not hold")
    assert found.found.keys() >= wrong


@pytest.mark.parametrize(
    ("put", "only", "said", "wrong"),
    [
        (memory_off, "layers,bf16,graph,deterministic", f"{MBN2.name}: failed: does not hold", "graph"),
        (not_captured, "lanes-*", "more lanes: failed: RuntimeError: iterations cannot be captured", "layers, bf16"),
    ],
)
def test_a_fault_gives_eager_mode_and_exit_code_1_and_the_rest_goes_on(put, only, said, wrong, monkeypatch, capsys):
    put(monkeypatch)
    assert check("--only", only) == 1
    out = capsys.readouterr().out
    assert f"\n  {said}\n" in out
    assert "\ndeterministic (" in out
    assert f"not shown to be right: {wrong}" in out
    assert out.splitlines()[-1].startswith("use: machine.mode=eager ; reproduce.py --jobs 1 for batch 4, 1 for")


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_without_time_does_not_hold(name, setup, capsys):
    found = COMPARISONS[name].work(setup, time.monotonic())
    assert found.missing
    assert all(why.startswith("failed: TimeoutError: n") for why in found.missing.values())
    assert check("--limit", "1e-9", "--only", name) == 1
    assert re.search(rf"^{name} \([\d.]+ s\): {NO_TIME}$", capsys.readouterr().out, re.MULTILINE)


def test_without_cuda_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.undo()
    for device in ("cpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        assert script.main(["--device", device]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"error: this checks a CUDA device, but {device} is not one, or is not there.\n")


def test_no_time_for_any_job_is_exit_code_1(capsys):
    assert check("--limit", "1e-9", "--only", "r20-b4") == 1
    assert re.search(rf"^r20-b4 \([\d.]+ s\): {NO_TIME}$", capsys.readouterr().out, re.MULTILINE)


# The advice that follows from the numbers.


def advise(states=(), ms=(1.0, 2.0), rates=None):
    """The advice for these states of jobs (default "done"), ms with and without compiling, and rates."""
    status = {**dict.fromkeys(COMPARISONS, "done"), **dict(states)}
    compiled = Compared(found={"MBN 2 forwards, graph": {"ms": ms[0], "ms_without": ms[1]}})
    if status["compiled"] != "done":
        compiled.missing["MBN 2 forwards, graph"] = "failed: does not hold"
    measured = {f"lanes-{name}-{n}": Rates(Case(name, n, 1), MBN2, found) for (name, n), found in (rates or {}).items()}
    return script.advice(status, {"compiled": compiled, **measured}, (8, 128))


@pytest.mark.parametrize(
    ("states", "ms", "mode"),
    [
        ({}, (1.0, 2.0), "graph"),
        ({}, (2.0, 1.0), "graph-eager"),
        ({"compiled": "partly"}, (1.0, 2.0), "graph-eager"),
        ({"graph": "partly"}, (1.0, 2.0), "eager"),
        ({"layers": "skipped: not asked for"}, (1.0, 2.0), "eager"),
        ({"deterministic": "failed: no memory"}, (1.0, 2.0), "eager"),
    ],
    ids=str,
)
def test_the_mode_is_the_fastest_that_is_right(states, ms, mode):
    assert advise(states, ms)["mode"] == mode


@pytest.mark.parametrize(
    ("rates", "lanes"),
    [
        ({("a", 8): {1: 100.0, 2: 190.0, 4: 300.0, 8: 310.0}, ("a", 128): {1: 50.0, 2: 51.0}}, [4, 1]),
        ({("a", 8): {1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0}, ("a", 128): {1: 50.0, 2: 60.0, 4: 55.0}}, [8, 2]),
        ({("a", 8): {1: 100.0, 2: 190.0}, ("b", 8): {1: 40.0, 2: 41.0}, ("b", 128): {1: 9.0, 2: 12.0}}, [2, 2]),
        ({("a", 8): {}}, [1, 1]),
    ],
    ids=["near the best", "the best", "two networks", "not measured"],
)
def test_lanes_are_the_fewest_near_the_best_rate(rates, lanes):
    assert advise(rates=rates)["lanes"] == lanes


def test_a_difference_is_relative_to_the_largest_value_and_nan_is_infinitely_far():
    wanted = {"a": torch.tensor([100.0, 0.0]), "b": torch.zeros(2)}
    difference = equalities.largest_difference
    assert difference({"a": torch.tensor([100.0, 1.0]), "b": torch.zeros(2)}, wanted) == (0.01, "a")
    assert difference({"a": wanted["a"], "b": torch.full((2,), 1e-8)}, wanted) == (pytest.approx(1e-4), "b")
    assert difference(wanted, wanted) == (0.0, "none")
    for bad in (math.nan, math.inf):
        assert difference({"a": torch.tensor([100.0, bad]), "b": torch.zeros(2)}, wanted) == (math.inf, "a")
