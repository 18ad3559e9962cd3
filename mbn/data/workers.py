"""Processes that make a run's batches, each at the other end of a pipe of its own.

torch's DataLoader sends batches through /dev/shm, of which Docker gives 64 MB, less than two batches of ImageNet: what
does not fit ends in a bus error or is never sent. A worker that dies shows there as an exception anywhere in the
program. Here a batch needs no shared memory, a worker that dies closes its pipe, and every wait looks at the clock and
at the request to stop.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbn.system.errors import UserError
from mbn.system.files import let_go_of_inherited_locks
from mbn.system.signals import CODES, StopRequest

# Batches under way for each process: one that is made, one that waits here.
AHEAD = 2
# Seconds between two looks at the clock and at the request to stop; seconds until a wait is said, and until it ends the
# run: a disk in a network may come back after minutes.
POLL, SLOW, TOO_SLOW = 0.1, 60.0, 1800.0
# More seconds do not count between two looks: the process was suspended.
LONGEST_LOOK = 1.0

GO_ON = "the same command goes on from the last checkpoint, and fewer machine.workers need less memory."

Make = Callable[[Any], tuple[np.ndarray, np.ndarray]]


class Workers:
    """Processes that turn tasks into batches of images, uint8 (B, ...), and labels, (B,), by the function make.

    pin: on which CUDA device images are needed; they then lie in pinned memory. Errors: UserError where a process
    cannot be started.
    """

    def __init__(self, make: Make, number: int, pin: torch.device | None = None) -> None:
        self.number = number
        self.tasks: SimpleQueue[tuple[Future, Any] | None] = SimpleQueue()
        self.processes: list[BaseProcess] = []
        self.threads: list[Thread] = []
        # Before multiprocessing's own end, which would wait for them.
        atexit.register(self.close)
        if multiprocessing.get_start_method() == "forkserver":  # from Python 3.14 on
            # torch and what make needs are imported once, and not by each process.
            multiprocessing.set_forkserver_preload([__name__, make.__module__])
        try:
            for _ in range(number):
                self._start(make, pin)
        except (OSError, RuntimeError) as error:  # RuntimeError: no more threads
            self.close()
            raise UserError(
                f"cannot start {number} processes that decode images ({getattr(error, 'strerror', error)}): lower "
                "machine.workers."
            ) from None

    def _start(self, make: Make, pin: torch.device | None) -> None:
        pipe, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context().Process(target=_work, args=(pipe, theirs, make), daemon=True)
        process.start()
        theirs.close()  # before the next fork: only the process itself may hold this end, so that its death is seen
        self.processes.append(process)
        # Threads read the pipes, so that processes go on while a batch is trained on, and nothing can hold the trainer.
        thread = Thread(target=_serve, args=(self.tasks, pipe, process, pin), daemon=True)
        thread.start()
        self.threads.append(thread)

    def batches(self, tasks: Iterable[Any], stop: StopRequest, source: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the tasks, in their order. source: where their images are, for messages.

        Errors: what make raises; UserError where a process has died or nothing comes; StoppedError after a request.
        """
        futures: deque[Future] = deque()
        for task in tasks:
            futures.append(Future())
            self.tasks.put((futures[-1], task))
            if len(futures) > AHEAD * self.number:
                yield _waited(futures.popleft(), stop, source)
        while futures:
            yield _waited(futures.popleft(), stop, source)

    def close(self) -> None:
        """End the processes at once: they hold nothing that could be lost."""
        atexit.unregister(self.close)
        for process in self.processes:
            process.kill()
        for _ in self.threads:
            self.tasks.put(None)
        # Unless a process hangs in the system itself, which must not hold this one.
        for process in self.processes:
            process.join(1)
        for thread in self.threads:
            thread.join(1)


def _work(ours: Connection, pipe: Connection, make: Make) -> None:
    """The life of a process: batch after batch until the trainer closes its end of the pipe, or dies."""
    # A signal to the whole process group is for the trainer alone, which still needs the next batches.
    for name in CODES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    ours.close()
    let_go_of_inherited_locks()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = pipe.recv()
            try:
                images, labels = make(task)
            except UserError as error:
                pipe.send(error)
                continue
            except MemoryError:
                pipe.send(UserError(f"this machine's memory is not enough to decode images: {GO_ON}"))
                continue
            except Exception:  # a mistake of ours, of any kind: not every exception can be sent
                pipe.send(RuntimeError(traceback.format_exc()))
                continue
            pipe.send((images.shape, labels))
            _write(pipe, images.reshape(-1).data)


def _serve(tasks: SimpleQueue, pipe: Connection, process: BaseProcess, pin: torch.device | None) -> None:
    """The life of a thread: give its process a task, and read what it answers."""
    while (work := tasks.get()) is not None:
        future, task = work
        try:
            pipe.send(task)
            answer = pipe.recv()
            if isinstance(answer, Exception):
                raise answer
            shape, labels = answer
            with contextlib.nullcontext() if pin is None else torch.cuda.device(pin):
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=pin is not None)
            _read(pipe, images.numpy().reshape(-1).data)
            future.set_result((images, torch.from_numpy(labels)))
        except (EOFError, OSError):
            process.join(1)
            future.set_exception(_died(process.exitcode))
            return
        except Exception as error:  # belongs to whoever waits for the batch
            future.set_exception(error)


# The pipe's own send_bytes and recv_bytes_into take five times as long, for they copy: 3,400 images of 224 pixels a
# second, not 17,000. Windows has no readv.
if sys.platform == "win32":
    _write, _read = Connection.send_bytes, Connection.recv_bytes_into
else:

    def _write(pipe: Connection, content: memoryview) -> None:
        while content:
            content = content[os.write(pipe.fileno(), content) :]

    def _read(pipe: Connection, content: memoryview) -> None:
        while content:
            n = os.readv(pipe.fileno(), [content])
            if n == 0:
                raise EOFError
            content = content[n:]


def _died(code: int | None) -> UserError:
    how = "ended"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):  # a number without a name
            how = f"was ended by {signal.Signals(-code).name}"
    return UserError(f"a process that decodes images {how}, perhaps for lack of memory: {GO_ON}")


def _waited(future: Future, stop: StopRequest, source: str) -> tuple[Tensor, Tensor]:
    looked, waited, said = time.monotonic(), 0.0, False
    for _ in stop.checked(iter(lambda: bool(wait([future], POLL).done), True)):
        before, looked = looked, time.monotonic()
        waited += min(looked - before, LONGEST_LOOK)
        if waited > TOO_SLOW:
            raise UserError(
                f"no images came from {source} in {TOO_SLOW / 60:.0f} minutes: check that disk; the "
                "same command goes on from the last checkpoint."
            )
        if waited > SLOW and not said:
            said = True
            print(f"warning: no images have come from {source} for {SLOW:.0f} seconds: still waiting.", file=sys.stderr)
    return future.result()
