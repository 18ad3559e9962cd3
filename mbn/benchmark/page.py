"""The page with a benchmark's results, and the bars: the targets that were set beforehand."""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from mbn.benchmark.jobs import Findings
from mbn.benchmark.side_by_side import Rates
from mbn.benchmark.suites import BN_COMPILED, BN_TEST, MBN2_COMPILED, MBN_COMPILED, MBN_TEST
from mbn.benchmark.timing import Timed
from mbn.benchmark.workload import BASE, PAIR, PLAIN, WORKERS, Arm, arms
from mbn.config import cores
from mbn.records.provenance import device_name
from mbn.training.execution import GRAPHS


class Bar(NamedTuple):
    """A target. value: takes the measured number from the findings; NaN where it was not measured."""

    text: str
    value: Callable[[Findings], float]
    limit: float
    at_least: bool = False

    def row(self, findings: Findings) -> str:
        value = self.value(findings)
        bound = f"at {'least' if self.at_least else 'most'} {self.limit:.2f}"
        if math.isnan(value):
            return f"| {self.text} | - | {bound} | not measured |"
        met = value >= self.limit if self.at_least else value <= self.limit
        return f"| {self.text} | {value:.3f} | {bound} | {'met' if met else '**missed**'} |"


def seconds(pattern: str, arms: Iterable[Arm], findings: Findings) -> float:
    """Seconds an iteration (median over rounds) of the fastest arm, in all jobs whose names match."""
    found = (o for job, o in findings.items() if isinstance(o, Timed) and fnmatch(job, pattern))
    times = (statistics.median(o.seconds[arm.name]) for o in found for arm in arms if arm.name in o.seconds)
    return min(times, default=math.nan)


def ratio(job: str, arms: Iterable[Arm], to: Arm, findings: Findings) -> float:
    """The fastest arm's seconds divided by those of arm `to` in the same job: median over rounds."""
    found = findings.get(job)
    if not isinstance(found, Timed):
        return math.nan
    given = (found.ratios(arm.name, to.name) for arm in arms if {arm.name, to.name} <= found.seconds.keys())
    return min((statistics.median(ratios) for ratios in given), default=math.nan)


def peak(arm: Arm, to: Arm, findings: Findings) -> float:
    """The peak memory of an arm divided by that of arm `to`."""
    found = findings.get("r20-b128")
    memory = found.memory if isinstance(found, Timed) else {}
    return memory.get(arm.name, math.nan) / memory.get(to.name, math.nan)


def gain(job: str, findings: Findings) -> float:
    """The rate of the best number of lanes divided by the rate of one lane."""
    found = findings.get(job)
    rates = found.rates if isinstance(found, Rates) else {}
    return max(rates.values()) / rates[1] if len(rates) > 1 and 1 in rates else math.nan


def by_one_thread(findings: Findings) -> float:
    return 16 * seconds("r20-b8", [BN_COMPILED], findings) / seconds("r20-b128-one-thread", [BN_COMPILED], findings)


EAGER1, EAGER2 = Arm("mbn"), Arm("mbn", 2)
CPU_BARS = [
    Bar(
        "batch 128, compiled: MBN, 1 forward / BN, 1 forward",
        partial(ratio, "r20-b128", [MBN_COMPILED], BN_COMPILED),
        1.05,
    ),
    Bar(
        "batch 128, compiled: MBN, 2 forwards / BN, 1 forward",
        partial(ratio, "r20-b128", [MBN2_COMPILED], BN_COMPILED),
        1.33,
    ),
    Bar(
        "batch 128: MBN, 2 forwards, best mode / eager BN, 1 forward",
        partial(ratio, "r20-b128", [EAGER2, MBN2_COMPILED], BASE),
        1.15,
    ),
    Bar(
        "batch 128: MBN, 2 forwards, best mode / the plain loop",
        partial(ratio, "r20-b128", [EAGER2, MBN2_COMPILED], PLAIN),
        1.00,
    ),
    Bar("batch 128, eager: MBN, 1 forward / BN, 1 forward", partial(ratio, "r20-b128", [EAGER1], BASE), 1.25),
    Bar("batch 128, eager: MBN, 2 forwards / BN, 1 forward", partial(ratio, "r20-b128", [EAGER2], BASE), 1.65),
    Bar(
        "batch 8, compiled: MBN, 2 forwards / BN, 1 forward",
        partial(ratio, "r20-b8", [MBN2_COMPILED], BN_COMPILED),
        1.45,
    ),
    Bar("BN, one thread, compiled: images/s at batch 128 / at batch 8", by_one_thread, 1 / 0.6),
    Bar("test time: MBN / BN", partial(ratio, "r20-b128", [MBN_TEST], BN_TEST), 1.02),
    Bar("peak memory, eager: MBN, 2 forwards / BN, 1 forward", partial(peak, EAGER2, BASE), 1.05),
    Bar("peak memory, compiled: MBN, 2 forwards / BN, 1 forward", partial(peak, MBN2_COMPILED, BN_COMPILED), 1.05),
]


def captured(name: str, method: tuple[str, int], findings: Findings) -> float:
    """Seconds of a captured iteration: compiled or not, whichever is faster."""
    return seconds(f"*{name}", [Arm(*method, mode) for mode in GRAPHS], findings)


def milliseconds(method: tuple[str, int], findings: Findings) -> float:
    return 1e3 * captured("r56-b128", method, findings)


def to_plain(findings: Findings) -> float:
    return captured("r20-b128", PAIR[1], findings) / seconds("r20-b128", [PLAIN], findings)


def to_bn(name: str, findings: Findings) -> float:
    return captured(name, PAIR[1], findings) / captured(name, PAIR[0], findings)


CUDA_BARS = [
    Bar("ResNet-20, batch 128: MBN, 2 forwards, graph / the plain loop", to_plain, 0.20),
    Bar("ResNet-56, batch 128: BN, 1 forward, graph, ms an iteration", partial(milliseconds, PAIR[0]), 3.5),
    Bar("ResNet-56, batch 128: MBN, 2 forwards, graph, ms an iteration", partial(milliseconds, PAIR[1]), 5.0),
    *(
        Bar(f"ResNet-{n}, batch {b}: MBN, 2 forwards / BN, 1 forward, graph", partial(to_bn, f"r{n}-b{b}"), 1.45)
        for n, b in product((20, 56), (128, 8))
    ),
    *(
        Bar(
            f"ResNet-{n}, batch {b}: {arm.name}: iterations/s, best number of lanes / one lane",
            partial(gain, f"{'compiled-' * (arm.mode == 'graph')}lanes-r{n}-b{b}-{arm.norm}"),
            limit,
            at_least=True,
        )
        for (b, limit), n, arm in product(((8, 3.0), (128, 1.3)), (20, 56), arms(PAIR, "graph-eager", "graph"))
    ),
]


def file_stem(device: torch.device) -> str:
    """The name of this machine's files in results/benchmarks/, such as cpu-amd-epyc-2-cores."""
    on = f" {cores()} cores" if device.type == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", (device_name(device) + on).lower()).strip("-")


def page(report: dict[str, Any], findings: Findings, bars: list[Bar]) -> str:
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
        "process. Ratios within a case are taken round by round; the bars of a GPU divide medians. compile: the "
        "forwards are compiled; graph-eager: the iteration is captured as a CUDA graph and replayed; graph: both; a "
        "bar takes the faster one. On a GPU fp32 is with TF32 in convolutions and matrix products. The plain loop is "
        "PIL images with torchvision's transforms, a "
        f"DataLoader with {WORKERS} worker{'s' * (WORKERS > 1)}, `nn.BatchNorm2d` and `torch.optim.SGD`; all others "
        "have the data on the device.",
        "",
        "| bar | measured | bound | |",
        "|---|---|---|---|",
        *(bar.row(findings) for bar in bars),
    ]
    for name, finding in findings.items():
        lines += [
            "",
            f"## {name}",
            "",
            *finding.rows(),
            *(f"\n{what}: {why}." for what, why in finding.missing.items()),
        ]
    if rest := [f"- {name}: {case['status']}" for name, case in report["cases"].items() if name not in findings]:
        lines += ["", "## Not measured", "", *rest]
    return "\n".join(lines) + "\n"
