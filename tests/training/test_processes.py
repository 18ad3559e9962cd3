"""Runs of train.py as real processes: killed, signalled, finished."""

import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from running import COMMIT, Outcome, Run, assert_same_run, outcome, start

from mbn.config import REPOSITORY
from mbn.records import record

# 23 iterations an epoch: the second one is a partial one.
OVERRIDES = [
    *("dataset=digits", "model=resnet20", "norm=mbn", "batch_size=64", "schedule.iterations=26"),
    *("machine.threads=1", "machine.device=cpu", "machine.checkpoint_seconds=0.05"),
]
EPOCH = 23


class Chain(NamedTuple):
    """A run that was stopped again and again."""

    run: Run
    moments: list[str]
    outcomes: list[Outcome]


def launch(results):
    # From another working directory, with the results under a relative path.
    return start(*OVERRIDES, f"machine.results={results.name}", cwd=results.parent)


def reached(run):
    """The last iteration in the run's journal."""
    path = run.folder / "metrics.jsonl"
    seen = re.findall(r'"iteration": (\d+),.*\n', path.read_text()) if path.exists() else []
    return int(seen[-1]) if seen else 0


def wait_for(run, process, iteration):
    """Return when the run's journal has reached an iteration."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended before iteration {iteration}: {outcome(process)}"
        if reached(run) >= iteration:
            return
        time.sleep(0.01)
    raise AssertionError(f"never reached iteration {iteration}")


def chain(run, stops):
    """Train, stopped by each signal at a random moment after its iteration; None lets the run end."""
    moments, outcomes = [], []
    for number, iteration in stops:
        before = reached(run)
        process = launch(run.results)
        if number is None:
            outcomes.append(outcome(process))
            break
        # Beyond what the process before it left, so that this one is stopped in training too.
        wait_for(run, process, max(iteration, before + 2))
        pause = random.uniform(0, 0.15)
        time.sleep(pause)
        process.send_signal(number)
        outcomes.append(outcome(process))
        moments.append(f"{signal.Signals(number).name} {pause:.3f} s after iteration {iteration}")
    return Chain(run, moments, outcomes)


@pytest.fixture(scope="module")
def chains(tmp_path_factory):
    """An uninterrupted run, a killed one and a signalled one, two at a time."""
    iterations = [random.SystemRandom().randint(*span) for span in ((2, 6), (9, 13), (16, 18))]
    end = (None, None)
    plans = {
        "killed": [*((signal.SIGKILL, iteration) for iteration in iterations), end],
        "whole": [end],
        "signalled": [(signal.SIGTERM, iterations[0]), (signal.SIGINT, iterations[1])],
    }
    runs = {name: Run(tmp_path_factory.mktemp(name) / "results", OVERRIDES) for name in plans}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(chain, runs[name], plan) for name, plan in plans.items()}
        return {name: future.result() for name, future in futures.items()}


@pytest.fixture
def whole(chains):
    return chains["whole"].run


def resumed_at(result):
    found = re.findall(r"resuming at iteration (\d+) of 26", result.out)
    return int(found[0]) if found else None


def test_a_run_killed_three_times_ends_with_the_bits_of_an_uninterrupted_one(chains, whole):
    run, moments, outcomes = chains["killed"]
    assert [o.code for o in outcomes] == [-signal.SIGKILL] * 3 + [0], (moments, outcomes)
    starts = [resumed_at(o) for o in outcomes]
    assert starts[0] is None
    assert 0 < starts[1] < starts[2] < starts[3] < 26, (moments, starts)
    assert all(s % EPOCH for s in starts[1:]), (moments, starts)
    assert_same_run(run, whole)


def test_sigterm_ends_with_75_and_sigint_with_130_and_both_say_from_where_to_go_on(chains):
    """That a run goes on with the same bits is tested iteration by iteration in test_training.py."""
    run, moments, outcomes = chains["signalled"]
    assert [o.code for o in outcomes] == [75, 130], (moments, outcomes)
    for stopped in outcomes:
        assert "Traceback" not in stopped.err
    sentence = re.compile(r"^error: stopped at iteration (\d+) of 26, saved in ", re.MULTILINE)
    said = [int(sentence.search(o.err)[1]) for o in outcomes]
    assert resumed_at(outcomes[1]) == said[0]
    assert run.checkpoint()["iteration"] == said[1]


def test_the_record_of_a_run_is_whole_and_follows_its_name(chains, whole):
    result = record.read(whole.record_path)
    assert result["name"] == whole.name == whole.folder.relative_to(whole.results / "runs").as_posix()
    assert result["iterations"] == 26
    assert result["images"] == 1437 + 3 * 64
    assert result["parameters"] == 269_722
    assert (result["mode"], result["threads"], result["device"][:5]) == ("eager", 1, "cpu: ")
    assert 0 <= result["test_error_best"] <= result["test_error"] <= 100
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert set(result["versions"]) >= {"mbn", "torch", "python", "numpy"}
    assert (result["commit"], result["dirty"]) == (COMMIT, False)


def test_a_run_says_what_was_reached_where_the_record_is_and_the_tensorboard_command(chains, whole):
    (done,) = chains["whole"].outcomes
    result = whole.record()
    assert f"test error {result['test_error']:.2f} %" in done.out
    relative = whole.record_path.relative_to(whole.results.parent)
    assert f"record: {relative}\n" in done.out
    assert f"tensorboard --logdir {whole.results.name}/runs\n" in done.out
    assert done.err == ""


def test_a_finished_command_run_again_says_so_without_importing_torch(whole, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    began = time.monotonic()
    process = start(*OVERRIDES, f"machine.results={whole.results}", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    done = outcome(process)
    assert done.code == 0, done.err
    assert "finished" in done.out
    assert f"test error {whole.record()['test_error']:.2f} %" in done.out
    assert time.monotonic() - began < 20


SCALARS = {
    *("train/loss", "train/error", "test/loss", "test/error", "schedule/learning_rate", "schedule/lambda"),
    *("speed/images_per_second", "weights/norm", "statistics_gap/mean", "statistics_gap/log_std"),
    *("dead/channels", "dead/layers"),
}


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_tensorboard_shows_every_row_of_the_journal_once(chains, name):
    run = chains[name].run
    points, rows = run.points(), run.rows()
    assert set(points) >= SCALARS
    for tag, key in (("train/loss", "train_loss"), ("schedule/lambda", "lambda"), ("test/error", "test_error")):
        expected = [(row["images"], row[key]) for row in rows if key in row]
        assert [step for step, _ in points[tag]] == [step for step, _ in expected]
        assert [value for _, value in points[tag]] == pytest.approx([value for _, value in expected])
    for steps in ([step for step, _ in series] for series in points.values()):
        assert steps == sorted(set(steps))
    assert rows[-1]["images"] == 1437 + 3 * 64


def test_weight_norms_and_gaps_of_each_layer_are_logged(whole):
    points = whole.points()
    layers = {tag.removeprefix("layer_gap_mean/") for tag in points if tag.startswith("layer_gap_mean/")}
    assert len(layers) == 19
    assert {tag.removeprefix("layer_gap_log_std/") for tag in points if tag.startswith("layer_gap_log_std/")} == layers
    weights = {tag.removeprefix("weight_norm/") for tag in points if tag.startswith("weight_norm/")}
    assert len(weights) == 20
    last = whole.rows()[-1]
    model = whole.checkpoint()["model"]
    for name, norm in last["weight_norms"].items():
        assert norm == pytest.approx(model[name].double().norm().item(), rel=1e-5)
    assert last["weight_norm"] == pytest.approx(sum(v**2 for v in last["weight_norms"].values()) ** 0.5)
    assert last["gap_mean"] == pytest.approx(sum(last["gap_means"].values()) / 19)


def test_nothing_is_written_beside_the_results(chains):
    for name, (run, _, _) in chains.items():
        assert [p.name for p in run.results.parent.iterdir()] == ["results"], name
        assert not list(run.results.rglob("*.partial")) or name == "killed"


def test_the_repository_is_on_the_path_before_what_is_installed(tmp_path):
    """A second worktree runs its own code."""
    (tmp_path / "mbn").mkdir()
    (tmp_path / "mbn" / "__init__.py").write_text("raise ImportError('another mbn')\n")
    process = start("--cfg", "job", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    done = outcome(process)
    assert done.code == 0, done.err
    assert f"data: {REPOSITORY / 'data'}\n" in done.out
    assert os.fspath(tmp_path) not in done.out
