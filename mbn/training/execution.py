"""How a run executes: on which device, with how many threads and which arithmetic; eager, compiled, or captured."""

import functools
import logging
import os
import sys

import torch
from torch import Tensor, nn

from mbn.config import Config, cores, iterations
from mbn.system import cuda_graph
from mbn.system.errors import UserError, first_line
from mbn.system.processes import ALONE, Processes

# Multiplications and additions a second that eager training does on one thread of a CPU (measured, see
# results/benchmarks), and on another device that is not CUDA (a guess: unmeasured).
CPU_THREAD_RATE = 5e10
GPU_RATE = 1e13
# Seconds. Compiling takes one to two minutes on a CPU and saves a fifth of the time with MBN, less with BN: it pays for
# runs of more than about ten minutes, and the guess below is rough.
COMPILES_FROM = 900.0
# On an H100 compiling takes 44 to 84 seconds, and pays after 15,000 to 37,000 iterations (ResNet-20 and ResNet-56, BN
# and MBN, batch 8 and 128), sooner with a warm cache or with lanes.
COMPILES_FROM_ITERATIONS = 30_000

# How many threads torch chooses, before a run of this process sets another number.
TORCHS_THREADS = torch.get_num_threads()

GRAPHS = ("graph", "graph-eager")
COMPILED = ("compile", "graph")


def choose_device(wanted: str, earlier: str | None, processes: Processes = ALONE) -> torch.device:
    """The device that is asked for; for auto the one the run began on, else CUDA where there is one, else the CPU.

    Each of several processes gets the GPU of its number on its machine. Errors: UserError.
    """
    name = wanted
    if wanted == "auto":
        name = earlier or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = {"cpu": True, "cuda": int(number or 0) < gpus, "mps": torch.backends.mps.is_available()}
    if not available[kind]:
        began = "the run began on it, and " if wanted == "auto" else ""
        gpu = f"machine.device=cuda uses {'the GPU' if gpus == 1 else 'the first GPU'}, " if gpus else ""
        raise UserError(
            f"there is no {name} here: {began}{gpu}machine.device=cpu uses the CPU.",
            code=2 if processes.several else 1,
        )
    if processes.several and kind == "mps":
        raise UserError("machine.device=mps is for one process: leave torchrun out, or add machine.device=cpu.", code=2)
    if not processes.several or not name.startswith("cuda"):
        return torch.device(name)
    if ":" in wanted:
        raise UserError(f"machine.device={wanted} is one GPU, but several processes need one each: use cuda.", code=2)
    if processes.local_size > torch.cuda.device_count():
        raise UserError(
            f"{processes.local_size} processes need a GPU each, and there are {torch.cuda.device_count()} here: give "
            "torchrun as many with --nproc-per-node, or add machine.device=cpu.",
            code=2,
        )
    return torch.device("cuda", processes.local_rank)


def choose_threads(wanted: int | None, earlier: int | None, processes: Processes = ALONE) -> int:
    """CPU threads of this process: the number asked for, else the earlier one, which the run had with as many
    processes, else the smaller of torch's own choice (with torchrun 1, unless OMP_NUM_THREADS is set) and this
    process's part of `cores`.

    It affects the last bits.
    """
    return wanted or earlier or min(TORCHS_THREADS, processes.part_of(cores()))


def set_arithmetic(device: torch.device, tf32: bool, deterministic: bool) -> None:
    """Set torch, for the whole process, as machine.tf32 and machine.deterministic say."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Filling helps to find bugs, but costs a kernel launch for every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def choose_mode(
    wanted: str,
    earlier: str | None,
    config: Config,
    model: nn.Module,
    device: torch.device,
    threads: int,
    processes: Processes = ALONE,
    left: float = 1.0,
) -> str:
    """eager, compile, graph (compiled, then captured) or graph-eager (captured without a compiler).

    auto continues as the run began. A new run, and one that goes on on another kind of device, uses a graph on CUDA,
    and is compiled if the share of it that is left is long enough for that to pay. The choice depends on the
    configuration, that share, the device and the number of threads only, not on measured time, so the same command
    always makes the same choice. Several processes do not capture: auto is eager or compile for them.

    Errors: UserError where compile is asked for and there is no compiler, or a graph where there is no CUDA.
    """
    captures = cuda_graph.supported(device) and not processes.several
    if wanted in GRAPHS and processes.several:
        raise UserError(f"machine.mode={wanted} is for one process: leave machine.mode=auto.", code=2)
    if wanted in GRAPHS and not captures:
        raise UserError(f"machine.mode={wanted} needs a CUDA device, not {device.type}: leave machine.mode=auto.")
    mode = wanted
    if wanted == "auto" and earlier is not None and (captures or earlier not in GRAPHS):
        mode = earlier
    elif wanted == "auto":
        modes = ("graph-eager", "graph") if captures else ("eager", "compile")
        mode = modes[pays_to_compile(config, model, device, threads * processes.size, left)]
    if mode in GRAPHS:
        why = cuda_graph.fault(device)
        if why is not None:
            cuda_graph.warn(why)
            return "eager"
    if mode in COMPILED:
        why = compiler_fault(device)
        if why is not None and wanted == "compile":
            raise UserError(
                f"torch.compile does not work here ({why}): install a C++ compiler, or leave machine.mode=auto."
            )
        if why is not None:
            what = "training in eager mode" if mode == "compile" else "capturing without it"
            print(f"warning: torch.compile does not work here ({why}): {what}.", file=sys.stderr)
            return "eager" if mode == "compile" else "graph-eager"
    return mode


def pays_to_compile(config: Config, model: nn.Module, device: torch.device, threads: int, left: float) -> bool:
    if device.type == "cuda":
        return left * iterations(config) >= COMPILES_FROM_ITERATIONS
    return left * eager_seconds(config, model, device, threads) >= COMPILES_FROM


def eager_seconds(config: Config, model: nn.Module, device: torch.device, threads: int) -> float:
    """A rough guess at the seconds of training in eager mode, from the count of operations; model is on the CPU."""
    rate = CPU_THREAD_RATE * threads if device.type == "cpu" else GPU_RATE
    images = iterations(config) * config.batch_size
    # A backward pass does the work of two forward passes.
    return images * operations(model, config.dataset.image_size) * (2 + config.forwards) / rate


def operations(model: nn.Module, image_size: int) -> int:
    """Multiplications and additions of a model's convolutions and linear maps for one image; leaves it as it was.

    (torch's FlopCounterMode, and the meta device, count the same but take seconds to import.)
    """
    total = 0

    def add(layer: nn.Module, _: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        total += 2 * output.numel() * layer.get_parameter("weight")[0].numel()

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return total


@functools.cache
def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None: tried once in a process, on one small function."""
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_of_use)
    try:
        with cuda_graph.one_at_a_time:
            torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing or broken compiler can raise anything
        return first_line(error)
    return None


def _is_of_use(message: logging.LogRecord) -> bool:
    """Whether a message of torch's is to be shown; on a machine with nvcc and no GPU the compiler logs this one."""
    return not message.getMessage().startswith("No CUDA runtime is found")
