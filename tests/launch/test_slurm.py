"""Runs on a cluster: what Slurm is asked for, and a job that is pre-empted."""

import os
import re
import signal
import subprocess
import sys

import pytest
from test_reproduce import wait_until

from mbn.launch import slurm
from mbn.system.errors import UserError

OPTIONS = ("--launcher", "slurm", "--slurm", "partition=gpu,time=8:00:00,gpus=1,cpus-per-task=4")


def test_a_preempted_job_saves_and_goes_on(checkout):
    """With submitit's local executor, which requeues a job as Slurm does."""
    import cloudpickle
    import submitit

    out, _ = checkout.call("toy", "norm=bn", "--seed", "0", "--dry-run", "--jobs", "1")
    overrides = out.split()[2:]
    cloudpickle.register_pickle_by_value(slurm)
    executor = submitit.LocalExecutor(checkout.folder / "jobs")
    executor.update_parameters(timeout_min=60, signal_delay_s=0)
    log = checkout.results / "log.txt"
    held = checkout.hold()
    job = executor.submit(slurm.SlurmJob([sys.executable, str(checkout.folder / "train.py"), *overrides], log))
    wait_until(checkout.checkpoints)
    listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    (task,) = [line.split()[0] for line in listed if f"submitit.core._submit {checkout.folder}" in line]
    os.kill(int(task), signal.SIGUSR2)
    wait_until(lambda: "stopped." in log.read_text())
    held.unlink()
    job.result()
    assert log.read_text().count("stopped.") == 1
    assert len(checkout.starts()) == 2
    assert len(checkout.records()) == 1


def test_a_job_whose_run_fails_has_failed(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 3"):
        slurm.SlurmJob(["sh", "-c", "echo no; exit 3"], tmp_path / "log")()
    assert (tmp_path / "log").read_text() == "no\n"


@pytest.mark.parametrize(("locked", "starts"), [(2, 3), (99, 3)], ids=["for a while", "for good"])
def test_a_run_that_another_process_holds_is_tried_again(tmp_path, monkeypatch, locked, starts):
    """Its lock may stay for minutes after the machine that held it has died."""
    monkeypatch.setattr(slurm, "TRIES", 3)
    monkeypatch.setattr(slurm, "TRY_AGAIN_AFTER", 0.0)
    script = f'echo start; [ "$(wc -l < "$0")" -gt {locked} ] || exit 76'
    log = tmp_path / "log"
    slurm.SlurmJob(["sh", "-c", script, str(log)], log)()
    assert log.read_text() == "start\n" * starts


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """What sbatch, a stand-in for Slurm's, was given."""
    for name, script in (("srun", "exit 1"), ("sbatch", f"cp $1 {tmp_path}/submitted; echo Submitted batch job 7")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "submitted"


def test_runs_are_handed_to_slurm_as_one_array(checkout, submitted):
    out, _ = checkout.call("toy", "--seeds", "2", *OPTIONS)
    assert re.findall(r": job (\S+)", out) == ["7_0", "7_1", "7_2", "7_3"]
    asked = set(submitted.read_text().splitlines())
    wanted = ("partition=gpu", "time=8:00:00", "gpus=1", "cpus-per-task=4", "array=0-3%4")
    assert {f"#SBATCH --{option}" for option in wanted} <= asked


@pytest.mark.parametrize(
    ("options", "asked"), [("partition=gpu", "gpus-per-node=4"), ("gres=gpu:a100:4", "gres=gpu:a100:4")]
)
def test_runs_in_several_processes_are_started_by_torchrun(checkout, submitted, options, asked):
    options = f"{options},time=60"
    checkout.call("toy", "--seeds", "1", "--launcher", "slurm", "--slurm", options, "--gpus-per-run", "4")
    said = submitted.read_text()
    assert f"#SBATCH --{asked}\n" in said
    assert said.count("gpu") == asked.count("gpu") + options.count("gpu") * (asked not in options)
    assert slurm.in_processes(["python", "train.py", "seed=0"], 4) == [
        *("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "train.py", "seed=0")
    ]
    assert slurm.in_processes(["python", "train.py"], 1) == ["python", "train.py"]


def test_a_cluster_that_is_not_there(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")  # nor is git
    _, error = checkout.call("toy", *OPTIONS, code=1)
    lines = (
        "warning: the commit of this code is unknown",
        ".* is a new folder",
        r"\d+ runs ",
        "error: Slurm did not take the runs ",
    )
    assert re.fullmatch("".join(f"{line}.*\n" for line in lines), error)


@pytest.mark.parametrize("text", ["gpu", "a=", "=b"])
def test_options_are_pairs(text):
    with pytest.raises(UserError, match="cannot read"):
        slurm.slurm_options(f"time=1,{text}")


def test_a_time_is_needed():
    """submitit asks for 5 minutes otherwise, in which a run might never reach its next checkpoint."""
    with pytest.raises(UserError, match="needs time="):
        slurm.slurm_options("partition=gpu")
