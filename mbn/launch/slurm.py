"""Runs as jobs of submitit, on a Slurm cluster or on this machine: a pre-empted one saves, is requeued, and goes on."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mbn.launch.missing_runs import Run
from mbn.launch.pool import Process
from mbn.system.errors import UserError

# Minutes: no limit on this machine.
FOREVER = 60 * 24 * 365


class Job:
    """A run's command line as what submitit calls; pickled by value, so that a job needs nothing of this package.

    local: SIGTERM stops it for good, as reproduce.py does; on a cluster submitit decides what signals mean.
    """

    def __init__(self, command: Sequence[str], log: str, local: bool = False) -> None:
        self.command, self.log, self.local = list(command), log, local

    def __call__(self) -> int:
        """The exit code of train.py. Errors: RuntimeError on a cluster where it failed, so that the job has failed."""
        self.told = False
        if self.local:
            signal.signal(signal.SIGTERM, self._terminated)
        os.makedirs(os.path.dirname(self.log), exist_ok=True)  # noqa: PTH103, PTH120
        with open(self.log, "ab") as output:  # noqa: PTH123
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._deaf_to_all_but_interrupt,
            )
        # Not wait(): it holds a lock, for which checkpoint(), called by a signal, would wait for ever.
        while self.process.poll() is None:
            time.sleep(0.1)
        code = self.process.returncode
        if code not in (0, 76) and not self.local:
            raise RuntimeError(f"train.py ended with exit code {code}: see {self.log}")
        return code

    @staticmethod
    def _deaf_to_all_but_interrupt() -> None:
        # Slurm signals every process of a job: with our own that would be two, and the second ends a run unsaved.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def _terminated(self, *_: int | FrameType | None) -> None:
        if self.told:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.told = True
            self.process.send_signal(signal.SIGINT)

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues: have the run saved, and hand over the same command."""
        from submitit.helpers import DelayedSubmission

        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            self.process.send_signal(signal.SIGINT)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(type(self)(self.command, self.log, self.local))


def _submitit() -> Any:
    try:
        import cloudpickle
        import submitit
    except ImportError:
        raise UserError("--launcher needs submitit: pip install '.[cluster]'.", code=2) from None
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return submitit


class Local:
    """Starts runs as jobs of submitit's own executor on this machine; takes the place of `launch.start_process`."""

    def __init__(self, results: Path, command: Callable[[Run], Sequence[str]]) -> None:
        self.command = command
        self.executor = _submitit().LocalExecutor(results / "runs" / "jobs")
        self.executor.update_parameters(timeout_min=FOREVER, signal_delay_s=0)

    def __call__(self, run: Run, results: Path) -> "LocalChild":
        log = run.folder(results) / "log.txt"
        # Its processes are in our session: Ctrl-C must not come to them but by way of us.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return LocalChild(run, log, self.executor.submit(Job(self.command(run), str(log), local=True)))
        finally:
            signal.signal(signal.SIGINT, before)


class LocalChild(Process):
    """A job; what it is told comes to train.py by way of submitit's two processes."""

    def __init__(self, run: Run, log: Path, job: Any) -> None:
        super().__init__(run, log, job._process)
        self.job = job

    def code(self) -> int | None:
        if self.process.poll() is None:
            return None
        try:
            return self.job.result()
        except Exception:  # submitit's, of which there are many: its own log has it
            return 1

    def kill(self) -> None:
        self.told = False
        self.stop()
        self.stop()


def submit(runs: Sequence[tuple[Run, Sequence[str]]], results: Path, options: dict[str, Any]) -> list[str]:
    """Hand runs with their commands to Slurm, as one array; the numbers of the jobs. Errors: UserError."""
    submitit = _submitit()
    try:
        executor = submitit.SlurmExecutor(results / "runs" / "jobs")
        known = executor._valid_parameters()
        own = {k: v for k, v in options.items() if k in known}
        rest = {k: v for k, v in options.items() if k not in known}
        executor.update_parameters(**own, **({"additional_parameters": rest} if rest else {}))
        with executor.batch():
            jobs = [executor.submit(Job(line, str(run.folder(results) / "log.txt"))) for run, line in runs]
        return [job.job_id for job in jobs]
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as e:
        raise UserError(f"Slurm did not take the runs ({str(e).splitlines()[0]}).") from None


def slurm_options(text: str) -> dict[str, Any]:
    """`partition=gpu,time=8:00:00,gpus=1` as a dictionary, the time in minutes. Errors: UserError."""
    options: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise UserError(f"cannot read {part!r}: --slurm takes key=value,key=value.", code=2)
        options[key.replace("-", "_")] = int(value) if value.isdecimal() else value
    if isinstance(options.get("time"), str):
        options["time"] = _minutes(options["time"])
    return options


def _minutes(text: str) -> int:
    """Slurm's D-HH:MM:SS, D-HH:MM, D-HH, HH:MM:SS or MM:SS."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise UserError(f"cannot read the time {text!r}: write minutes, or it as 8:00:00.", code=2)
    days, dash, rest = text.rpartition("-")
    numbers = [int(n) for n in rest.split(":")]
    units = [3600, 60, 1] if dash or len(numbers) == 3 else [60, 1]
    seconds = sum(n * unit for n, unit in zip(numbers, units, strict=False)) + 86400 * int(days or 0)
    return -(-seconds // 60)
