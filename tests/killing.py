"""Processes that are killed at a chosen or random moment; they are forked from one that has imported torch already.

As a script it reads jobs from its input, one JSON a line, forks for each, and prints how it ended.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
# A PATH on which git does not work: a working tree that changes while the tests run then changes no record.
WITHOUT_GIT = f"{HERE / 'without_git'}{os.pathsep}{os.environ['PATH']}"


class Ended(NamedTuple):
    """code: the exit code, negative for a signal. text: what it printed."""

    code: int
    text: str
    seconds: float


class Forker:
    """Runs jobs one at a time, each in its own process. Context manager: at its end the forking process has ended."""

    def __init__(self, log: Path, **environment: str) -> None:
        self.log = log
        environment = {"PATH": WITHOUT_GIT, "MBN_COMMIT": "c0ffee" * 6 + "c0ff"} | environment
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "killing.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )

    def __enter__(self) -> "Forker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, after=None, once=None, **job) -> Ended:
        """Run a job to its end. after: it is killed so many seconds after the file `once` appears."""
        began = time.monotonic()
        print(json.dumps(job | {"log": str(self.log)}), file=self.process.stdin, flush=True)
        process = int(self.process.stdout.readline())
        over = threading.Event()

        def kill():
            while once is not None and not once.exists():
                if over.wait(0.002):
                    return
            # Until the process is reaped, its id is given to no other one.
            if not over.wait(after):
                os.kill(process, signal.SIGKILL)

        with ThreadPoolExecutor(1) as killer:
            if after is not None:
                killer.submit(kill)
            code = int(self.process.stdout.readline())
            over.set()
        print(file=self.process.stdin, flush=True)  # let it be reaped
        return Ended(code, self.log.read_text(), time.monotonic() - began)


# In the forking process and its children.


def serve() -> None:
    import running  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard

    from mbn import config

    torch.set_num_threads(1)
    config.load(["dataset=digits"])  # which imports Hydra
    torch.optim.SGD([torch.zeros(1)], lr=0.1)
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        process = os.fork()
        if process == 0:
            child(job)
        print(process, flush=True)
        ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        print(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status, flush=True)
        # Wait until the other side knows of the end. Only then may the id be given to another process.
        sys.stdin.readline()
        os.waitpid(process, 0)
    os._exit(0)  # a normal exit takes torch seconds


def child(job: dict) -> None:
    descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        code = JOBS[job["job"]](job)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train_job(job: dict) -> int:
    """`train.py overrides`, killed at a place at or after an iteration, or not at all."""
    import running

    import models
    import train

    models.build = {"tiny": running.build_tiny, "small": running.build_small}[job["network"]]
    if job.get("place"):
        aim(job["place"], job["at"], random.Random(job.get("seed", 0)))
    return train.main(job["overrides"])


def soak_job(job: dict) -> int:
    """As `train_job`; the memory and open files of this process are written to `samples` every so many iterations."""
    from mbn.training.iteration import Update

    numbers = itertools.count(1)
    call = Update.__call__

    def counted(self, images, labels):
        call(self, images, labels)
        number = next(numbers)
        if number % job["every"] == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held = {"rss": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(list(Path("/proc/self/fd").iterdir()))}
            with Path(job["samples"]).open("a") as file:
                file.write(json.dumps({"iteration": number} | held) + "\n")

    Update.__call__ = counted
    return train_job(job)


def save_job(job: dict) -> int:
    """Save the states of iteration after iteration for ever. Killed inside the save after `at`, or from outside."""
    from mbn.training import checkpoint_file

    path = Path(job["path"])
    iteration = job["at"]
    count = Events(job["nth"]) if job.get("nth") else None
    while True:
        iteration += 1
        content = state(iteration, job["size"])
        with count or contextlib.nullcontext():
            checkpoint_file.save(content, path)


def state(iteration: int, size: int) -> dict:
    import torch

    return {"iteration": iteration, "weights": torch.full((size,), float(iteration)), "sums": [iteration / 3]}


JOBS = {"train": train_job, "save": save_job, "soak": soak_job}


class Events:
    """Context manager: kills its process when a function is called or returns inside it for the n-th time."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> None:
        sys.setprofile(self.note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def note(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


# Where a process can be killed.
PLACES = (
    *("first forward", "optimiser's step", "second forward", "evaluation", "row of the journal", "end of an epoch"),
    *("saving", "half a checkpoint", "between the renames", "resuming", "half a record", "record written"),
)


def aim(place: str, at: int, draw: random.Random) -> None:
    """Let this process be killed when it reaches a place at or after an iteration."""
    from mbn.records import record
    from mbn.system import files
    from mbn.training import checkpoint_file, journal, trained
    from mbn.training import run as trainer

    now = -1

    def strike(armed: bool = True) -> None:
        if armed and now >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(owner, name, make) -> None:
        setattr(owner, name, make(getattr(owner, name)))

    def after(function, when=lambda *_: True):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            strike(when(*args))
            return result

        return call

    def set_schedule(original):
        def call(self, iteration):
            nonlocal now
            now = iteration
            return original(self, iteration)

        return call

    patch(trainer.Run, "set_schedule", set_schedule)

    def initialise(original):
        def call(self, *args):
            original(self, *args)
            if place == "first forward":
                self.update.first = after(self.update.first)
            elif place == "optimiser's step":
                patch(self.state.optimizer, "step", after)
            elif place == "second forward":
                layers = self.update.layers
                if self.update.mode == "compile" or not layers:
                    self.update.second = after(self.update.second)
                else:  # by then some layers have remembered the batch, and others have not
                    layer = draw.choice(layers)
                    patch(layer, "normalize_training", lambda f: after(f, lambda *_: layer.phase == "second"))

        return call

    patch(trainer.Run, "__init__", initialise)

    def half(original, name):
        def call(path, content, keep_as=None):
            if path.name.endswith(name) and (now >= at or name == "metrics.jsonl"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f"{path.name}.{os.getpid()}.partial").write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            original(path, content, keep_as)

        return call

    if place == "evaluation":  # between its first batch and its second

        def evaluate(original):
            def call(model, batches, *rest):
                numbers = itertools.count()
                return original(model, map(after(lambda batch: batch, lambda _: next(numbers)), batches), *rest)

            return call

        patch(trained, "evaluate", evaluate)
    elif place == "row of the journal":

        def write(original):
            def call(self, row):
                if now >= at:
                    with self.path.open("a") as file:
                        file.write(json.dumps(row)[: draw.randint(1, 40)])
                    strike()
                original(self, row)

            return call

        patch(journal.Journal, "write", write)
    elif place == "end of an epoch":
        patch(trainer.Run, "_end_epoch", after)
    elif place == "saving":

        def save(original):
            def call(*args):
                with Events(draw.randint(1, 400)) if now >= at else contextlib.nullcontext():
                    original(*args)

            return call

        patch(checkpoint_file, "save", save)
    elif place == "half a checkpoint":
        patch(checkpoint_file, "write_atomically", lambda f: half(f, "checkpoint.pt"))
    elif place == "between the renames":
        patch(type(Path()), "replace", lambda f: after(f, lambda _, to: Path(to).name == "checkpoint.previous.pt"))
    elif place == "resuming":
        patch(journal, "write_atomically", lambda f: half(f, "metrics.jsonl"))
    elif place == "half a record":
        patch(record, "write_atomically", lambda f: half(f, ".json"))
    elif place == "record written":
        patch(files, "_fsync_folder", lambda f: after(f, lambda folder: "other_records" in Path(folder).parts))


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    serve()
