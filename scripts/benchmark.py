#!/usr/bin/env python
"""Measure what training costs: every method, one and two forwards, eager and compiled, beside a plain PyTorch loop.

python scripts/benchmark.py --quick      # ResNet-20 at batch 128 without a compiler, under a minute
python scripts/benchmark.py              # also compiled, batch 8, memory, runs side by side; writes results/benchmarks

On CUDA the second one measures recorded iterations, many networks at once and ImageNet's loader, in at most --limit
seconds; --only 'r20-*,lanes-r20-b8-*' and --skip loader choose among its cases.
"""

import argparse
import dataclasses
import datetime
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import models
from mbn.benchmark import cpu as benchmark
from mbn.benchmark import cuda as benchmark_cuda
from mbn.benchmark.cpu import Result
from mbn.benchmark.workload import BASE, PLAIN, WORKERS, Arm, Case
from mbn.config import cores
from mbn.config.folders import data_and_results
from mbn.records import provenance
from mbn.system.command_line import entry_point
from mbn.system.cuda_graph import allow_many_streams, own_stream
from mbn.system.files import write_atomically

COMPILED = Arm("bn", mode="compile")
ROUNDS = 12


@entry_point
def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Milliseconds an iteration of every arm, interleaved round by round, and their ratios."
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-20 at batch 128, eager; writes nothing")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="machine.data=DIR holds CIFAR-10; machine.results=DIR is for benchmarks/",
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: CUDA where there is one, else the CPU")
    cuda = parser.add_argument_group("on CUDA")
    cuda.add_argument("--limit", type=float, metavar="SECONDS", help="seconds for all cases together; default: 300")
    cuda.add_argument("--only", help="cases to run, by name or pattern, with commas: 'r20-*,loader'")
    cuda.add_argument("--skip", help="cases to leave out, likewise")
    cuda.add_argument("--random", action="store_true", help="random images; also where machine.data holds no CIFAR-10")
    options = parser.parse_intermixed_args(arguments)
    allow_many_streams()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and (options.limit is not None or options.only or options.skip or options.random):
        parser.error(f"--limit, --only, --skip and --random are for CUDA, not for {device.type}")
    data, results = data_and_results(options.settings)
    if options.quick:
        benchmark_cuda.set_up(device)
        case = Case("resnet20", 128, cores())
        with own_stream(device):
            result = benchmark.measure(case, benchmark.arms(quick=True), data, device, models.build, 3, say)
        print(benchmark.table(result))
    elif device.type == "cuda":
        benchmark_cuda.run(
            data,
            results / "benchmarks",
            device,
            models.build,
            limit=300.0 if options.limit is None else options.limit,
            only=(options.only or "*").split(","),
            skip=(options.skip or "").split(","),
            random=options.random,
        )
    else:
        run(data, results / "benchmarks", device)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(folder: Path, target: Path, device: torch.device) -> None:
    began = time.monotonic()
    everything = benchmark.arms(quick=False)
    n = cores()
    cases = {
        "large": (Case("resnet20", 128, n), everything, ROUNDS),
        "small": (Case("resnet20", 8, 1), everything, ROUNDS),
        "one_thread": (Case("resnet20", 128, 1), [BASE, COMPILED], ROUNDS // 2),
    }
    results = {
        key: alone(benchmark.measure, case, chosen, folder, device, models.build, rounds, say)
        for key, (case, chosen, rounds) in cases.items()
    }
    memory = {
        arm.name: alone(benchmark.peak_memory, cases["large"][0], arm, folder, device, models.build)
        for arm in everything
        if arm != PLAIN and not arm.evaluates
    }
    many = {size: side_by_side(size, n, folder, device) for size in (128, 8)} if n > 1 else {}
    report = {
        "device": provenance.device_name(device),
        "cores": n,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": provenance.commit_and_dirty()[0],
        "versions": provenance.versions(),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cases": {key: dataclasses.asdict(result) for key, result in results.items()},
        "memory": memory,
        "many": many,
    }
    stem = benchmark.file_stem(device)
    text = page(report, results)
    write_atomically(target / f"{stem}.json", (json.dumps(benchmark.rounded(report), indent=1) + "\n").encode())
    write_atomically(target / f"{stem}.md", text.encode())
    print(text)
    print(f"wrote {target / stem}.json and .md")


def alone(function: Any, *arguments: Any) -> Any:
    """Call function in a process of its own, and return what it returns: threads and memory are a process's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def side_by_side(size: int, n: int, folder: Path, device: torch.device) -> dict[str, float]:
    """Iterations a second of n runs with a thread each, added up, and of one run with n threads; MBN, two forwards."""
    arm = Arm("mbn", 2)
    seconds = 20.0

    def throughput(runs: int, threads: int) -> float:
        case = Case("resnet20", size, threads)
        start = time.time() + 30  # all are ready by then, and go on until then
        with ProcessPoolExecutor(runs, multiprocessing.get_context("spawn")) as pool:
            arguments = (case, arm, folder, device, models.build, start, seconds)
            return sum(
                future.result() for future in [pool.submit(benchmark.throughput, *arguments) for _ in range(runs)]
            )

    return {"one run with all threads": throughput(1, n), "a run on each core": throughput(n, 1)}


def bars(results: dict[str, Result], memory: dict[str, int]) -> list[tuple[str, float, float]]:
    """What was hoped for: text, measured, and the most it may be. Ratios are medians over rounds."""
    large, small, one = results["large"], results["small"], results["one_thread"]

    def ratio(result: Result, arm: Arm, to: Arm) -> float:
        return benchmark.quantiles(result.ratio(arm, to))[0]

    def best(to: Arm) -> float:
        return min(ratio(large, Arm("mbn", 2, mode), to) for mode in ("eager", "compile"))

    def speed(result: Result, arm: Arm) -> float:
        return result.case.batch_size / benchmark.quantiles(result.seconds[arm.name])[0]

    mbn2, compiled = Arm("mbn", 2), Arm("mbn", 2, "compile")
    return [
        ("batch 128, compiled: MBN, 1 forward / BN, 1 forward", ratio(large, Arm("mbn", 1, "compile"), COMPILED), 1.05),
        ("batch 128, compiled: MBN, 2 forwards / BN, 1 forward", ratio(large, compiled, COMPILED), 1.33),
        ("batch 128: MBN, 2 forwards, best mode / eager BN, 1 forward", best(BASE), 1.15),
        ("batch 128: MBN, 2 forwards, best mode / the plain loop", best(PLAIN), 1.00),
        ("batch 128, eager: MBN, 1 forward / BN, 1 forward", ratio(large, Arm("mbn"), BASE), 1.25),
        ("batch 128, eager: MBN, 2 forwards / BN, 1 forward", ratio(large, mbn2, BASE), 1.65),
        ("batch 8, compiled: MBN, 2 forwards / BN, 1 forward", ratio(small, compiled, COMPILED), 1.45),
        (
            "BN, one thread, compiled: images/s at batch 128 / at batch 8",
            speed(one, COMPILED) / speed(small, COMPILED),
            1 / 0.6,
        ),
        ("test time: MBN / BN", ratio(large, Arm("mbn", evaluates=True), Arm("bn", evaluates=True)), 1.02),
        ("peak memory, eager: MBN, 2 forwards / BN, 1 forward", memory[mbn2.name] / memory[BASE.name], 1.05),
        (
            "peak memory, compiled: MBN, 2 forwards / BN, 1 forward",
            memory[compiled.name] / memory[COMPILED.name],
            1.05,
        ),
    ]


def page(report: dict[str, Any], results: dict[str, Result]) -> str:
    lines = [
        "# Benchmark",
        "",
        f"{report['device']}, {report['cores']} cores, torch {report['versions']['torch']}, {report['date']}, commit "
        f"{report['commit'][:12]}; written by `python scripts/benchmark.py` in {report['minutes']} minutes.",
        "",
        "An arm's time is the median over rounds; every round runs all arms one after the other in one process. Ratios "
        "are taken round by round. The plain loop is what one would write with torchvision's data set and transforms, "
        f"a DataLoader with {WORKERS} workers, `nn.BatchNorm2d` and `torch.optim.SGD`; all others have the "
        "data in memory.",
        "",
        "| bar | measured | at most | |",
        "|---|---|---|---|",
    ]
    for text, value, limit in bars(results, report["memory"]):
        lines.append(f"| {text} | {value:.3f} | {limit:.2f} | {'met' if value <= limit else '**missed**'} |")
    for key in ("large", "small", "one_thread"):
        lines += ["", f"## {results[key].case.title}", "", benchmark.table(results[key])]
    lines += ["", "## Peak memory of an iteration, ResNet-20, batch 128", "", "| arm | MB |", "|---|---|"]
    lines += [f"| {name} | {size / 1e6:.1f} |" for name, size in report["memory"].items()]
    if report["many"]:
        lines += ["", "## Many runs at once, ResNet-20, MBN, 2 forwards, eager", ""]
        for size, rates in report["many"].items():
            shown = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
            lines.append(f"Batch {size}, iterations a second: {shown}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
