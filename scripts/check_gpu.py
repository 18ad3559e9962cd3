#!/usr/bin/env python
"""Check a GPU before training on it: do layers and captured iterations compute the right numbers, and how fast?

python scripts/check_gpu.py                       # everything, under three minutes, no data set
python scripts/check_gpu.py --only layers,graph   # only these
python scripts/check_gpu.py --out check.json      # also write all numbers to a file, after every job

The last line is the mode and the number of lanes to train with. Exit code: 0 if all comparisons hold and nothing
failed, 1 otherwise, 2 where there is no CUDA.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

import os
from typing import Any

import torch

import models
from mbn.benchmark import equalities, jobs, suites
from mbn.benchmark.side_by_side import Rates
from mbn.benchmark.workload import PAIR, Build, Setup, Sizes, arms
from mbn.system import cuda_graph
from mbn.system.command_line import Parser, entry_point

SIZES = Sizes(
    arms=arms(PAIR, "graph-eager", "eager"),
    images=1024,
    rounds=3,
    lanes={8: (1, 4, 16), 128: (1, 4)},
)
# A number of lanes is enough if it reaches this share of the highest rate (iterations a second).
ENOUGH = 0.95


def todo(sizes: Sizes) -> list[jobs.Job]:
    """The comparisons, then from the benchmark the times of an iteration and MBN's lanes; compiling comes last."""
    *first, compiled = equalities.jobs()
    measured = suites.on_cuda(sizes)
    names = jobs.chosen([job.name for job in measured], "r*-b*,lanes-*-mbn")
    return [*first, *(job for job in measured if job.name in names), compiled]


def advice(status: dict[str, str], findings: jobs.Findings, batches: tuple[int, ...]) -> dict[str, Any]:
    """The mode to train in, the number of lanes for each batch size, and the reason.

    eager if a comparison does not hold or was not made; graph only if compiling is also faster.
    """
    wrong = [name for name in ("layers", "bf16", "graph", "deterministic") if status.get(name) != "done"]
    if wrong:
        return {"mode": "eager", "lanes": [1 for _ in batches], "why": f"not shown to be right: {', '.join(wrong)}"}
    mode, why = "graph-eager", "compiled: not checked, or failed"
    found = findings.get("compiled")
    if isinstance(found, equalities.Compared) and not found.missing:
        (numbers,) = found.found.values()
        mode = "graph" if numbers["ms"] < numbers["ms_without"] else "graph-eager"
        why = "{ms:.3g} ms an iteration compiled, {ms_without:.3g} ms without".format(**numbers)
    rates = [found for found in findings.values() if isinstance(found, Rates)]
    return {"mode": mode, "lanes": [lanes_for(batch, rates) for batch in batches], "why": why}


def lanes_for(batch: int, found: list[Rates]) -> int:
    """The fewest lanes with nearly the highest rate; the largest such number over all networks."""
    each = [one.rates for one in found if one.case.batch_size == batch and one.rates]
    return max((min(n for n in rates if rates[n] >= ENOUGH * max(rates.values())) for rates in each), default=1)


@entry_point
def main(arguments: list[str], sizes: Sizes = SIZES, build: Build = models.build) -> int:
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", type=jobs.device_option, default="cuda", help="cuda, cuda:1, ...; default: cuda")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers, rewritten after every job")
    jobs.add_options(parser, "165")
    options = parser.parse_args(arguments)
    # cuBLAS reads this at its first use; without it torch refuses deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cuda_graph.allow_many_streams()
    device = torch.device("cuda" if options.device == "auto" else options.device)
    if not cuda_graph.supported(device) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        print(f"error: this checks a CUDA device, but {options.device} is not one, or is not there.", file=sys.stderr)
        return 2
    setup = Setup(Path("data"), device, build, sizes, random=True)
    limit = 165 if options.limit is None else options.limit
    report, findings = jobs.run(todo(sizes), setup, limit, options.only, options.skip, options.out)
    status = {name: case["status"] for name, case in report["cases"].items()}
    use = report["advice"] = advice(status, findings, sizes.batches)
    if options.out is not None:
        jobs.write_report(options.out, report)
    lanes = ", ".join(f"{n} for batch {batch}" for n, batch in zip(use["lanes"], sizes.batches, strict=True))
    measured = " (measured without compiling)" if use["mode"] == "graph" else ""
    print(f"\n{use['why']}\nuse: machine.mode={use['mode']} ; reproduce.py --jobs {lanes}{measured}", flush=True)
    compared = {job.name for job in equalities.jobs()}
    bad = [why.startswith("failed") or (why == jobs.NO_TIME and name in compared) for name, why in status.items()]
    return 1 if any(bad) else jobs.exit_code(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
