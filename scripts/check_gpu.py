#!/usr/bin/env python
"""Check a GPU before anything is trained on it: do layers and recorded iterations compute the right numbers, how fast?

python scripts/check_gpu.py                        # all steps, under three minutes, no data set
python scripts/check_gpu.py --steps layers,graph   # only these
python scripts/check_gpu.py --out check.json       # the numbers too, written again after every step

The last line is the mode and the number of lanes to train with. Exit code: 0 if every step is ok, 1 if one failed, 2
where there is no CUDA.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

import models
from mbn.benchmark.lanes import Lanes, warm_up
from mbn.benchmark.workload import Training
from mbn.layers import Layers, bn, brn, gn, mbn
from mbn.norm import functional
from mbn.norm.base import second_forward
from mbn.norm.batch import BatchNorm2d
from mbn.norm.memorized import MemorizedBatchNorm2d, set_lambda
from mbn.norm.renorm import BatchRenorm2d, set_renorm
from mbn.records import provenance
from mbn.system import cuda_graph
from mbn.system.command_line import entry_point
from mbn.system.cuda_graph import allow_many_streams, own_stream
from mbn.system.files import write_atomically
from mbn.training.execution import set_arithmetic

# A method's layers and its number of forwards.
METHODS: dict[str, tuple[Layers, int]] = {
    "BN-1": (bn(1), 1),
    "MBN-1": (mbn(1, 0.1), 1),
    "MBN-2": (mbn(2, 0.1), 2),
    "MBN-2, gradient batch": (mbn(2, 0.1, gradient="batch"), 2),
    "BRN-2": (brn(2), 2),
    "GN": (gn(1), 1),
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "MBN": MemorizedBatchNorm2d,
    "MBN, gradient batch": partial(MemorizedBatchNorm2d, gradient="batch"),
    "BRN": BatchRenorm2d,
    "BN": BatchNorm2d,
}
# Largest differences allowed, relative to a tensor's largest value.
FLOAT32, RECORDED, COMPILED = 1e-4, 1e-4, 1e-3
# And of single iterations, see `side_by_side`.
ONCE = 0.3
# Smaller values than this are compared as if they were as large: a zero has no relative error.
SMALLEST = 1e-4
# Lanes are enough when they do this share of the most iterations a second.
ENOUGH = 0.95
# Real iterations and one recorded, after which an Update only plays: what `warm_up` does.
START = cuda_graph.Recorded.AS_IT_IS + 1


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is run: networks by name (the first one for equalities), batch sizes, iterations, seconds."""

    networks: dict[str, Callable[[Layers], nn.Module]]
    batches: tuple[int, int] = (8, 128)  # small and large
    smaller: int = 5  # than the small one, as an epoch's last batch is
    image: int = 32
    plays: int = 100
    lanes: tuple[tuple[int, ...], tuple[int, ...]] = ((1, 4, 16), (1, 4))
    seconds: float = 0.7


FULL = Scale({name: partial(models.build, f"resnet_cifar.{name}", classes=10) for name in ("resnet20", "resnet56")})


class TimeUp(BaseException):
    """A step's time is over. Not an Exception, which a failed recording would be taken for."""


class Step:
    """What a step has found: rows, printed as they come."""

    def __init__(self, name: str, seconds: float = math.inf) -> None:
        self.name, self.seconds = name, seconds
        self.began = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.state = "ok"

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def note(self, what: str, ok: bool | None = None, **numbers: Any) -> None:
        """Add a row. ok: whether an equality holds, None for what is only measured."""
        self.rows.append({"what": what, "ok": ok, **numbers})
        if ok is False:
            self.state = "FAILED"
        print(f"  {self.name}: {shown(self.rows[-1])}", flush=True)


def shown(row: dict[str, Any]) -> str:
    numbers = {key: value for key, value in row.items() if key not in ("what", "ok")}
    parts = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()]
    verdict = {True: "ok", False: "FAILED", None: ""}[row["ok"]]
    return f"{row['what']}: {', '.join(filter(None, [verdict, *parts]))}"


# Trainings on random images.


def new_training(
    network: Callable[[Layers], nn.Module],
    method: str,
    mode: str,
    device: torch.device,
    batch: int | tuple[Tensor, Tensor],
    state: dict[str, Any] | None = None,
    precision: str = "fp32",
) -> Training:
    """A training of batches of that many images, or of one batch again and again. state: what `saved` has returned."""
    layers, forwards = METHODS[method]
    size, batches = (batch, iter(())) if isinstance(batch, int) else (len(batch[1]), repeat(batch))
    training = Training(partial(network, layers), forwards, mode, device, size, batches, precision)
    if state is not None:
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.optimizer.param_groups[0]["lr"] = training.lr
    return training


def saved(training: Training) -> dict[str, Any]:
    return copy.deepcopy({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()})


def train(training: Training, batches: list[tuple[Tensor, Tensor]], first: int = 0) -> None:
    """Iterations from number first on; learning rate, lambda and BRN's bounds are others at each."""
    for t, (images, labels) in enumerate(batches, first):
        training.lr.fill_([0.01, 0.02, 0.005][t % 3])
        set_lambda(training.model, [0.1, 0.5, 0.9][t % 3])
        set_renorm(training.model, 1 + t / 10, t / 5)
        training.update(images, labels)


def tensors(training: Training) -> dict[str, Tensor]:
    """Every parameter, buffer and momentum, themselves."""
    found = dict(training.model.state_dict())
    for name, parameter in training.model.named_parameters():
        if parameter in training.optimizer.state:
            found[f"momentum of {name}"] = training.optimizer.state[parameter]["momentum_buffer"]
    return found


def losses(training: Training) -> dict[str, Tensor]:
    """Losses and numbers of errors since the last call."""
    return {"losses and errors": torch.tensor(training.update.drain(), dtype=torch.float64)}


@torch.no_grad()
def take(training: Training, other: Training) -> None:
    """Go on from another one's state, every tensor staying where it is."""
    own = tensors(training)
    for name, value in tensors(other).items():
        own[name].copy_(value)


def random_batches(sizes: list[int], image: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 3, image, image, generator=generator).to(device, memory_format=torch.channels_last),
            torch.randint(0, 10, (n,), generator=generator).to(device),
        )
        for n in sizes
    ]


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference of two tensors, relative to the second's largest value, and their name."""
    assert found.keys() == wanted.keys()
    worst, where = 0.0, "none"
    for name, value in wanted.items():
        a, b = found[name].detach().double().cpu(), value.detach().double().cpu()
        distance = ((a - b).abs().max() / b.abs().max().clamp(min=SMALLEST)).item() if b.numel() else 0.0
        distance = math.inf if math.isnan(distance) else distance
        if distance > worst:
            worst, where = distance, name
    return worst, where


def side_by_side(one: Training, other: Training, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Train both, and compare every tensor after each iteration, which always begins from one state for both.

    typical: the difference that 40 % of the played iterations stay below, the larger one of two sizes of batch.
    largest, at: the largest of all, and where. bits: whether there is none. Why not the largest: where rounding moves
    the input of a ReLU across 0, gradients change by a hundredth, in a third of ResNet-20's iterations at batch 8; and
    without one state to begin from that is a tenth after six iterations. A learning rate or lambda that was recorded,
    of three that take turns, is wrong in two thirds.
    """
    worst, bits = (0.0, "none"), True
    found: dict[int, list[float]] = {}
    for t, batch in enumerate(batches):
        for training in (one, other):
            train(training, [batch], first=t)
        results = tensors(one), tensors(other)
        apart = difference(*results)
        found.setdefault(len(batch[1]), []).append(apart[0])
        worst = max(worst, apart)
        if not same_bits(*results):
            bits = False
            take(one, other)
    results = losses(one), losses(other)
    of_losses = difference(*results)
    worst, bits = max(worst, of_losses), bits and same_bits(*results)
    played = [sorted(each[START - 1 :]) for each in found.values()]
    typical = max(of_losses[0], *(each[2 * len(each) // 5] for each in played))
    return {"typical": typical, "largest": worst[0], "at": worst[1], "bits": bits}


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


# The steps.


def check_layers(step: Step, device: torch.device, scale: Scale, iterations: int = 6) -> None:
    """Layers in float32 on the device against the same ones in float64 on the CPU; mixed precision stays finite."""
    set_arithmetic(device, tf32=False, deterministic=True)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for name in LAYERS:
        for kernels in ("kernels", "formula"):
            worst, where = 0.0, "none"
            for forwards in (1, 2):
                for memory_format in formats.values():
                    for found, wanted in layer_results(
                        LAYERS[name], forwards, kernels == "formula", memory_format, device, iterations
                    ):
                        worst, where = max((worst, where), difference(found, wanted))
            step.note(f"{name}, {kernels}", worst <= FLOAT32, difference=worst, at=where)
    network, batch = next(iter(scale.networks.values())), scale.batches[0]
    for mode in ("eager", "graph-eager"):
        training = new_training(network, "MBN-2", mode, device, batch, precision="bf16")
        train(training, random_batches([batch] * (START + 2), scale.image, device))
        finite = all(bool(value.isfinite().all()) for value in (tensors(training) | losses(training)).values())
        step.note(f"bf16 stays finite, {mode}", finite and training.in_mode)


def layer_results(
    make: Callable[..., nn.Module],
    forwards: int,
    formula: bool,
    memory_format: torch.memory_format,
    device: torch.device,
    iterations: int,
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What one layer on the device, and its twin in float64 on the CPU, come to at each iteration."""
    torch.manual_seed(0)
    twin = make(8, forwards=forwards).double()
    layer = copy.deepcopy(twin).float().to(device)
    for t in range(iterations):
        shape = (8 - t % 2, 8, 5, 5)
        x = (torch.randn(shape) * (1 + t / 10) + torch.linspace(-2, 2, 8).view(1, 8, 1, 1) + t / 5).contiguous(
            memory_format=memory_format
        )
        dy, weight, bias = torch.randn(shape), torch.randn(8) + 1.5, torch.randn(8)
        results = []
        for module, dtype, place in ((layer, torch.float32, device), (twin, torch.float64, torch.device("cpu"))):
            set_lambda(module, [0.1, 0.5, 0.9][t % 3])
            set_renorm(module, 1 + t / 5, t / 5)
            with torch.no_grad():
                module.get_parameter("weight").copy_(weight)
                module.get_parameter("bias").copy_(bias)
            given = x.to(place, dtype).requires_grad_()
            own = (lambda _: False) if formula and module is layer else functional.has_native_kernels
            with mock.patch.object(functional, "has_native_kernels", own):
                y = module(given)
                leaves = [given, module.get_parameter("weight"), module.get_parameter("bias")]
                gradients = torch.autograd.grad(y, leaves, dy.to(place, dtype))
                again = second_forward(module, given.detach()) if forwards == 2 else y
            names = ("output", "gradient of the input", "gradient of weight", "gradient of bias", "second output")
            result = dict(zip(names, (y, *gradients, again), strict=True)) | module.state_dict()
            results.append({key: value.detach().clone() for key, value in result.items()})
        yield results[0], results[1]


def check_graph(step: Step, device: torch.device, scale: Scale) -> None:
    """Recorded iterations against eager ones from the same state: six played of each of two sizes of batch."""
    set_arithmetic(device, tf32=False, deterministic=True)
    name, network = next(iter(scale.networks.items()))
    batch = scale.batches[0]
    batches = random_batches([batch, scale.smaller] * (START + 5), scale.image, device)
    for method in METHODS:
        eager = new_training(network, method, "eager", device, batch)
        played = new_training(network, method, "graph-eager", device, batch, saved(eager))
        found = side_by_side(played, eager, batches)
        ok = found["typical"] <= RECORDED and found["largest"] <= ONCE and played.in_mode
        step.note(f"{name}, {method}", ok, recorded=played.in_mode, **found)


def check_deterministic(step: Step, device: torch.device, scale: Scale) -> None:
    """The same bits twice, and where a run goes on from a saved state."""
    set_arithmetic(device, tf32=False, deterministic=True)
    name, network = next(iter(scale.networks.items()))
    batch, half = scale.batches[0], START + 2
    batches = random_batches([batch] * 2 * half, scale.image, device)
    for method in ("BN-1", "MBN-2"):
        for mode in ("eager", "graph-eager"):
            ends = []
            for stops in (False, False, True):
                training = new_training(network, method, mode, device, batch)
                train(training, batches[:half])
                training.update.drain()
                if stops:
                    training = new_training(network, method, mode, device, batch, saved(training))
                train(training, batches[half:], first=half)
                ends.append(copy.deepcopy(tensors(training)) | losses(training))
            step.note(f"{name}, {method}, {mode}, twice", same_bits(ends[1], ends[0]) and training.in_mode)
            step.note(f"{name}, {method}, {mode}, resumed", same_bits(ends[2], ends[0]) and training.in_mode)


def milliseconds(training: Training, iterations: int) -> float:
    """An iteration's, once everything is compiled or recorded."""
    warm_up(training)
    return 1e3 * training.seconds(iterations)


def measure_speed(step: Step, device: torch.device, scale: Scale) -> None:
    """Milliseconds an iteration, with the settings that runs have."""
    set_arithmetic(device, tf32=True, deterministic=False)
    for name, network in scale.networks.items():
        for batch in scale.batches:
            given = random_batches([batch], scale.image, device)[0]
            for method in ("BN-1", "MBN-2"):
                for mode in ("graph-eager", "eager"):
                    if step.left() < 2:
                        step.note(f"{name}, {method}, batch {batch}, {mode}: no time left")
                        continue
                    training = new_training(network, method, mode, device, given)
                    ms = milliseconds(training, scale.plays if mode == "graph-eager" else scale.plays // 2)
                    step.note(f"{name}, {method}, batch {batch}, {mode}", None if training.in_mode else False, ms=ms)


def check_compiled(step: Step, device: torch.device, scale: Scale) -> None:
    """Compiled, then recorded: equal to eager, seconds to start, and milliseconds beside those without a compiler."""
    set_arithmetic(device, tf32=False, deterministic=True)
    name, network = next(iter(scale.networks.items()))
    batch = scale.batches[0]
    batches = random_batches([batch] * (START + 14), scale.image, device)
    eager = new_training(network, "MBN-2", "eager", device, batches[0])
    began = time.perf_counter()
    compiled = new_training(network, "MBN-2", "graph", device, batches[0], saved(eager))
    train(compiled, batches[:START])
    compiled.wait()
    seconds = time.perf_counter() - began
    train(eager, batches[:START])
    eager.update.drain()
    take(compiled, eager)
    compiled.update.drain()
    found = side_by_side(compiled, eager, batches)
    ok = found["typical"] <= COMPILED and found["largest"] <= ONCE and compiled.in_mode
    step.note(f"{name}, MBN-2", ok, recorded=compiled.in_mode, **found)
    without = milliseconds(new_training(network, "MBN-2", "graph-eager", device, batches[0]), scale.plays)
    ms = milliseconds(compiled, scale.plays)
    step.note(f"{name}, MBN-2, batch {batch}", start_seconds=seconds, ms=ms, ms_without=without)


def measure_lanes(step: Step, device: torch.device, scale: Scale) -> None:
    """Iterations a second of several recorded trainings at once, each in a thread and a stream of its own."""
    set_arithmetic(device, tf32=True, deterministic=False)
    for batch, numbers in zip(scale.batches, scale.lanes, strict=True):
        given = random_batches([batch], scale.image, device)[0]
        for name, network in scale.networks.items():
            make = partial(new_training, network, "MBN-2", "graph-eager", device, given)
            about = {"network": name, "batch": batch}
            lanes_rates(step, device, make, about, numbers, scale.seconds)


def lanes_rates(
    step: Step,
    device: torch.device,
    make: Callable[[], Training],
    about: dict[str, Any],
    numbers: tuple[int, ...],
    seconds: float,
) -> None:
    """Note the rates of more and more lanes (numbers ascend), for as long as there is time."""
    name = "{network}, MBN-2, batch {batch}".format(**about)
    with Lanes(lambda _: make(), device) as lanes:
        for n in numbers:
            before = step.left()
            while len(lanes.lanes) < n:
                lanes.add()
            rate = lanes.rate(seconds)
            recorded = all(lane.work.in_mode for lane in lanes.lanes)
            step.note(f"{name}, {n} at once", None if recorded else False, **about, lanes=n, rate=rate)
            if step.left() < 2 * (before - step.left()) + 1:  # the next number takes about twice as long
                step.note(f"{name}: no time left for more than {n}")
                break


def look_for_mps(step: Step, device: torch.device, scale: Scale) -> None:
    """Whether NVIDIA's server for processes side by side is installed; it is not started."""
    name = "nvidia-cuda-mps-control"
    usual = Path("/usr/local/nvidia/bin") / name
    step.note(name, found=shutil.which(name) or (str(usual) if usual.exists() else "no"))


# Each step with the most seconds that it may take.
STEPS: dict[str, tuple[Callable[[Step, torch.device, Scale], None], float]] = {
    "layers": (check_layers, 25),
    "graph": (check_graph, 30),
    "deterministic": (check_deterministic, 20),
    "speed": (measure_speed, 35),
    "lanes": (measure_lanes, 45),
    "mps": (look_for_mps, 5),
    "compiled": (check_compiled, 60),  # the last one: how long compiling takes nobody knows
}


# What follows from them.


def advice(steps: dict[str, Step], batches: tuple[int, int]) -> dict[str, Any]:
    """The mode, and the number of lanes for the small and for the large batch, with reasons where it is not the best.

    eager if an equality does not hold or was not checked; graph only where it is the faster one too.
    """
    wrong = [name for name in ("layers", "graph", "deterministic") if name not in steps or steps[name].state != "ok"]
    if wrong:
        return {"mode": "eager", "lanes": [1, 1], "why": f"not shown to be right: {', '.join(wrong)}"}
    mode, why = "graph-eager", "compiled: not checked, or failed"
    if "compiled" in steps and steps["compiled"].state == "ok":
        ms, without = next((row["ms"], row["ms_without"]) for row in steps["compiled"].rows if "ms" in row)
        mode = "graph" if ms < without else "graph-eager"
        why = f"{ms:.3g} ms an iteration compiled, {without:.3g} ms without"
    rows = [row for row in steps["lanes"].rows if "rate" in row] if "lanes" in steps else []
    return {"mode": mode, "lanes": [lanes_for(batch, rows) for batch in batches], "why": why}


def lanes_for(batch: int, rows: list[dict[str, Any]]) -> int:
    """The fewest lanes that do nearly the most iterations a second; of several networks, the largest such number."""
    numbers = [1]
    for network in {row["network"] for row in rows}:
        rates = {row["lanes"]: row["rate"] for row in rows if (row["network"], row["batch"]) == (network, batch)}
        numbers += [min(n for n in rates if rates[n] >= ENOUGH * max(rates.values()))] if rates else []
    return max(numbers)


def table(steps: dict[str, Step]) -> str:
    rows = [("step", "result", "seconds"), ("---", "---", "---")]
    for name, step in steps.items():
        rows.append((f"**{name}**", step.state, f"{step.seconds:.1f}"))
        rows += [("", shown(row), "") for row in step.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeUp inside after so many seconds. Only in the main thread, and not while CUDA itself hangs."""

    def ring(number: int, frame: Any) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    began, rest = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if rest[0]:  # somebody else's, as a test's
            signal.setitimer(signal.ITIMER_REAL, max(rest[0] - (time.monotonic() - began), 0.01), rest[1])


def run_step(name: str, seconds: float, device: torch.device, scale: Scale) -> Step:
    """Run a step within its time; whatever goes wrong is in its state."""
    step = Step(name, seconds)
    try:
        with at_most(seconds), own_stream(device):
            STEPS[name][0](step, device, scale)
    except TimeUp:
        step.note(f"not finished in {seconds:.0f} s", ok=False)
    except Exception as error:
        traceback.print_exc()
        step.note(cuda_graph.first_line(error), ok=False)
    gc.collect()  # recordings hold memory, and are part of reference cycles
    step.seconds = time.monotonic() - step.began
    print(f"{name}: {step.state} in {step.seconds:.1f} s", flush=True)
    return step


@entry_point
def main(arguments: list[str], scale: Scale = FULL) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; default: cuda")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers, written again after every step")
    parser.add_argument("--limit", type=float, default=165, help="seconds for everything; default: 165")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"which of {', '.join(STEPS)}; default: all")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.steps.split(",") if name]
    if unknown := [name for name in chosen if name not in STEPS]:
        parser.error(f"there is no step {unknown[0]}: there are {', '.join(STEPS)}")
    # cuBLAS reads it when it is first used; without it torch refuses deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    allow_many_streams()
    torch.set_num_threads(1)  # what is left to the CPU here is small
    device = torch.device(options.device)
    if not cuda_graph.supported(device) or (device.type == "cuda" and not torch.cuda.is_available()):
        print(f"error: this checks a CUDA device, and {options.device} is none or not there.", file=sys.stderr)
        return 2
    began = time.monotonic()
    about = {"device": provenance.device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(", ".join(str(value) for value in about.values()), flush=True)
    steps: dict[str, Step] = {}
    for name in chosen:
        left = options.limit - (time.monotonic() - began)
        steps[name] = run_step(name, min(STEPS[name][1], left), device, scale)
        use = advice(steps, scale.batches)
        if options.out is not None:
            found = {name: {"state": s.state, "seconds": s.seconds, "rows": s.rows} for name, s in steps.items()}
            write_atomically(options.out, (json.dumps(about | {"steps": found, "advice": use}, indent=1)).encode())
    small, large = scale.batches
    print(f"\n{table(steps)}\n\n{use['why']}")
    print(
        f"use: machine.mode={use['mode']} ; reproduce.py --jobs {use['lanes'][0]} for batch {small}, "
        f"{use['lanes'][1]} for batch {large}",
        flush=True,
    )
    return 0 if all(step.state == "ok" for step in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
