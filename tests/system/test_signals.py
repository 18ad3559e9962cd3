"""Signals: a stop, and a process that is suspended and continued."""

import os
import re
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


PROGRAMS = [
    "train.py",
    *(f"scripts/{name}.py" for name in ("reproduce", "tables", "plots", "evaluate", "benchmark", "check_gpu")),
]
# Modules of others, which a test puts in place of the real ones: a program that imports one waits there.
WAITS = "import time\nprint('loading', flush=True)\nwhile True:\n    time.sleep(0.05)\n"


@pytest.fixture
def loading(tmp_path):
    """A function that starts a program, after the words of a command, and returns once it imports a module."""
    started = []

    def start(program, module, *before):
        (tmp_path / f"{module}.py").write_text(WAITS)
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [*before, sys.executable, REPOSITORY / program],
            env={**os.environ, "PYTHONPATH": path, "MBN_COMMIT": "0" * 40},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "loading\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("program", "name", "code"), [*((program, "SIGINT", 130) for program in PROGRAMS), ("train.py", "SIGTERM", 75)]
)
def test_a_stop_while_a_program_is_imported_is_one_sentence(loading, program, name, code):
    process = loading(program, "torch" if program in PROGRAMS[-2:] else "omegaconf")
    process.send_signal(getattr(signal, name))
    assert process.wait(120) == code
    said = process.stderr.read()
    assert re.fullmatch(rf"stopped by {name} while it started: [^\n]*\.\n", said), said


@pytest.mark.parametrize("program", ["train.py", "scripts/reproduce.py"])
def test_the_stop_of_a_cluster_before_anything_is_trained_has_its_code(loading, program):
    process = loading(program, "hydra")  # imported to read the command
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert process.stderr.read().splitlines()[-1].startswith("stopped by SIGTERM ")


def test_ctrl_c_is_answered_where_a_shell_script_has_it_ignored(loading):
    process = loading("scripts/tables.py", "omegaconf", "bash", "-c", "trap '' INT; exec \"$@\"", "-")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130


def test_ctrl_c_is_an_exception_again_once_a_program_is_imported():
    code = """
import os, signal, time
from mbn.system import signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # as where no shell script began it
signals.answer_while_loading()
from mbn.system.command_line import entry_point

@entry_point
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        print("caught", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)

main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caught True\n", "")
