"""The benchmark on a GPU: iterations played back from recordings, many networks at once, and ImageNet's loader.

Cases run one after the other, the most important first, each with its own limit in seconds. What does not fit, or
fails, is named with its reason, and the rest goes on. The clock is read between iterations: nothing is interrupted.
"""

import contextlib
import datetime
import fnmatch
import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from mbn import config as configuration
from mbn.benchmark import cpu
from mbn.benchmark.cpu import Result
from mbn.benchmark.kernels import Kernels, kernels
from mbn.benchmark.lanes import Lanes, warm_up
from mbn.benchmark.workload import BASE, PLAIN, WORKERS, Arm, Build, Case, Workload, prepare, settings
from mbn.data import datasets, in_memory
from mbn.data.image_folder import ImageFolders
from mbn.records import provenance
from mbn.system.cuda_graph import first_line, own_stream
from mbn.system.errors import UserError
from mbn.system.files import write_atomically
from mbn.training.execution import GRAPHS, set_arithmetic

COMPARED = (("bn", 1), ("mbn", 1), ("mbn", 2), ("gn", 1))
PAIR = (("bn", 1), ("mbn", 2))
# What ratios are to: BN, recorded without a compiler.
RECORDED = Arm("bn", mode="graph-eager")
NO_TIME = "skipped: no time left"


@dataclass(frozen=True)
class Sizes:
    """How much is measured. As they stand, all of it takes at most five minutes with a warm Inductor cache."""

    models: tuple[str, ...] = ("resnet20", "resnet56")
    batches: tuple[int, ...] = (8, 128)
    images: int = 390 * 128  # whole batches: a smaller one at an epoch's end would be recorded on its own
    rounds: int = 6
    round_seconds: float = 0.12  # of each arm
    lanes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {8: (1, 2, 4, 8, 16, 32), 128: (1, 2, 4, 8)})
    compiled_lanes: dict[int, tuple[int, ...]] = field(default_factory=lambda: {8: (1, 2, 4, 8, 16), 128: (1, 2, 4)})
    lane_seconds: float = 0.8
    profile_seconds: float = 0.05
    profile_lanes: int = 8
    compiling: float = 20.0  # with less time left than this no compiling begins
    workers: int = 16
    pictures: int = 512
    large_batch: int = 128  # ResNet-50's
    loader_seconds: float = 5.0


def left(deadline: float) -> float:
    """Seconds until an instant of the monotonic clock; below 0 when it is over."""
    return deadline - time.monotonic()


@dataclass
class Place:
    """Where and on what is measured; arrays: the random images that stand in for CIFAR-10, where they do."""

    folder: Path
    device: torch.device
    build: Build
    dataset: in_memory.DeviceDataset
    arrays: in_memory.Arrays | None
    sizes: Sizes


# Arms side by side.


@dataclass
class Timed(Result):
    """A case's arms: also bytes that each takes at its peak, and what is missing, with the reason."""

    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Milliseconds an iteration: medians over rounds."""
        found = [f"{name} {1e3 * statistics.median(seconds):.2f}" for name, seconds in self.seconds.items()]
        return "ms: " + "; ".join(found)


def timed(case: Case, chosen: list[Arm], place: Place, deadline: float, dataset: in_memory.Data | None = None) -> Timed:
    """Time every arm in every round, one after the other, for as long as the clock allows.

    A round that is broken off does not count. dataset: in the place of CIFAR-10.
    """
    result = Timed(case)
    with own_stream(place.device):  # not for the whole run: 32 lanes need all the streams that torch has
        _time(result, chosen, place, deadline, dataset or place.dataset)
    return result


def _time(result: Timed, chosen: list[Arm], place: Place, deadline: float, dataset: in_memory.Data) -> None:
    ready: dict[Arm, tuple[Workload, int]] = {}
    for arm in chosen:
        if left(deadline) <= (place.sizes.compiling if arm.mode == "graph" else 0):
            result.missing[arm.name] = NO_TIME
            continue
        with _noted(result.missing, arm.name):
            ready[arm] = _start(result, arm, place, dataset)
        if arm.name in result.missing:
            _free(place.device)
    done = 0
    while done < place.sizes.rounds and ready:
        took: dict[str, float] = {}
        for arm, (work, iterations) in list(ready.items()):
            if left(deadline) <= 0:
                break
            with _noted(result.missing, arm.name):
                took[arm.name] = work.seconds(iterations)
                if arm == PLAIN:
                    time.sleep(place.sizes.round_seconds)  # its workers fill their queues, at nobody else's cost
            if arm.name in result.missing:
                del ready[arm], work
                result.seconds.pop(arm.name, None)
                _free(place.device)
        else:
            for name, seconds in took.items():
                result.seconds.setdefault(name, []).append(seconds)
            done += 1
            continue
        break
    if ready and done < place.sizes.rounds:
        result.missing[f"rounds from {done + 1} to {place.sizes.rounds}"] = NO_TIME


def _start(result: Timed, arm: Arm, place: Place, dataset: in_memory.Data) -> tuple[Workload, int]:
    """An arm made ready and its number of iterations a round; its seconds to start and its memory go into result."""
    began = time.perf_counter()
    _new_peak(place.device)
    before = _memory(place.device)
    work = prepare(result.case, arm, dataset, place.folder, place.device, place.build, place.arrays)
    # Peak memory is the fourth iteration's: the first ones try convolutions out, which takes more.
    warm_up(work, lambda: _new_peak(place.device))
    check_mode(work)
    if before:
        result.memory[arm.name] = {key: n - before[key] for key, n in _memory(place.device, "max_{}").items()}
    result.starts[arm.name] = time.perf_counter() - began
    return work, min(200, max(3, round(place.sizes.round_seconds / work.seconds(3))))


def check_mode(work: Workload) -> None:
    """Errors: RuntimeError where iterations were to be recorded and are not."""
    if not work.in_mode:
        raise RuntimeError("iterations cannot be recorded")


@contextlib.contextmanager
def _noted(missing: dict[str, str], name: str) -> Iterator[None]:
    """Put whatever fails inside (memory, a compiler, a driver) into missing under name, and go on."""
    try:
        yield
    except Exception as error:
        missing[name] = f"failed: {first_line(error)}"


def _free(device: torch.device) -> None:
    """Give unused memory back; after an error nothing may refer to that error any more."""
    gc.collect()
    _new_peak(device)


def _new_peak(device: torch.device) -> None:
    """Let the peaks of memory begin again from what is in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device, of: str = "{}") -> dict[str, int]:
    """Bytes in tensors, and bytes taken from the GPU for them and for recordings; nothing on a CPU. of: "max_{}"."""
    if device.type != "cuda":
        return {}
    kinds = ("allocated", "reserved")
    return {kind: getattr(torch.cuda, of.format(f"memory_{kind}"))(device) for kind in kinds}


# Many networks at once.


def lanes_of(case: Case, arm: Arm, place: Place) -> Lanes:
    """Lanes of one case and arm; the images are shared, and each lane draws from them with a seed of its own."""
    return Lanes(
        lambda i: prepare(case, arm, place.dataset.with_seed(i), place.folder, place.device, place.build), place.device
    )


@dataclass
class Many:
    """Iterations a second by the number of lanes, and what is missing, with the reason."""

    case: Case
    arm: Arm
    rates: dict[int, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.arm.name}, iterations/s: " + "; ".join(f"{n} lanes {r:.0f}" for n, r in self.rates.items())


def many(case: Case, arm: Arm, numbers: tuple[int, ...], place: Place, deadline: float) -> Many:
    """Measure more and more lanes (numbers ascend), for as long as the clock allows."""
    result, sizes = Many(case, arm), place.sizes
    with _noted(result.missing, "more lanes"), lanes_of(case, arm, place) as lanes:
        for n in numbers:
            while len(lanes.lanes) < n:
                compiles = arm.mode == "graph" and not lanes.lanes  # the first one, for all
                if left(deadline) <= (sizes.compiling if compiles else sizes.lane_seconds):
                    break
                check_mode(lanes.add())
            if len(lanes.lanes) < n or left(deadline) <= 0:
                result.missing[f"{n} lanes and more"] = NO_TIME
                break
            result.rates[n] = lanes.rate(sizes.lane_seconds)
    return result


# Where the time goes.


@dataclass
class Profiled:
    """Kernels of a case's iterations, of several lanes together; or what is missing, with the reason."""

    case: Case
    arm: Arm
    lanes: int
    iterations: int = 0
    kernels: Kernels | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        if self.kernels is None:
            return "not measured"
        found, n = self.kernels, max(1, self.iterations)
        return (
            f"{self.arm.name}, lanes {self.lanes}: {1e3 * found.span / n:.3f} ms an iteration, of which "
            f"{1e3 * found.busy / n:.3f} ms with a kernel running; {found.number / n:.0f} kernels, "
            f"{1e3 * found.total / n:.3f} ms added up"
        )

    def rows(self, most: int = 15) -> list[str]:
        """A table of the kernels that take most time."""
        if self.kernels is None:
            return []
        lines = ["| kernel | an iteration | us each | us an iteration |", "|---|---|---|---|"]
        for name in self.kernels.longest(most):
            number, seconds = self.kernels.by_name[name]
            n = max(1, self.iterations)
            short = name.replace("|", "/")[:100]
            lines.append(f"| {short} | {number / n:.1f} | {1e6 * seconds / number:.1f} | {1e6 * seconds / n:.0f} |")
        return lines


def profiled(case: Case, arm: Arm, n: int, place: Place, deadline: float) -> Profiled:
    """Profile n lanes for a moment, once they are recorded."""
    result = Profiled(case, arm, n)
    with _noted(result.missing, "profile"), lanes_of(case, arm, place) as lanes:
        while len(lanes.lanes) < n:
            if left(deadline) <= (0 if lanes.lanes else place.sizes.compiling):
                result.missing["profile"] = NO_TIME
                return result
            check_mode(lanes.add())
        counts: list[int] = []
        result.kernels = kernels(lambda: counts.append(lanes.count(place.sizes.profile_seconds)), place.device)
        result.iterations = counts[0]
    return result


# ImageNet's loader.


@dataclass
class Loaded:
    """Images a second that the loader delivers, or what is missing, with the reason."""

    workers: int
    rate: float | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        shown = "not measured" if self.rate is None else f"{self.rate:.0f}"
        return f"images/s with {self.workers} workers: {shown}"


def loader(place: Place, deadline: float) -> Loaded:
    """Decode pictures made here as in training, nobody else using the GPU or the CPUs; one takes them and waits."""
    sizes = place.sizes
    result = Loaded(sizes.workers)
    with tempfile.TemporaryDirectory() as name:
        make_pictures(Path(name), sizes.pictures)
        case = Case("resnet50", sizes.large_batch, configuration.cores(), "imagenet")
        imagenet = settings(case, BASE, place.folder).dataset
        dataset = replace(imagenet, classes=2, train_images=sizes.pictures, test_images=2)
        folders = ImageFolders(dataset, Path(name), 0, place.device, sizes.workers)
        batches = folders.train_batches(0, sizes.large_batch)
        with contextlib.closing(batches):  # type: ignore[type-var]
            for _ in range(2 * sizes.workers):  # what workers have ready by the time of the first must not count
                next(batches)
                if left(deadline) <= 0:
                    result.missing["loader"] = NO_TIME
                    return result
            start, images = time.perf_counter(), 0
            while images == 0 or (time.perf_counter() < start + sizes.loader_seconds and left(deadline) > 0):
                images += len(next(batches)[1])
            result.rate = images / (time.perf_counter() - start)
    return result


def large(place: Place, deadline: float) -> Timed:
    """ResNet-50 on random images that are on the device: how many a second a loader must deliver."""
    case = Case("resnet50", place.sizes.large_batch, configuration.cores(), "imagenet")
    config = settings(case, BASE, place.folder).dataset
    images = random_arrays(2 * case.batch_size, config.image_size, config.classes)
    arms = [Arm(norm, forwards, "graph-eager", precision="bf16") for norm, forwards in PAIR]
    return timed(case, arms, place, deadline, in_memory.DeviceDataset(images, config, 0, place.device))


def make_pictures(root: Path, n: int) -> None:
    """n JPEGs of 500 x 375 pixels and about 110 kB, as ImageNet's mostly are, in ImageNet's folders; 64 differ."""
    draws = np.random.default_rng(0)
    encoded = root / "picture.jpg"
    for i in range(min(n, 64)):
        coarse = Image.fromarray(draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse) + draws.normal(0, 24, (375, 500, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(encoded, quality=90)
        content = encoded.read_bytes()
        for j in range(i, n, 64):
            path = root / "train" / "ab"[j % 2] / f"{j}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for name in "ab":
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.jpeg").write_bytes(content)


# All cases.

Outcome = Timed | Many | Loaded | Profiled


class Job(NamedTuple):
    """A case: its short name, its limit in seconds, and what measures it until a deadline."""

    name: str
    limit: float
    work: Callable[[float], Outcome]


def jobs(place: Place) -> list[Job]:
    """Every case, those of the greatest value first."""
    sizes = place.sizes
    cases = {
        f"r{model.removeprefix('resnet')}-b{size}": Case(model, size, configuration.cores())
        for model in sizes.models
        for size in sizes.batches
    }

    def arms(methods: tuple[tuple[str, int], ...], modes: tuple[str, ...], precision: str = "fp32") -> list[Arm]:
        return [Arm(norm, forwards, mode, precision=precision) for mode in modes for norm, forwards in methods]

    def times(prefix: str, limit: float, arms: list[Arm]) -> list[Job]:
        return [Job(prefix + name, limit, partial(timed, case, arms, place)) for name, case in cases.items()]

    def lanes(prefix: str, limit: float, mode: str, numbers: dict[int, tuple[int, ...]]) -> list[Job]:
        return [
            Job(f"{prefix}{name}-{arm.norm}", limit, partial(many, case, arm, numbers[size], place))
            for size in sizes.batches
            for name, case in cases.items()
            if case.batch_size == size
            for arm in arms(PAIR, (mode,))
        ]

    def profiles(prefix: str, cases: dict[str, Case], n: int) -> list[Job]:
        return [
            Job(f"{prefix}{name}-{arm.norm}", 60, partial(profiled, case, arm, n, place))
            for name, case in cases.items()
            for arm in arms(PAIR, ("graph",))
        ]

    return [
        *times("", 30, [*arms(COMPARED, ("graph-eager", "eager")), PLAIN]),
        *lanes("lanes-", 30, "graph-eager", sizes.lanes),
        *times("compiled-", 60, arms(PAIR, ("graph-eager", "graph"))),
        *times("bf16-", 60, [RECORDED, *arms(PAIR, ("graph-eager", "graph"), "bf16")]),
        *lanes("compiled-lanes-", 60, "graph", sizes.compiled_lanes),
        Job("resnet50", 30, partial(large, place)),
        Job("loader", 30, partial(loader, place)),
        *profiles("profile-", cases, 1),
        *profiles(
            "profile-lanes-", {n: case for n, case in cases.items() if case.batch_size == 8}, sizes.profile_lanes
        ),
    ]


def set_up(device: torch.device) -> None:
    """Convolutions and matrix products as in training: TF32, and algorithms chosen by trial."""
    set_arithmetic(device, tf32=True, deterministic=False)


def open_images(folder: Path, device: torch.device, random: bool, n: int) -> tuple[in_memory.DeviceDataset, Any, str]:
    """The first n training images of CIFAR-10, or n random ones if asked for or where folder holds no CIFAR-10.

    Returns the data set, the arrays if they are random (else None), and what it is in words.
    """
    config = settings(Case("resnet20", 128, 1), BASE, folder).dataset
    arrays = None
    if not random and (folder / "cifar-10-batches-py").is_dir():
        with contextlib.suppress(UserError):
            arrays = datasets.load_cifar("cifar10", folder)
    if arrays is not None:
        shorter = arrays._replace(train_images=arrays.train_images[:n], train_labels=arrays.train_labels[:n])
        return in_memory.DeviceDataset(shorter, config, 0, device), None, "CIFAR-10"
    arrays = random_arrays(n, 32, 10)
    why = "as asked for" if random else f"no whole CIFAR-10 in the folder {folder.name}"
    return in_memory.DeviceDataset(arrays, config, 0, device), arrays, f"random ({why})"


def random_arrays(n: int, size: int, classes: int) -> in_memory.Arrays:
    """n images of size x size random pixels with random labels, for training and for testing."""
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (n, size, size, 3), dtype=np.uint8), draws.integers(0, classes, n)
    return in_memory.Arrays(images, labels, images, labels)


def run(
    folder: Path,
    target: Path,
    device: torch.device,
    build: Build,
    limit: float,
    only: Sequence[str] = ("*",),
    skip: Sequence[str] = (),
    random: bool = False,
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Measure all cases within limit seconds, and return the report.

    After each case a line is printed and target/<device>.json is written; at the end target/<device>.md, too.
    only, skip: names of cases or patterns such as lanes-*. random: random images even where there is CIFAR-10.
    Errors: UserError where a name fits no case.
    """
    end = time.monotonic() + limit
    set_up(device)
    dataset, arrays, images = open_images(folder, device, random, (sizes or Sizes()).images)
    todo = jobs(Place(folder, device, build, dataset, arrays, sizes or Sizes()))
    names = [job.name for job in todo]
    asked = chosen(names, only) - chosen(names, skip)
    report: dict[str, Any] = {
        "device": provenance.device_name(device),
        "cores": configuration.cores(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": provenance.commit_and_dirty()[0],
        "versions": provenance.versions(),
        "images": images,
        "limit": limit,
        "seconds": 0.0,
        "cases": {},
    }
    stem = target / cpu.file_stem(device)
    outcomes: dict[str, Outcome] = {}
    for job in todo:
        began = time.monotonic()
        status, outcome = _one(job, end, job.name in asked, device)
        if outcome is not None:
            outcomes[job.name] = outcome
        took = time.monotonic() - began
        written = asdict(outcome) if outcome is not None else {}
        report["cases"][job.name] = {"status": status, "took": took, **written}
        report["seconds"] = limit - left(end)
        write_atomically(stem.with_suffix(".json"), _json(report))
        print(f"{job.name} ({took:.1f} s): {outcome.line() if outcome is not None else status}", flush=True)
        for name, why in outcome.missing.items() if outcome is not None else ():
            print(f"  {name}: {why}", flush=True)
    text = page(report, outcomes)
    write_atomically(stem.with_suffix(".md"), text.encode())
    print(text)
    print(f"wrote {stem}.json and .md")
    return report


def chosen(names: list[str], patterns: Sequence[str]) -> set[str]:
    """The names that fit one of the patterns. Errors: UserError where a pattern fits none."""
    found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns if pattern}
    for pattern, fitting in found.items():
        if not fitting:
            raise UserError(f"no case is named {pattern}: there are {', '.join(names)}.", code=2)
    return {name for fitting in found.values() for name in fitting}


def _one(job: Job, end: float, asked: bool, device: torch.device) -> tuple[str, Outcome | None]:
    """A case's status in words, and what it found if it was begun."""
    if not asked:
        return "skipped: not asked for", None
    if left(end) <= 0:
        return NO_TIME, None
    failed: dict[str, str] = {}
    outcome = None
    with _noted(failed, job.name):
        outcome = job.work(min(end, time.monotonic() + job.limit))
    with _noted(failed, "memory"):  # a GPU that answers no longer must not end the report
        _free(device)
    if outcome is None:
        return failed[job.name], None
    return ("partly" if outcome.missing else "done"), outcome


def _json(report: dict[str, Any]) -> bytes:
    return (json.dumps(cpu.rounded(report), indent=1) + "\n").encode()


# The page.


class Bar(NamedTuple):
    """What was hoped for; value is not a number where it was not measured."""

    text: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        return "met" if (self.value >= self.limit if self.at_least else self.value <= self.limit) else "**missed**"


def bars(outcomes: dict[str, Outcome]) -> list[Bar]:
    """Every bar, from medians over rounds; a recorded iteration counts compiled or not, whichever is faster."""

    def seconds(model: str, size: int, *arms: Arm) -> float:
        """Not a number where it was not measured."""
        return min(
            (
                statistics.median(found.seconds[arm.name])
                for found in outcomes.values()
                if isinstance(found, Timed) and (found.case.model, found.case.batch_size) == (model, size)
                for arm in arms
                if arm.name in found.seconds
            ),
            default=math.nan,
        )

    def recorded(model: str, size: int, norm: str, forwards: int) -> float:
        return seconds(model, size, *(Arm(norm, forwards, mode) for mode in GRAPHS))

    titles = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
    bn, mbn = (1e3 * recorded("resnet56", 128, *method) for method in PAIR)
    to_plain = recorded("resnet20", 128, "mbn", 2) / seconds("resnet20", 128, PLAIN)
    result = [
        Bar("ResNet-20, batch 128: MBN, 2 forwards, graph / the plain loop", to_plain, 0.20),
        Bar("ResNet-56, batch 128: BN, 1 forward, graph, ms an iteration", bn, 3.5),
        Bar("ResNet-56, batch 128: MBN, 2 forwards, graph, ms an iteration", mbn, 5.0),
    ]
    for model, title in titles.items():
        for size in (128, 8):
            ratio = recorded(model, size, "mbn", 2) / recorded(model, size, "bn", 1)
            result.append(Bar(f"{title}, batch {size}: MBN, 2 forwards / BN, 1 forward, graph", ratio, 1.45))
    lanes = {(o.case.model, o.case.batch_size, o.arm): o.rates for o in outcomes.values() if isinstance(o, Many)}
    for size, limit in ((8, 3.0), (128, 1.3)):
        for model, title in titles.items():
            for arm in (Arm(norm, forwards, mode) for mode in GRAPHS[::-1] for norm, forwards in PAIR):
                rates = lanes.get((model, size, arm), {})
                gain = max(rates.values()) / rates[1] if len(rates) > 1 and 1 in rates else math.nan
                if arm.mode == "graph-eager" or rates:  # compiled lanes are not a bar of their own
                    text = f"{title}, batch {size}: {arm.name}: iterations/s, best number of lanes / one lane"
                    result.append(Bar(text, gain, limit, at_least=True))
    return result


def page(report: dict[str, Any], outcomes: dict[str, Outcome]) -> str:
    """All results as markdown."""
    commit = (report["commit"] or "unknown")[:12]
    lines = [
        "# Benchmark",
        "",
        f"{report['device']}, {report['cores']} cores, torch {report['versions']['torch']}, {report['date']}, commit "
        f"{commit}; written by `python scripts/benchmark.py` in {report['seconds']:.0f} seconds. Images: "
        f"{report['images']}.",
        "",
        "An arm's time is the median over rounds; every round runs all arms of a case one after the other in one "
        "process. graph-eager: the iteration is recorded as a CUDA graph and played back; graph: it is compiled, too; "
        "of the two, a bar takes the faster one. fp32 is with TF32 in convolutions and matrix products. "
        f"The plain loop is torchvision's data set and transforms, a DataLoader with {WORKERS} workers, "
        "`nn.BatchNorm2d` and `torch.optim.SGD`; all others have the data on the device.",
        "",
        "| bar | measured | bound | |",
        "|---|---|---|---|",
    ]
    for bar in bars(outcomes):
        bound = f"at {'least' if bar.at_least else 'most'} {bar.limit:.2f}"
        lines.append(f"| {bar.text} | {bar.value:.3f} | {bound} | {bar.verdict} |".replace("| nan |", "| - |"))
    for name, outcome in outcomes.items():
        lines += ["", f"## {name}", ""]
        if isinstance(outcome, Timed):
            lines += _timed_lines(outcome)
        elif isinstance(outcome, Many):
            lines += [f"{outcome.case.model}, batch {outcome.case.batch_size}, {outcome.arm.name}.", ""]
            lines += ["| lanes | iterations/s | / one lane |", "|---|---|---|"]
            one = outcome.rates.get(1)
            lines += [
                f"| {n} | {rate:.1f} | {f'{rate / one:.2f}' if one else '-'} |" for n, rate in outcome.rates.items()
            ]
        elif isinstance(outcome, Profiled):
            lines += [f"{outcome.line()}.", "", *outcome.rows()]
        else:
            trained = outcomes.get("resnet50")
            lines.append(f"{outcome.line()}.")
            if isinstance(trained, Timed) and trained.seconds:
                size = trained.case.batch_size
                rates = (f"{k} {size / statistics.median(s):.0f}" for k, s in trained.seconds.items())
                lines.append(f"ResNet-50 trains on this many a second: {'; '.join(rates)}.")
        lines += [f"\n{what}: {why}." for what, why in outcome.missing.items()]
    rest = [f"- {name}: {case['status']}" for name, case in report["cases"].items() if name not in outcomes]
    if rest:
        lines += ["", "## Not measured", "", *rest]
    return "\n".join(lines) + "\n"


def _timed_lines(outcome: Timed) -> list[str]:
    known = [Arm(n, f, m, precision=p) for p in ("fp32", "bf16") for m in ("eager", *GRAPHS[::-1]) for n, f in COMPARED]
    lines = [f"{outcome.case.model}, batch {outcome.case.batch_size}.", ""]
    lines.append(cpu.table(outcome, [*known, PLAIN], RECORDED, digits=3))
    if outcome.memory:
        lines += ["", "| arm | peak MB in tensors | peak MB reserved |", "|---|---|---|"]
        lines += [
            f"| {k} | {m['allocated'] / 1e6:.0f} | {m['reserved'] / 1e6:.0f} |" for k, m in outcome.memory.items()
        ]
    return lines
