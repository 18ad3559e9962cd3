"""Signals: a stop, and a process that is suspended and continued."""

import os
import signal
import subprocess
import sys

import pytest

from mbn.config import REPOSITORY
from mbn.system.signals import Stop


def test_a_continued_process_notes_that_and_is_not_stopped():
    before = signal.getsignal(signal.SIGCONT)
    with Stop() as stop:
        assert not stop.continued
        os.kill(os.getpid(), signal.SIGCONT)
        assert stop.continued
        assert stop.code is None
        stop.continued = False
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCONT)  # no second signal to stop, which would end the process at once
        assert (stop.code, stop.continued) == (75, True)
    assert signal.getsignal(signal.SIGCONT) == before


@pytest.mark.parametrize("stderr", ["closed", "without a reader"])
def test_a_stop_at_once_needs_no_stderr(stderr):
    code = """
import time
from mbn.system.signals import Exit
with Exit():
    print("ready", flush=True)
    while True:  # not signal.pause(), which a signal just before it does not end
        time.sleep(0.05)
"""
    with subprocess.Popen(
        ["bash", "-c", 'exec "$@" 2>&-', "-", sys.executable, "-c", code]
        if stderr == "closed"
        else [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
