"""The processes that train one run, started by torchrun: which one this is, its share, what they tell each other."""

import atexit
import contextlib
import datetime
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, TypeVar

from mbn.system.errors import UserError
from mbn.system.signals import Item, StoppedError, StopRequest, say

T = TypeVar("T")
# What torchrun sets.
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long a process waits for another that is alive: one may decode or compile for long.
PEER_TIMEOUT = datetime.timedelta(minutes=30)
# Seconds for saving and stopping once the launcher has ended.
GRACE = 20


class Processes:
    """One of `size` processes that train a run together; each knows its `rank`, from 0.

    The first one is the main process: it alone reads and writes the run's files, and prints. All methods are called by
    all processes, in the same order. With size 1 they do nothing but the work itself.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.parent = os.getppid()

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def first_of_another_machine(self) -> bool:
        """Whether this is the first process of a machine that the main one is not on."""
        return self.local_rank == 0 and not self.main

    def share(self, n: int, whole: int = 1) -> slice:
        """This process's part of n images; parts differ by one image at most, or by one group of `whole` images."""
        groups = -(-n // whole)
        first, last = (min(n, groups * rank // self.size * whole) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def part_of(self, cores: int) -> int:
        """As many of a machine's cores as each of its processes may keep busy: one at least."""
        return max(1, cores // self.local_size)

    def on_main(self, work: Callable[[], T]) -> T | None:
        """The main process does work. Returns its result there, None elsewhere. Errors: a UserError, in all of them."""
        return self._by_main(work, sends=False)

    def from_main(self, work: Callable[[], T]) -> T:
        """The main process does work, and all get its result. Errors: a UserError, in all of them."""
        result: T = self._by_main(work, sends=True)  # type: ignore[assignment]
        return result

    def _by_main(self, work: Callable[[], T], sends: bool) -> T | None:
        if not self.several:
            return work()
        import torch.distributed as dist

        result: T | None = None
        box: list[Any] = [None, None]
        if self.main:
            try:
                result = work()
                box[0] = result if sends else None
            except UserError as error:
                box[1] = (str(error), error.code)
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            message, code = box[1]
            raise UserError(message, code, everywhere=True)
        return result if self.main else box[0]

    def main_first(self, work: Callable[[], T]) -> T:
        """All do work, the main process before the others: it may download what the others then find."""
        done = self.on_main(work)
        return done if self.main else work()  # type: ignore[return-value]

    def total(self, tensor: Any) -> Any:
        """The sum over the processes of a tensor, which is changed in place."""
        if self.several:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def highest(self, *numbers: float) -> list[float]:
        """The highest of each number over the processes, through the CPU: a GPU's queued work is not waited for."""
        if not self.several:
            return list(numbers)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def everyones(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def check_alike(self, own: dict[str, Any], advice: str, code: int = 1) -> None:
        """Check that all processes have the same value under each name. Errors: UserError, in all of them, which names
        the first process that differs from the main one, and ends with the advice.
        """
        everyone = self.everyones(own)
        for rank, other in enumerate(everyone):
            names = everyone[0] | other
            if differ := [name for name in names if other.get(name) != everyone[0].get(name)]:
                raise UserError(
                    f"process {rank + 1} of {len(everyone)} differs from the first in {' and '.join(differ)}: {advice}",
                    code,
                    everywhere=True,
                )

    def checked(self, stop: StopRequest, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; all processes have as many. Errors: StoppedError, in all at once, after a request to stop."""
        if not self.several:
            yield from stop.checked(items)
            return
        for item in items:
            code = int(self.highest(stop.code or 0)[0])
            if code:
                stop.code = code
                raise StoppedError
            yield item

    @property
    def lost_launcher(self) -> bool:
        """Whether the process that started this one has ended: nobody would end the others if one ends."""
        return self.several and os.getppid() != self.parent


ALONE = Processes()


def from_environment() -> Processes:
    """This process, as torchrun started it; ALONE without torchrun. Errors: UserError. Does not import torch."""
    if not all(name in os.environ for name in NAMES):
        return ALONE
    try:
        rank, size, local_rank, local_size = (int(os.environ[name]) for name in NAMES[:4])
    except ValueError:
        raise UserError(
            f"{', '.join(NAMES[:4])} must be whole numbers, as torchrun sets them: unset them to train in one process.",
            code=2,
        ) from None
    return _one(rank, size, local_rank, local_size) if size > 1 else ALONE


@functools.cache
def _one(*numbers: int) -> Processes:
    return Processes(*numbers)


def join(processes: Processes, device: str) -> None:
    """Connect the processes, once. device: the configured one; on CUDA each process takes the GPU of its local rank."""
    if not processes.several:
        return
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if cuda and processes.local_rank < torch.cuda.device_count():  # else `choose_device` says it
        torch.cuda.set_device(processes.local_rank)
    threading.Thread(target=_end_without_launcher, args=(processes,), daemon=True).start()
    with new_threads_let_others_run():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PEER_TIMEOUT)


@contextlib.contextmanager
def new_threads_let_others_run() -> Iterator[None]:
    """Threads that begin inside never interrupt another thread when they wake up (SCHED_BATCH), on Linux.

    For gloo's: the one that receives tries a lock again and again instead of waiting for it (`Pair::handleEvents` in
    gloo/transport/tcp/pair.cc). Where it interrupts the holder of the lock on the same core, both lose a time slice of
    3 to 6 ms: with as many processes as cores, a quarter of the time of training.
    """
    try:
        changes = os.sched_getscheduler(0) == os.SCHED_OTHER
        if changes:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError):  # macOS has no such call, and a sandbox may forbid it: only slower
        changes = False
    try:
        yield
    finally:
        if changes:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _end_without_launcher(processes: Processes) -> None:
    """End this process some time after its launcher has ended, if it has not stopped by itself until then.

    It may wait for a process that has ended too: torchrun, which would end it then, is no more.
    """
    while not processes.lost_launcher:
        time.sleep(1)
    time.sleep(GRACE)
    say("error: the launcher of this process has ended: the same command goes on from the last checkpoint.")
    os._exit(1)


def leave(processes: Processes) -> None:
    """Say goodbye at the end, so that the last message to another process is not lost."""
    if processes.several:
        import torch.distributed as dist

        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.barrier()
            dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process with the exit code, as sys.exit does; one of several runs what atexit knows, and ends at once.

    Python's own end would take the interpreter down while a thread of gloo's may still let go of a tensor, which aborts
    the process (https://github.com/pytorch/pytorch/issues/190489). Nor does destroy_process_group end these threads:
    defaults of functions that torch defines after `join` (in torch.distributed.nn.functional) hold the group.
    """
    try:
        several = from_environment().several
    except UserError:  # what the command has ended with
        several = False
    if several:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or none
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def another_may_end(processes: Processes) -> Iterator[None]:
    """Inside, the end of another process is a UserError, instead of whatever a message to it raises."""
    try:
        yield
    except RuntimeError as error:
        if not processes.several or not _is_of_messages(error):
            raise
        raise UserError(
            f"process {processes.rank + 1} of {processes.size} lost another one, which has ended: the same command "
            "goes on from the last checkpoint."
        ) from None


def _is_of_messages(error: RuntimeError) -> bool:
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()  # gloo has no class of errors
    return any(word in text for word in ("gloo", "connection closed by peer", "connection reset", "broken pipe"))
