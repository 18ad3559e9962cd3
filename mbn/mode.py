"""How a run executes: in eager mode, or compiled where that pays."""

import sys

import torch
from torch import Tensor, nn

from .config import Config, iterations
from .errors import UserError

# Multiplications and additions a second that eager training does on one thread of a CPU (measured, see
# results/benchmarks), and on a GPU (a guess: unmeasured).
CPU_THREAD_RATE = 5e10
GPU_RATE = 1e13
# Compiling takes one to two minutes and saves a fifth of the time with MBN, less with BN: it pays after some ten.
COMPILES_FROM = 900.0


def choose_mode(
    wanted: str, earlier: str | None, config: Config, model: nn.Module, device: torch.device, threads: int
) -> str:
    """eager or compile. For auto as the run began; else compile where the whole run is long enough to repay it.

    The choice is a function of the configuration, the device and the number of threads, and of no clock, so that the
    same command does the same again. Errors: UserError where compile is asked for and there is no compiler.
    """
    if wanted == "eager" or (wanted == "auto" and earlier == "eager"):
        return "eager"
    if wanted == "auto" and earlier is None and seconds_expected(config, model, device, threads) < COMPILES_FROM:
        return "eager"
    fault = compiler_fault(device)
    if fault is None:
        return "compile"
    if wanted == "compile":
        raise UserError(
            f"torch.compile does not work here ({fault}): install a C++ compiler, or leave machine.mode=auto."
        )
    print(f"warning: torch.compile does not work here ({fault}): training in eager mode.", file=sys.stderr)
    return "eager"


def seconds_expected(config: Config, model: nn.Module, device: torch.device, threads: int) -> float:
    """A rough guess at a run's seconds in eager mode, from its count of operations; model is still on the CPU."""
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


def compiler_fault(device: torch.device) -> str | None:
    """Why torch.compile cannot work here, or None: tried on one small function."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever a missing or broken tool chain raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
    return None
