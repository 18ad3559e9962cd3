"""CUDA graphs: a function of tensors is captured, then replayed with one launch instead of hundreds."""

import contextlib
import contextvars
import functools
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from mbn.system.errors import UserError, first_line

T = TypeVar("T")
# Held while capturing a graph or compiling a function: only one of a process's threads may do so at a time.
one_at_a_time = threading.RLock()
# The thread that does what is not replayed, for all runs of the process.
_shared: ThreadPoolExecutor | None = None


@contextlib.contextmanager
def shared_thread() -> Iterator[None]:
    """Inside, `uncaptured` work is done in one thread, whichever thread asks for it."""
    global _shared
    with _trials_keep_memory(), ThreadPoolExecutor(1, "uncaptured") as _shared:
        try:
            yield
        finally:
            _shared = None


@contextlib.contextmanager
def _trials_keep_memory() -> Iterator[None]:
    """Inside, cuDNN does not give all unused memory back after it has tried algorithms (see `capture`)."""
    if not torch.backends.cudnn.is_available():
        yield
        return
    before = torch._C._cuda_get_conv_benchmark_empty_cache()
    torch._C._cudnn_set_conv_benchmark_empty_cache(False)
    try:
        yield
    finally:
        torch._C._cudnn_set_conv_benchmark_empty_cache(before)


@contextlib.contextmanager
def without_trials() -> Iterator[None]:
    """Inside, if that is inside `shared_thread`, cuDNN tries no algorithms: for `uncaptured` work of few convolutions.

    A trial waits until other runs have done all that they have queued.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before and _shared is None
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def uncaptured(work: Callable[[], T], device: torch.device) -> T:
    """Do work on the device that is not replayed from a graph, while nothing is captured. Returns its result.

    A thread that does a convolution of a new shape lets cuDNN try algorithms, and cuDNN waits for the whole device.
    That spoils what another thread captures, and takes long while other threads keep the device busy. cuDNN keeps its
    choices for each thread. So inside `shared_thread` one thread does such work for all: it chooses once.

    The work finds the CUDA stream, the autograd mode, the autocast and the context variables of the thread that asks.
    On a device that cannot capture it is just done.
    """
    if not supported(device):
        return work()
    if _shared is None:
        with one_at_a_time:
            return work()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    gradients, kind = torch.is_grad_enabled(), device.type
    dtype, casts = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def in_shared_thread() -> T:
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_at_a_time)
            stack.enter_context(torch.cuda.stream(stream))
            stack.enter_context(torch.set_grad_enabled(gradients))
            if casts:  # around work with an autocast of its own it would keep cast weights over the optimiser's step
                stack.enter_context(torch.autocast(kind, dtype))
            return work()

    return _shared.submit(contextvars.copy_context().run, in_shared_thread).result()


def capture(function: Callable[[], object]) -> Callable[[], None]:
    """Capture what function does on the GPU as a CUDA graph, without doing it. Each call of the result does it.

    Must be called inside `own_stream`. Errors: whatever CUDA or torch raise.
    """
    graph = torch.cuda.CUDAGraph()
    free, total = torch.cuda.mem_get_info()
    if _shared is None or free < total / 2:
        # As torch.cuda.graph always does. Beside other runs it takes long, because each block of memory that is given
        # back waits for all that they have queued: eight lanes on an H200 took 95 s to begin.
        torch.cuda.empty_cache()
    collects = gc.isenabled()
    gc.disable()  # freeing any thread's GPU memory would spoil the capture
    try:
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may use the GPU meanwhile
        try:
            function()
        except BaseException:
            with contextlib.suppress(Exception):  # it fails too, and would hide why
                graph.capture_end()
            raise
        graph.capture_end()
    finally:
        if collects:
            gc.enable()
    return graph.replay


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Inside, everything is done on a CUDA stream of this thread's own; only such a stream can be captured."""
    if device.type != "cuda":
        yield
        return
    stream = _free_stream(device)
    try:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
    finally:  # also after an error: tensors from outside may be freed there while this stream still uses them
        torch.cuda.current_stream(device).wait_stream(stream)
        _streams.remove(stream.cuda_stream)


# Handles of the streams in use. torch has 32 streams and gives them out in turn, even those still in use.
_streams: set[int] = set()
STREAMS = 32


def allow_many_streams() -> None:
    """Let all STREAMS reach a GPU at a time, unless the environment sets another number. Call before CUDA is used."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(STREAMS))


def _free_stream(device: torch.device) -> "torch.cuda.Stream":
    with one_at_a_time:
        for _ in range(STREAMS):
            stream = torch.cuda.Stream(device)
            if stream.cuda_stream not in _streams:
                _streams.add(stream.cuda_stream)
                return stream
    raise UserError(f"a process trains at most {STREAMS} runs at a time: lower --jobs or machine.together.")


class Captured:
    """A function of tensors that is captured at its fourth call, and replayed from then on.

    Its arguments are copied into tensors that stay in place. The first three calls are not captured: they choose
    kernels, compile, and create tensors that stay (momentum). function may read and write only its arguments and
    tensors that stay where they are, and may depend on nothing else that changes; its result is not kept.

    failed: called once, with the error, if the function cannot be captured; then it runs without a graph.
    """

    AS_IT_IS = 3

    def __init__(self, function: Callable[..., None], failed: Callable[[Exception], None]) -> None:
        self.function, self.failed = function, failed
        self.calls = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], None] | None = None

    def __call__(self, *tensors: Tensor) -> None:
        if not self.inputs:
            self.inputs = tuple(torch.empty_like(t) for t in tensors)
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        if self.replay is not None:
            self.replay()
            return
        self.calls += 1
        if self.calls > self.AS_IT_IS:
            try:
                self.replay = uncaptured(lambda: capture(self._call), self.inputs[0].device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # torch has no exception type for what cannot be captured
                self.failed(error)
                self.replay = self._call_uncaptured
            self.replay()
        else:
            self._call_uncaptured()

    def _call(self) -> None:
        self.function(*self.inputs)

    def _call_uncaptured(self) -> None:
        uncaptured(self._call, self.inputs[0].device)


def supported(device: torch.device) -> bool:
    """Whether the device can capture: only CUDA can."""
    return device.type == "cuda"


@functools.cache
def fault(device: torch.device) -> str | None:
    """Why nothing can be captured here, or None: tried once in a process, on one small function."""
    x = torch.zeros(8, device=device)
    try:
        with one_at_a_time, own_stream(device):
            x.add_(1)
            replay = capture(lambda: x.add_(1))
            replay()
            assert x.sum().item() == 16
    except Exception as error:
        return first_line(error)
    return None


def warn(why: str, what: str = "iterations", instead: str = "training in eager mode") -> None:
    print(f"warning: {what} cannot be captured here ({why}): {instead}.", file=sys.stderr)
