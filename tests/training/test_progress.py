"""What a person sees while a run trains."""

import re
import sys
import types

import pytest
import running
import torch
from running import TINY, load_quickly

from mbn.training import progress
from mbn.training.execution import eager_seconds


@pytest.fixture
def state():
    """What Progress reads of a run: 4 iterations of 100 images an epoch, 10 iterations in all."""
    clock = types.SimpleNamespace(training_seconds=0.0)
    return types.SimpleNamespace(
        clock=clock,
        iteration=0,
        length=10,
        per_epoch=4,
        images=0,
        images_before=lambda iteration: 100 * iteration,
        epoch_sums=types.SimpleNamespace(loss=0.5, error=25.0),
    )


def train(state, iterations, seconds):
    state.iteration += iterations
    state.images += 100 * iterations
    state.clock.training_seconds += seconds


EPOCH = {"epoch": 1.0, "train_loss": 0.5, "train_error": 25.0, "test_loss": 1.0, "test_error": 50.0}


def test_a_rate_is_that_since_the_last_line_and_the_time_left_follows_from_it(state, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINES_APART", 0.0)
    train(state, 2, 100.0)
    with progress.Progress(state) as shown:  # resumed after a slow beginning
        train(state, 1, 90.0)  # the first iteration compiles: it says nothing of the next ones
        shown.show()
        train(state, 1, 10.0)
        shown.tested = 7.0
        shown.show_epoch(EPOCH)
        train(state, 1, 1.0)  # too short for a rate of its own
        shown.show()
        train(state, 1, 9.0)
        shown.show()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "iteration 3 of 10: loss 0.5000, error 25.00 % in this epoch"
    # 6 iterations of 10 seconds, and the tests of the second epoch and at the end.
    assert lines[1].endswith("test loss 1.0000, error 50.00 %; 10 images/s, 74 s left")
    assert lines[1].startswith("epoch 1 of 2.5: ")
    assert lines[2].endswith("; 10 images/s, 64 s left")
    assert lines[3].endswith("; 20 images/s, 34 s left")


def test_without_a_terminal_there_is_a_line_every_half_minute(state, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(state) as shown:
        for _ in range(9):
            train(state, 1, 8.0)
            now[0] += 8
            assert shown.line_is_due() == (state.iteration in (4, 8))
            shown.show()
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "iteration 4 of 10",
        "iteration 8 of 10",
    ]


def test_in_a_terminal_a_bar_has_the_rate(state, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(state) as shown:
        train(state, 3, 10.0)
        shown.bar.update(3)
        assert not shown.line_is_due()
        shown.show()
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/10" in err
    assert "loss 0.5000, error 25.00 %, 30 images/s" in err


@pytest.mark.parametrize(("epochs", "text"), [(1, "1"), (200, "200"), (1 / 3, "0.33"), (0.00767263, "0.0077")])
def test_parts_of_epochs_are_short(epochs, text):
    assert progress._short(epochs) == text


def test_the_first_line_says_where_a_run_trains_and_for_how_long(here, whole):
    done = here("machine.mode=eager")
    assert re.search(
        rf"^{re.escape(whole().name)}: 8 iterations on cpu: .*, mode eager, 1 thread, commit c0ffeec, about \d+ s "
        r"\(a rough guess\)\n",
        done.out,
        re.MULTILINE,
    )
    assert done.err == ""


def test_a_new_folder_for_results_is_said_once(here, left):
    """It may be a slip of the pen."""
    assert f"{left().results} is a new folder" in here().out
    assert "new folder" not in here("seed=1").out


def test_the_guess_is_by_the_operations_on_a_thread():
    config = load_quickly([*TINY, "machine.results=x"])
    model = torch.nn.Conv2d(3, 5, 32)  # one product of 3 * 32 * 32 numbers for each of 5 outputs
    seconds = eager_seconds(config, model, torch.device("cpu"), 2)
    # Two operations each; one forward, its backward of twice the work, and the second forward; 5e10 a thread.
    assert seconds == pytest.approx(8 * 256 * 5 * 2 * 3 * 32 * 32 * 4 / 1e11)


@pytest.mark.parametrize(
    ("threads", "others", "cores", "said"), [(2, 1, 2, True), (2, 0, 2, False), (1, 5, 2, False), (8, 8, 16, False)]
)
def test_a_busy_machine_is_said_in_one_line_that_names_the_setting(monkeypatch, capsys, threads, others, cores, said):
    monkeypatch.setattr(progress, "tasks_of_others", lambda: others)
    monkeypatch.setattr(progress.os, "cpu_count", lambda: cores)
    progress.say_if_busy(threads)
    err = capsys.readouterr().err
    assert ("machine.threads=1" in err, err.count("\n")) == (said, int(said))


def test_threads_that_were_asked_for_are_not_commented_on(here, monkeypatch):
    monkeypatch.setattr("mbn.training.execution.cores", lambda: 2)
    monkeypatch.setattr(progress, "tasks_of_others", lambda: 99)
    monkeypatch.setattr("mbn.training.execution.TORCHS_THREADS", 2)
    assert here("machine.threads=2").err == ""
    assert "machine.threads=1" in here("machine.threads=null", "seed=1").err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads Linux's /proc")
def test_the_tasks_of_others_are_counted(monkeypatch):
    assert progress.tasks_of_others() >= 0
    looks = iter(["3/80", "2/80", "9/80", "3/80", "1/80"])
    monkeypatch.setattr(progress.Path, "read_text", lambda *_, **__: f"0.20 0.18 0.12 {next(looks)} 11206")
    assert progress.tasks_of_others() == 2  # without this one: 2, 1, 8, 2, 0


def test_the_data_are_opened_before_anything_is_compiled(here, monkeypatch):
    order = []
    monkeypatch.setattr("mbn.training.run.choose_mode", lambda *args: (order.append("mode"), "eager")[1])
    digits = running.digits
    monkeypatch.setattr(running, "digits", lambda: (order.append("data"), digits())[1])
    assert here().code == 0
    assert order == ["data", "mode"]
