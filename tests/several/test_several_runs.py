"""A run in several processes is the run in one: same losses, weights, memories and record."""

import itertools
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from unittest import mock

import jpegs
import pytest
import torch
import torch.distributed as dist
from running import TIMES, assert_same_run, without
from several_runs import RUN, Stops, command, from_files, left

from mbn import config
from mbn.config import REPOSITORY
from mbn.records import provenance
from mbn.system import processes as system_processes
from mbn.system import signals
from mbn.training import conditions, execution
from mbn.training.trained import Trained

METHODS = {
    "BN": ("norm=bn",),
    "BN-2": ("norm=bn", "forwards=2"),
    "BRN-2": ("norm=brn",),
    "MBN": ("norm=mbn",),
    "MBN-1": ("norm=mbn", "forwards=1"),
    "MBN, gradient batch": ("norm=mbn", "norm.gradient=batch"),
    "GN": ("norm=gn",),
    "BN, groups": ("norm=bn", "norm.group=25"),
    "BRN-2, groups": ("norm=brn", "norm.group=25"),
    "MBN, groups": ("norm=mbn", "norm.group=25"),
}
# Of each kind of layer one is tested under other rules too, which takes most of the time; one trains in two processes.
WITH_CONTROLS = {"BN", "BRN-2", "MBN", "GN", "MBN, groups"}
# What says how many processes there were, and what depends on time.
PLACES = TIMES | {"parts", "versions", "controls"}
CONTROLS = ("evaluate.precise=true", "evaluate.rules=true")


@pytest.fixture
def trained(processes, tmp_path):
    """A function that runs `train.py` in so many processes, and returns what it left and what the main one said."""

    def call(size, *overrides, folder=None, code=0, run=RUN, **how):
        results = tmp_path / (folder or str(size))
        results.mkdir(exist_ok=True)
        ended = processes.run(size, command, str(results), *overrides, run=run, **how)
        assert [one[0] for one in ended] == [code] * size, ended
        assert all((out, err) == ("", "") for _, out, err in ended[1:])  # only the main one prints
        return left(results, *overrides, run=run), ended[0]

    return call


def assert_close(one, other, within, name="run"):
    """Equal but for rounding: floats and tensors within a share of their size."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            assert_close(one[key], other[key], within, f"{name}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), name
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, within, f"{name}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, name
        assert (one - other).abs().max() <= within * max(1, float(one.abs().max())), name
    elif isinstance(one, float):
        assert math.isclose(one, other, rel_tol=within, abs_tol=within), (name, one, other)
    else:
        assert one == other, name


@pytest.mark.parametrize("method", METHODS)
def test_one_two_and_three_processes_train_the_same(trained, method):
    controls = CONTROLS if method in WITH_CONTROLS else ()
    assert_all_train_the_same(trained, *METHODS[method], *controls, sizes=(2, 3) if method == "MBN" else (3,))


def test_images_from_files_train_the_same(trained, tmp_path):
    """Each process decodes its share."""
    assert_all_train_the_same(trained, *CONTROLS, run=from_files(jpegs.make_tree(tmp_path / "images")))


def assert_all_train_the_same(trained, *overrides, run=RUN, sizes=(2, 3)):
    alone, _ = trained(1, *overrides, run=run)
    for size in sizes:
        several, _ = trained(size, *overrides, run=run)
        checkpoints = alone.checkpoint(), several.checkpoint()
        for key in ("model", "optimizer", "iteration", "length"):
            assert_close(checkpoints[0][key], checkpoints[1][key], 1e-9, key)
        assert_close(*([without(row, TIMES) for row in run.rows()] for run in (alone, several)), 1e-9, "journal")
        assert_close(*(without(run.record(), PLACES) for run in (alone, several)), 1e-9, "record")
        controls = [run.record()["controls"] for run in (alone, several)]
        assert [one is None for one in controls] == 2 * [CONTROLS[0] not in overrides]
        assert_close(*(without(one or {}, {"by"}) for one in controls), 1e-9, "controls")
        assert [part["processes"] for part in several.record()["parts"]] == [size]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [(), ("norm.group=250",)], ids=["", "one group"])
def test_compiled_processes_train_the_same(trained, more):
    """With one group a process gets nothing of any batch, which cannot be compiled."""
    alone, _ = trained(1, "norm=mbn", *more, "machine.mode=eager")
    how = {"before": capture_only} if more else {}
    several, _ = trained(2, "norm=mbn", *more, "machine.mode=compile", **how)
    assert several.record()["mode"] == "compile"
    assert_close(alone.checkpoint()["model"], several.checkpoint()["model"], 1e-9, "model")


def capture_only():
    """Compile without Inductor, which takes most of the time."""
    torch.compile = partial(torch.compile, backend="aot_eager")


@pytest.mark.parametrize("method", ["BN", "MBN"])
def test_in_float32_only_rounding_differs(trained, method):
    """As much as between one and two threads of one process: 1.6e-4 with BN, 5e-4 with MBN."""
    alone, several = (trained(size, *METHODS[method], float64=False)[0] for size in (1, 3))
    assert_close(alone.checkpoint()["model"], several.checkpoint()["model"], 2e-3, "model")


def test_a_last_batch_with_fewer_images_than_processes(trained):
    """Of 1437 images in batches of 359 one image is left: two of three processes get none of it."""
    few = ("norm=mbn", "batch_size=359", "schedule.iterations=10")
    alone, several = (trained(size, *few)[0] for size in (1, 3))
    assert_close(alone.checkpoint()["model"], several.checkpoint()["model"], 1e-9, "model")
    assert_close(*(without(run.record(), PLACES) for run in (alone, several)), 1e-9, "record")


@pytest.mark.parametrize(("method", "groups"), [("BN", 1), ("MBN", 2)])
def test_batches_with_fewer_groups_than_processes(trained, method, groups):
    """Of one group or two, and the last one of one image: processes get nothing in every iteration, or at the end."""
    few = ("batch_size=718", "schedule.iterations=6", "evaluate.batch_size=100", f"norm.group={718 // groups}")
    assert_all_train_the_same(trained, *METHODS[method], *few, *(CONTROLS if method == "MBN" else ()))


@pytest.mark.parametrize("method", ["BN", "MBN"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_signal_to_one_process_stops_all_and_they_go_on_with_the_same_bits(trained, method, dropout):
    whole, _ = trained(3, *METHODS[method], float64=False, dropout=dropout)
    for at, rank in ((4, 2), (7, 1)):
        part, (_, _, err) = trained(
            3, *METHODS[method], folder="part", code=75, float64=False, dropout=dropout, before=Stops(at, rank)
        )
        assert err.startswith("stopped at iteration")
    part, _ = trained(3, *METHODS[method], folder="part", float64=False, dropout=dropout)
    assert_same_run(whole, part)
    assert len(part.record()["parts"]) == 1


def test_processes_stopped_in_their_measurements_go_on_with_the_same_ones(trained):
    """Also if one of them has another name for its device, by which it would not take over what was measured."""
    whole, _ = trained(2, *METHODS["MBN"], *CONTROLS)
    _, (_, _, err) = trained(2, *METHODS["MBN"], *CONTROLS, folder="part", code=75, before=stops_in_measurements)
    assert err.startswith("stopped at iteration 12 of 12")
    part, _ = trained(2, *METHODS["MBN"], *CONTROLS, folder="part", before=has_another_device)
    one, two = (without(run.record()["controls"], ["by"]) for run in (whole, part))
    assert one == two


def stops_in_measurements():
    signals.FINISH_WITHIN = -1.0
    measure = Trained._train_error

    def stopped(trained):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(trained)

    Trained._train_error = stopped


def has_another_device():
    if dist.get_rank() == 1:
        conditions.provenance = mock.Mock(wraps=provenance, device_name=lambda _: "cpu: another")


@pytest.mark.parametrize("sizes", [(2, 1), (2, 3), (1, 2)], ids=str)
def test_a_run_goes_on_in_another_number_of_processes_with_one_warning(trained, sizes):
    alone, _ = trained(1, "norm=mbn", folder="alone")
    trained(sizes[0], "norm=mbn", folder="part", code=75, before=Stops(5, 0))
    part, (_, _, err) = trained(sizes[1], "norm=mbn", folder="part")
    assert err.count("warning: ") == 1
    assert f"conditions change at iteration 5 (processes {sizes[0]} -> {sizes[1]})" in err
    assert_close(alone.checkpoint()["model"], part.checkpoint()["model"], 1e-9, "model")
    parts = part.record()["parts"]
    assert [(one["from"], one.get("processes", 1)) for one in parts] == [(0, sizes[0]), (5, sizes[1])]


@pytest.mark.parametrize(("sizes", "threads"), [((1, 2), [4, 2]), ((2, 1), [2, 4])])
def test_another_number_of_processes_has_threads_of_its_own(trained, sizes, threads):
    for size, stops in zip(sizes, (True, False), strict=True):
        part, _ = trained(
            *(size, "norm=bn", "machine.threads=null"),
            **{"folder": "part", "code": 75 if stops else 0, "before": HasCores(4, stops)},
        )
    assert [one["threads"] for one in part.record()["parts"]] == threads


def test_as_many_processes_keep_their_threads_where_there_are_fewer_cores(trained):
    trained(2, "norm=bn", "machine.threads=null", folder="part", code=75, before=HasCores(4, stops=True))
    part, (_, _, err) = trained(2, "norm=bn", "machine.threads=null", folder="part", before=HasCores(2, stops=False))
    assert [one["threads"] for one in part.record()["parts"]] == [2]
    assert "warning: " not in err


@dataclass(frozen=True)
class HasCores:
    """So many cores, and it stops after five iterations."""

    cores: int
    stops: bool

    def __call__(self):
        execution.TORCHS_THREADS, execution.cores = self.cores, lambda: self.cores
        if self.stops:
            Stops(5, 0)()


def has_other_code():
    """In the second process."""
    if dist.get_rank() == 1:
        conditions.provenance = mock.Mock(wraps=provenance, code=lambda: "0" * 64)


def test_masks_of_dropout_are_each_processs_own(processes, tmp_path):
    one, two = processes.run(2, generator_at_first_dropout, str(tmp_path))
    assert one != two


def generator_at_first_dropout(results):
    states = []

    def watch():
        original = torch.nn.Dropout.forward
        torch.nn.Dropout.forward = lambda self, x: (
            states.append(torch.get_rng_state().tolist()) if self.training else None,
            original(self, x),
        )[1]

    command(results, "schedule.iterations=1", dropout=0.5, before=watch)
    return states[0]


def test_a_loss_that_diverges_ends_all_with_one_sentence(trained):
    run, (_, _, err) = trained(2, "norm=bn", "schedule.lr=[1e30,1e30,1e30]", code=1)
    assert err.count("error: training diverged: the ") == 1
    at = run.record()["diverged_at"]
    _, (_, out, err) = trained(2, "norm=bn", "schedule.lr=[1e30,1e30,1e30]", code=1)
    assert (out, err.count("\n")) == ("", 1)
    assert f": diverged at iteration {at} of 12, as " in err


def test_an_error_of_the_main_process_ends_all_with_one_sentence(trained):
    run, _ = trained(2, "norm=bn", code=75, before=Stops(3, 0))
    (run.folder / "metrics.jsonl").write_text("\n" * 9)
    _, (_, _, err) = trained(2, "norm=bn", code=1)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("machine.mode=graph",), "machine.mode=graph is for one process"),
        (("-m", "seed=0,1"), "a sweep (-m) is for one process"),
        (("batch_size=0",), "batch_size"),
    ],
    ids=["graph", "sweep", "mistake"],
)
def test_a_mistake_is_said_once(processes, tmp_path, overrides, said):
    ended = processes.run(2, command, str(tmp_path), *overrides)
    assert [code for code, _, _ in ended] == [2, 2]
    assert said in ended[0][2]
    assert ended[0][2].count("error: ") == 1
    assert ended[1][1:] == ("", "")


def test_processes_with_other_code_do_not_train(trained):
    _, (_, _, err) = trained(2, "norm=bn", code=1, before=has_other_code)
    assert "process 2 of 2 differs from the first in code" in err


@pytest.mark.parametrize(
    ("name", "value"),
    [("schedule.lr", [0.01, 0.001, 0.0001]), ("evaluate.rules", True), ("machine.again", True), ("batch_size", 249)],
)
def test_processes_with_another_setting_do_not_train(processes, tmp_path, name, value):
    before = partial(in_the_second_process, {name: value})
    ended = processes.run(2, command, str(tmp_path), "norm=bn", before=before)
    assert [code for code, _, _ in ended] == [2, 2]
    assert f"error: process 2 of 2 differs from the first in {name}" in ended[0][2]
    assert ended[1][1:] == ("", "")
    assert not list(tmp_path.rglob("*.json"))


def in_the_second_process(changes):
    """It has other settings."""
    load = config.load

    def load_others(overrides):
        settings = load(overrides)
        for name, value in changes.items():
            group, _, key = name.rpartition(".")
            setattr(getattr(settings, group) if group else settings, key, value)
        return settings

    if dist.get_rank() == 1:
        config.load = load_others


def test_what_belongs_to_a_machine_may_differ(trained):
    others = {"machine.data": "elsewhere", "machine.results": "elsewhere", "machine.threads": 2, "machine.workers": 1}
    trained(2, "norm=bn", before=partial(in_the_second_process, others))


def test_a_mistake_on_another_machine_is_said_there(processes, tmp_path):
    ended = processes.run(2, command, str(tmp_path), "batch_size=0", before=on_two_machines)
    assert [code for code, _, _ in ended] == [2, 2]
    assert all(err.count("error: ") == 1 for _, _, err in ended)


def on_two_machines():
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def test_a_finished_run_is_shown_by_the_main_process(trained):
    trained(2, "norm=bn")
    _, (_, out, _) = trained(2, "norm=bn")
    assert "The run is finished" in out


def test_shares_differ_by_one_image_and_keep_groups_whole():
    for n, size, whole in itertools.product(range(12), range(1, 6), range(1, 5)):
        shares = [range(n)[system_processes.Processes(rank, size).share(n, whole)] for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(n))
        assert all(share.start % whole == 0 or not share for share in shares)
        groups = [-(-len(share) // whole) for share in shares]
        assert max(groups) - min(groups) <= 1


ENDS = """
import atexit, os
from mbn.system.processes import end, from_environment
class Aborts:
    def __del__(self, abort=os.abort):
        abort()
aborts = Aborts()  # what gloo's threads may do while Python ends
atexit.register(print, "atexit")
print("output")
end(3)
"""


@pytest.mark.parametrize(
    ("size", "code"), [("2", 3), ("1", -signal.SIGABRT), ("two", -signal.SIGABRT)], ids=["several", "one", "mistake"]
)
def test_one_of_several_processes_ends_without_pythons_own_end(size, code):
    there = dict(zip(system_processes.NAMES, ("1", size, "1", size, "localhost", "0"), strict=True))
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], env={**os.environ, **there}, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (code, "output\natexit\n"), ended.stderr


@pytest.mark.parametrize("missing", [AttributeError, PermissionError], ids=["macOS", "sandbox"])
def test_processes_join_where_threads_cannot_be_scheduled(monkeypatch, missing):
    monkeypatch.setattr(system_processes.os, "sched_setscheduler", mock.Mock(side_effect=missing))
    with system_processes.new_threads_let_others_run():
        pass
