#!/usr/bin/env python
"""Measure what training costs: BN, MBN, BRN and GN, one and two forwards, also compiled, beside a plain PyTorch loop.

python scripts/benchmark.py --quick      # ResNet-20 at batch 128 without a compiler, under a minute
python scripts/benchmark.py              # also compiled, batch 8, memory, runs side by side; writes results/benchmarks

On CUDA the second command measures captured iterations, many networks at once and ImageNet's loader. --limit is the
time for all jobs together; --only 'r20-*,lanes-r20-b8-*' and --skip loader choose among them. With one of these, or
a shorter limit, the files are named MACHINE-part, and a whole measurement stays as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

import models
from mbn.benchmark import jobs, suites
from mbn.benchmark.page import CPU_BARS, CUDA_BARS, file_stem, page
from mbn.benchmark.workload import Setup, Sizes
from mbn.config.folders import data_and_results
from mbn.system.command_line import Parser, entry_point
from mbn.system.cuda_graph import allow_many_streams
from mbn.system.files import write_atomically
from mbn.training.execution import choose_device


@entry_point
def main(arguments: list[str], sizes: Sizes | None = None) -> int:
    """Exit code: 0 done; 1 a job failed, or none was done; 2 a mistake in the command."""
    parser = Parser(description="Milliseconds an iteration of every arm, interleaved round by round, and their ratios.")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 at batch 128, eager; writes nothing")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="machine.data=DIR: where CIFAR-10 is; machine.results=DIR: where benchmarks/ is written",
    )
    parser.add_argument(
        "--device", type=jobs.device_option, default="auto", help="cpu, cuda, ...; default: CUDA, else the CPU"
    )
    parser.add_argument(
        "--random", action="store_true", help="use random images, as is done without CIFAR-10 in machine.data"
    )
    jobs.add_options(parser, "3600 on a CPU, 300 on CUDA")
    options = parser.parse_intermixed_args(arguments)
    allow_many_streams()
    device = choose_device(options.device, None)
    cuda = device.type == "cuda"
    data, results = data_and_results(options.settings)
    if options.quick:
        todo, sizes = suites.quick(), sizes or suites.QUICK_SIZES
    elif cuda:
        sizes = sizes or Sizes()
        todo = suites.on_cuda(sizes)
    else:
        todo, sizes = suites.on_cpu(), sizes or suites.CPU_SIZES
    setup = Setup(data, device, models.build, sizes, options.random)
    usual = 300.0 if cuda else 3600.0
    limit = usual if options.limit is None else options.limit
    part = options.only != "*" or bool(options.skip) or limit < usual
    stem = results / "benchmarks" / (file_stem(device) + "-part" * part)
    path = None if options.quick else stem.with_suffix(".json")
    report, findings = jobs.run(todo, setup, limit, options.only, options.skip, path)
    if options.quick:
        print("\n".join(row for found in findings.values() for row in found.rows()))
        return jobs.exit_code(report)
    text = page(report, findings, CUDA_BARS if cuda else CPU_BARS)
    write_atomically(stem.with_suffix(".md"), text.encode())
    print(text)
    print(f"wrote {stem}.json and .md")
    return jobs.exit_code(report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
