"""Processes that make batches: they die, hang, and are too many; a signal comes while a run waits for them."""

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import jpegs
import numpy as np
import pytest
import torch
from running import Run, build_small
from test_reproduce import wait_until

import train
from mbn.data import workers
from mbn.data.image_folder import Decoder
from mbn.data.workers import Workers
from mbn.system import signals
from mbn.system.errors import UserError
from mbn.system.signals import StoppedError, StopRequest

# Python 3.12 and later warn of a fork in a process with threads, which torch's are.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc, and forks"),
]


def start_by(method, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", partial(multiprocessing.get_context, method))
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: method)


@pytest.fixture
def forked(monkeypatch):
    """Processes inherit functions that cannot be pickled, and what a test has replaced."""
    start_by("fork", monkeypatch)


def numbered(task):
    """A batch of 1 MB, more than a pipe holds; every second one takes longer."""
    time.sleep(0.01 * (task % 2))
    return np.full((2, 500_000), task, np.uint8), np.array([task, task])


def made(make, number=1, tasks=8, stop=None):
    """The batches that make makes, all processes having ended."""
    stop = StopRequest() if stop is None else stop
    with contextlib.closing(Workers(make, number)) as running:
        try:
            return list(running.batches(range(tasks), stop, "the disk"))
        finally:
            running.close()
            wait_until(lambda: not multiprocessing.active_children())


@pytest.mark.parametrize(
    ("number", "method"), [(1, "fork"), (3, "fork"), (20, "fork"), (3, "forkserver"), (2, "spawn")], ids=str
)
def test_batches_come_in_the_order_of_their_tasks(number, method, monkeypatch):
    """However processes are started: Linux's way until Python 3.13, from 3.14 on, and macOS's."""
    start_by(method, monkeypatch)
    for task, (images, labels) in enumerate(made(numbered, number, 11)):
        assert images.shape == (2, 500_000)
        assert images.unique().tolist() == labels.unique().tolist() == [task]


def test_no_shared_memory_is_needed(tree):
    """Docker gives 64 MB of it: nothing of ours may lie there."""

    def shared(process):
        opened = []
        for path in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                opened.append(str(path.readlink()))
        return set(
            re.findall(r"/dev/shm/\S+|/torch_\S+", "\n".join([Path(f"/proc/{process}/maps").read_text(), *opened]))
        )

    before = shared(os.getpid())  # semaphores of other libraries
    with contextlib.closing(jpegs.opened(tree, 2).train_batches(0, 8)) as batches:
        next(batches)
        for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
            assert shared(process) <= before


def ends_by(number, sent):
    """A function that makes one batch, and ends its process by a signal in the second: with its first bytes sent."""

    def make(task):
        if task:
            faulthandler.disable()  # pytest's, which would report it
            workers._write = lambda pipe, content: (
                os.write(pipe.fileno(), content[:sent]),
                os.kill(os.getpid(), number),
            )
            if not sent:
                os.kill(os.getpid(), number)
        return numbered(task)

    return make


@pytest.mark.parametrize("sent", [0, 1000])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_process_that_is_killed_is_one_sentence_that_names_the_signal(name, sent, forked, capfd):
    with pytest.raises(UserError, match=f"^a process that decodes images was ended by {name}, .*machine.workers.*\\.$"):
        made(ends_by(getattr(signal, name), sent))
    assert capfd.readouterr() == ("", "")


def test_a_process_that_exits_is_one_sentence(forked):
    with pytest.raises(UserError, match=r"^a process that decodes images ended, "):
        made(lambda _: os._exit(3))


def hangs(_):
    time.sleep(1000)


def test_a_request_to_stop_ends_the_wait_for_a_batch(monkeypatch):
    monkeypatch.setattr(signals, "FINISH_WITHIN", 0.1)
    stop, began = StopRequest(), time.monotonic()
    threading.Timer(0.2, setattr, (stop, "code", 75)).start()
    with pytest.raises(StoppedError):
        made(hangs, stop=stop)
    assert time.monotonic() - began > 0.3


def test_a_wait_is_said_and_then_ends(monkeypatch, capsys):
    monkeypatch.setattr(workers, "POLL", 0.001)
    # A clock on which 10 s pass between two looks.
    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    monkeypatch.setattr(workers, "LONGEST_LOOK", 10.0)
    with pytest.raises(UserError, match=r"^no images came from the disk in 30 minutes: [^.]*\.$"):
        made(hangs)
    assert workers.time.monotonic() == 1820  # the look before was the first after 1800 s
    assert capsys.readouterr().err == "warning: no images have come from the disk for 60 seconds: still waiting.\n"


def slow(task):
    time.sleep(0.1)
    return numbered(task)


def test_the_time_in_which_the_run_was_suspended_does_not_count(monkeypatch, capsys):
    """An hour between two looks: Ctrl-Z, or a container that was paused."""
    monkeypatch.setattr(workers, "POLL", 0.01)
    monkeypatch.setattr(workers, "LONGEST_LOOK", 0.05)
    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=itertools.count(0, 3600).__next__))
    assert len(made(slow, tasks=3)) == 3
    assert capsys.readouterr().err == ""


def lacks_memory(_):
    raise MemoryError


def test_lack_of_memory_in_a_process_is_not_blamed_on_the_device():
    with pytest.raises(UserError, match=r"^this machine's memory is not enough to decode images: .*machine.workers"):
        made(lacks_memory)


def test_a_process_that_cannot_start_is_one_sentence(monkeypatch):
    start, begun = multiprocessing.Process.start, []

    def fails(self):
        begun.append(self)
        if len(begun) == 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(self)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", fails)
    with pytest.raises(UserError, match=r"^cannot start 4 processes .* \(Resource temporarily unavailable\): lower"):
        Workers(numbered, 4)
    wait_until(lambda: not multiprocessing.active_children())


def test_memory_that_cannot_be_pinned_ends_the_wait_at_once():
    """As on a machine without the device that is asked for: a thread that fails must not be waited for."""
    running = Workers(numbered, 1, torch.device("cuda:99"))
    with contextlib.closing(running), pytest.raises((RuntimeError, AssertionError), match=r"(?i)cuda|nvidia"):
        next(running.batches([0], StopRequest(), "the disk"))


def test_a_mistake_in_a_process_shows_where_it_is(forked):
    with pytest.raises(RuntimeError, match=r"(?s)in <lambda>.*ZeroDivisionError"):
        made(lambda _: 1 / 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_a_run_whose_images_do_not_come(workers, tree, tmp_path, forked, monkeypatch, capfd):
    """With the same sentence and exit code as any other time; the checkpoint holds all that was trained."""
    batch, ours = Decoder.batch, os.getpid()

    def slow(self, keys):
        keys = list(keys) if workers else keys  # here a list from which one is taken after the other
        return batch(self, (self_or_wait(key) for key in keys))

    def self_or_wait(key):
        if key[0] == 1:  # the second epoch
            if not sent.exists():
                sent.touch()
                os.kill(ours, signal.SIGTERM)
            seen.append(key)
            time.sleep(1000 if workers else 0.05)
        return key

    seen = []
    sent = tmp_path / "sent"
    monkeypatch.setattr("models.build", build_small)
    monkeypatch.setattr(Decoder, "batch", slow)
    monkeypatch.setattr(signals, "FINISH_WITHIN", 0.01)
    overrides = [
        *(*jpegs.RUN, "batch_size=24", "schedule.epochs=2", "machine.mode=eager"),
        *(f"machine.data={tree}", f"machine.workers={workers}"),
    ]
    assert train.main([*overrides, f"machine.results={tmp_path}"]) == 75
    if workers == 0:  # in this process: from the second image after the signal on, FINISH_WITHIN is over
        assert len(seen) == 2
    assert re.fullmatch(r"stopped at iteration 1 of 2, saved in [^\n]*\.", capfd.readouterr().err.splitlines()[-1])
    assert Run(tmp_path, overrides).checkpoint()["iteration"] == 1
    wait_until(lambda: not multiprocessing.active_children())
