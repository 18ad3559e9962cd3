"""scripts/check_gpu.py on the CPU: a tiny network, and the stand-in for CUDA graphs."""

import json
import math
import time

import pytest
import torch
from running import Small, load_script
from tape import record
from test_graph import plant

from mbn.norm import functional
from mbn.norm.together import Memories
from mbn.system import cuda_graph
from mbn.training import iteration

check = load_script("check_gpu")

CPU = torch.device("cpu")
TINY = check.Scale({"small": Small}, (4, 6), 3, image=6, plays=2, lanes=((1, 2), (1,)), seconds=0.05)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch, recording):
    """Graphs; a compiler that takes no time; and afterwards the process's settings as they were."""
    monkeypatch.setattr(iteration, "compiled", lambda method, kind: method)
    yield
    torch.use_deterministic_algorithms(False)


def run(name):
    return check.run_step(name, 60, CPU, TINY)


def failed(step):
    return [row["what"] for row in step.rows if row["ok"] is False]


@pytest.mark.parametrize("name", check.STEPS)
def test_every_step_is_ok_where_nothing_is_wrong(name, recording):
    step = run(name)
    assert (step.state, failed(step)) == ("ok", [])
    assert step.rows
    assert bool(recording) == (name not in ("mps",))


def test_all_steps_end_with_a_table_the_advice_and_a_file(capsys, tmp_path, monkeypatch):
    written = []
    original = check.write_atomically
    monkeypatch.setattr(check, "write_atomically", lambda p, content: written.append(content) or original(p, content))
    assert check.main(["--device", "cpu", "--out", str(tmp_path / "check.json")], TINY) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "check.json").read_text())
    assert len(written) == len(check.STEPS)
    assert list(found["steps"]) == list(check.STEPS)
    assert all(step["state"] == "ok" for step in found["steps"].values())
    mode, (small, large) = found["advice"]["mode"], found["advice"]["lanes"]
    assert mode in ("graph", "graph-eager")
    assert small in (1, 2)
    assert large == 1
    assert out.splitlines()[-1] == (
        f"use: machine.mode={mode} ; reproduce.py --jobs {small} for batch 4, {large} for batch 6"
    )
    for name in check.STEPS:
        assert f"| **{name}** | ok |" in out


# Faults.


def memory_off(monkeypatch):
    """A memory that recorded iterations get wrong by a hundredth."""
    original = Memories.enter

    def enter(self):
        original(self)
        if recorded_now:
            self.m.mul_(1.01)

    recorded_now = []

    def recorder(function):
        recorded_now.append(True)
        try:
            return record(function)
        finally:
            recorded_now.clear()

    monkeypatch.setattr(Memories, "enter", enter)
    monkeypatch.setattr(cuda_graph, "record", recorder)


def formula_off(monkeypatch):
    original = functional._Moments.forward
    monkeypatch.setattr(
        functional._Moments, "forward", staticmethod(lambda ctx, x: tuple(1.01 * each for each in original(ctx, x)))
    )


def not_recorded(monkeypatch):
    def record(function):
        raise RuntimeError("no")

    monkeypatch.setattr(cuda_graph, "record", record)


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


FAULTS = {
    "memory off": (memory_off, "graph", ["small, MBN-1", "small, MBN-2", "small, MBN-2, gradient batch"]),
    "learning rate": (lambda patch: plant(patch, "learning rate"), "graph", [f"small, {m}" for m in check.METHODS]),
    "lambda": (lambda patch: plant(patch, "lambda"), "graph", ["small, MBN-1", "small, MBN-2"]),
    "bounds": (lambda patch: plant(patch, "bounds"), "graph", ["small, BRN-2"]),
    "not recorded": (not_recorded, "graph", [f"small, {m}" for m in check.METHODS]),
    "formula off": (
        formula_off,
        "layers",
        ["MBN, formula", "MBN, gradient batch, formula", "BRN, formula"],
    ),
    "not deterministic": (
        not_deterministic,
        "deterministic",
        [
            f"small, {m}, {mode}, {what}"
            for m in ("BN-1", "MBN-2")
            for mode in ("eager", "graph-eager")
            for what in ("twice", "resumed")
        ],
    ),
    "compiler off": (compiler_off, "compiled", ["small, MBN-2"]),
    "not recorded, lanes": (
        not_recorded,
        "lanes",
        ["small, MBN-2, batch 4, 1 at once", "small, MBN-2, batch 4, 2 at once", "small, MBN-2, batch 6, 1 at once"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_step_and_no_other_row(fault, monkeypatch):
    put, name, rows = FAULTS[fault]
    put(monkeypatch)
    step = run(name)
    assert step.state == "FAILED"
    assert failed(step) == rows


def test_a_fault_gives_eager_mode_and_exit_code_1_and_the_rest_goes_on(monkeypatch, capsys):
    memory_off(monkeypatch)
    assert check.main(["--device", "cpu", "--steps", "layers,graph,deterministic,mps"], TINY) == 1
    out = capsys.readouterr().out
    assert "| **graph** | FAILED |" in out
    assert "| **mps** | ok |" in out
    assert "not shown to be right: graph" in out
    assert out.splitlines()[-1].startswith("use: machine.mode=eager ; reproduce.py --jobs 1 for batch 4, 1 for")


def test_an_error_and_a_step_without_end_are_failures_and_the_next_step_runs(monkeypatch, capsys):
    def breaks(step, device, scale):
        raise RuntimeError("CUDA error: no kernel image\nmore")

    def hangs(step, device, scale):
        step.note("began")
        time.sleep(30)

    monkeypatch.setitem(check.STEPS, "layers", (breaks, 5))
    monkeypatch.setitem(check.STEPS, "graph", (hangs, 0.2))
    began = time.monotonic()
    assert check.main(["--device", "cpu", "--steps", "layers,graph,mps"], TINY) == 1
    assert time.monotonic() - began < 10
    out = capsys.readouterr().out
    assert "layers: RuntimeError: CUDA error: no kernel image: FAILED" in out
    assert "graph: not finished in 0 s: FAILED" in out
    assert "| **mps** | ok |" in out


def test_nothing_begins_once_the_time_is_over(capsys):
    assert check.main(["--device", "cpu", "--limit", "0", "--steps", "deterministic"], TINY) == 1
    assert "| **deterministic** | FAILED |" in capsys.readouterr().out


def test_without_cuda_one_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.undo()
    for device in ("cpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        assert check.main(["--device", device]) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"error: this checks a CUDA device, and {device} is none or not there.\n")


def test_an_unknown_step_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        check.main(["--steps", "layers,speeed"])
    assert stopped.value.code == 2
    assert "there is no step speeed" in capsys.readouterr().err


# What the numbers say.


def steps(states=(), ms=(1.0, 2.0), rates=None):
    """Steps as they would be with these states (ok where none is given), ms compiled and without, and rates."""
    made = {}
    for name in check.STEPS:
        made[name] = check.Step(name)
        made[name].state = dict(states).get(name, "ok")
    made["compiled"].note("equality", True, difference=0.0)
    made["compiled"].note("speed", ms=ms[0], ms_without=ms[1])
    for (network, batch), found in (rates or {}).items():
        for n, rate in found.items():
            made["lanes"].note("rate", network=network, batch=batch, lanes=n, rate=rate)
    return made


@pytest.mark.parametrize(
    ("states", "ms", "mode"),
    [
        ({}, (1.0, 2.0), "graph"),
        ({}, (2.0, 1.0), "graph-eager"),
        ({"compiled": "FAILED"}, (1.0, 2.0), "graph-eager"),
        ({"speed": "FAILED"}, (1.0, 2.0), "graph"),
        ({"graph": "FAILED"}, (1.0, 2.0), "eager"),
        ({"layers": "FAILED"}, (1.0, 2.0), "eager"),
        ({"deterministic": "FAILED"}, (1.0, 2.0), "eager"),
    ],
    ids=str,
)
def test_the_mode_is_the_fastest_that_is_right(states, ms, mode):
    assert check.advice(steps(states, ms), (8, 128))["mode"] == mode


@pytest.mark.parametrize("missing", ["layers", "graph", "deterministic"])
def test_an_equality_that_was_not_checked_does_not_hold(missing):
    some = steps()
    del some[missing]
    assert check.advice(some, (8, 128))["mode"] == "eager"


@pytest.mark.parametrize(
    ("rates", "lanes"),
    [
        ({("a", 8): {1: 100.0, 2: 190.0, 4: 300.0, 8: 310.0}, ("a", 128): {1: 50.0, 2: 51.0}}, [4, 1]),
        ({("a", 8): {1: 100.0, 2: 190.0, 4: 300.0, 8: 320.0}, ("a", 128): {1: 50.0, 2: 60.0, 4: 55.0}}, [8, 2]),
        ({("a", 8): {1: 100.0, 2: 190.0}, ("b", 8): {1: 40.0, 2: 41.0}, ("b", 128): {1: 9.0, 2: 12.0}}, [2, 2]),
        ({}, [1, 1]),
    ],
    ids=["near the best", "the best", "two networks", "not measured"],
)
def test_lanes_are_the_fewest_near_the_best_rate(rates, lanes):
    assert check.advice(steps(rates=rates), (8, 128))["lanes"] == lanes


# Comparing.


def test_a_difference_is_relative_to_the_largest_value_and_nan_is_infinitely_far():
    wanted = {"a": torch.tensor([100.0, 0.0]), "b": torch.zeros(2)}
    assert check.difference({"a": torch.tensor([100.0, 1.0]), "b": torch.zeros(2)}, wanted) == (0.01, "a")
    assert check.difference({"a": wanted["a"], "b": torch.full((2,), 1e-8)}, wanted) == (pytest.approx(1e-4), "b")
    assert check.difference(wanted, wanted) == (0.0, "none")
    for bad in (math.nan, math.inf):
        assert check.difference({"a": torch.tensor([100.0, bad]), "b": torch.zeros(2)}, wanted) == (math.inf, "a")


def test_the_time_limit_leaves_another_timer_as_it_was():
    rang = []
    before = check.signal.signal(check.signal.SIGALRM, lambda *_: rang.append(1))
    rest = check.signal.setitimer(check.signal.ITIMER_REAL, 0.3)
    try:
        with check.at_most(5):
            pass
        assert 0 < check.signal.getitimer(check.signal.ITIMER_REAL)[0] <= 0.3
        with pytest.raises(check.TimeUp), check.at_most(0.01):
            time.sleep(0.2)
        time.sleep(0.3)
        assert rang == [1]
    finally:
        check.signal.setitimer(check.signal.ITIMER_REAL, *rest)
        check.signal.signal(check.signal.SIGALRM, before)
