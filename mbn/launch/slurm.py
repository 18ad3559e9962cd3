"""Runs as jobs of a Slurm cluster, through submitit: a pre-empted run saves, is requeued, and goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbn.launch.missing_runs import PlannedRun
from mbn.system.errors import UserError
from mbn.system.files import LOCKED

# How often a run may reach its time limit and be requeued: it goes on from its checkpoint each time.
TIMEOUTS = 1000
# A run that is held by another process is tried again so often, and after so many seconds: the lock of a job that died
# with its machine may stay for minutes on a network drive.
TRIES, TRY_AGAIN_AFTER = 10, 30.0


class SlurmJob:
    """The function that submitit calls: runs a command line. Pickled by value: a job need not import this package."""

    process: subprocess.Popen

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log

    def __call__(self) -> None:
        """Run the command to its end. Errors: RuntimeError where train.py failed, so that Slurm shows a failed job.

        A run that another process trains (LOCKED) has not failed; but torchrun gives such runs the code 1.
        """
        code = self._run()
        for _ in range(TRIES - 1):
            if code != LOCKED:
                break
            time.sleep(TRY_AGAIN_AFTER)
            code = self._run()
        if code not in (0, LOCKED):
            raise RuntimeError(f"train.py ended with exit code {code}: see {self.log}")

    def _run(self) -> int:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=self._answer_interrupt_alone,
            )
        # Not wait(): it holds a lock, and checkpoint(), called by a signal, would wait for that lock for ever.
        while self.process.poll() is None:
            time.sleep(0.1)
        return self.process.returncode

    @staticmethod
    def _answer_interrupt_alone() -> None:
        # Slurm signals every process of a job, and `checkpoint` signals the run too, which answers SIGINT alone:
        # SIGUSR2 would end a torchrun around it at once.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def checkpoint(self) -> Any:
        """Called by submitit before it requeues: let the run save, and return the same command to submit again."""
        from submitit.helpers import DelayedSubmission

        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            self.process.send_signal(signal.SIGINT)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(type(self)(self.command, self.log))


def in_processes(command: Sequence[str], number: int) -> list[str]:
    """The command of a run, started by torchrun in so many processes of one machine."""
    if number == 1:
        return list(command)
    python, *rest = command
    return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", *rest]


def submit(runs: Sequence[tuple[PlannedRun, Sequence[str]]], results: Path, options: dict[str, str]) -> list[str]:
    """Submit runs with their commands to Slurm as one array, and return the job numbers. Errors: UserError."""
    try:
        import cloudpickle
        import submitit
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install -e '.[cluster]'.", code=2) from None
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        executor = submitit.SlurmExecutor(results / "runs" / "jobs", max_num_timeout=TIMEOUTS)
        executor.update_parameters(additional_parameters=options)
        with executor.batch():
            jobs = [executor.submit(SlurmJob(line, run.folder(results) / "log.txt")) for run, line in runs]
        return [job.job_id for job in jobs]
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"Slurm did not take the runs ({first}): check --slurm and the cluster.") from None


def slurm_options(text: str) -> dict[str, str]:
    """sbatch's options from `partition=gpu,time=8:00:00,gpus=1`, of which time is needed. Errors: UserError."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    for key, _, value in pairs:
        if not key or not value:
            raise UserError(f"cannot read --slurm {text!r}: it takes key=value,key=value.", code=2)
    options = {key.replace("-", "_"): value for key, _, value in pairs}
    if "time" not in options:
        raise UserError(
            "--slurm needs time=, as in --slurm partition=gpu,time=8:00:00: without it submitit gives a job 5 minutes.",
            code=2,
        )
    return options
