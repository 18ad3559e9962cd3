"""Several processes that train together, forked from one that has imported torch. Each job has a group of its own."""

import builtins
import contextlib
import multiprocessing
import pickle
import time
import tomllib
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = 600  # seconds, until a job counts as hanging; gloo gives up before
HANGS = (None, "it hangs")
PYPROJECT = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())


class Processes:
    """Runs functions in several processes at once. Context manager: at its end the processes have ended."""

    def __init__(self, most: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo"])
        self.folder, self.jobs, self.busy = folder, 0, False
        self.pipes, others = zip(*(context.Pipe() for _ in range(most)), strict=True)
        self.processes = [context.Process(target=serve, args=(pipe,), daemon=True) for pipe in others]

    def __enter__(self) -> "Processes":
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.close()
            process.join(10)
            process.kill()

    def run(self, world: int, function, *args, **kwargs) -> list:
        """What the function returns in each of so many processes. An exception in one of them fails the test."""
        assert not self.busy, "an earlier job still hangs in these processes"
        self.jobs += 1
        self.busy = True  # until all have answered: a test whose time is over leaves it so
        pipes = self.pipes[:world]
        for rank, pipe in enumerate(pipes):
            pipe.send((str(self.folder / str(self.jobs)), rank, world, function, args, kwargs))
        # Plain pickle: the tensors themselves, and not handles of shared memory.
        answers = [pickle.loads(pipe.recv_bytes()) if pipe.poll(PATIENCE) else HANGS for pipe in pipes]
        self.busy = any(answer is HANGS for answer in answers)
        failures = "\n".join(f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(answers) if failure)
        assert not failures, failures
        return [result for result, _ in answers]


def serve(pipe) -> None:
    """Run the jobs that come through the pipe, and answer each with what it returned or how it failed."""
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # at the end of Processes
        while True:
            file, rank, world, function, args, kwargs = pipe.recv()
            result = failure = None
            try:
                torch.manual_seed(0)
                dist.init_process_group(
                    "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timedelta(seconds=500)
                )
                with warnings.catch_warnings():
                    filter_warnings()
                    result = function(*args, **kwargs)
            except BaseException:
                failure = traceback.format_exc()
            finally:
                time.sleep(0.01)  # for gloo's threads, which destroy_process_group of torch 2.6 can lock out for ever
                if dist.is_initialized():
                    dist.destroy_process_group()
            pipe.send_bytes(pickle.dumps((result, failure)))


def filter_warnings() -> None:
    """Treat warnings as pytest does: errors, but for those that pyproject.toml names."""
    for line in PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]:
        action, message, category = f"{line}::".split(":")[:3]
        warnings.filterwarnings(action, message, getattr(builtins, category or "Warning"))
