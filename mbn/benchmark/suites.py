"""All that is measured on a CPU and on a GPU, the most important first."""

from functools import partial

from mbn.benchmark.imagenet_loader import loader, resnet50_speed
from mbn.benchmark.jobs import Job
from mbn.benchmark.kernels import profiled
from mbn.benchmark.side_by_side import lanes, processes
from mbn.benchmark.timing import timed
from mbn.benchmark.workload import BASE, CAPTURED, PAIR, PLAIN, Arm, Case, Sizes, arms
from mbn.config import cores
from mbn.methods import METHODS

WITH_STATISTICS = tuple((name, n) for name, method in METHODS.items() if method.statistics for n in (1, 2))
EAGER = (*arms(WITH_STATISTICS, "eager"), Arm("gn"))
BN_TEST, MBN_TEST = (Arm(norm, evaluates=True) for norm in ("bn", "mbn"))
BN_COMPILED, MBN_COMPILED, MBN2_COMPILED = arms((("bn", 1), ("mbn", 1), ("mbn", 2)), "compile")
ON_CPU = (
    *EAGER,
    *(Arm("mbn", 2, gradient="batch"), BN_TEST, MBN_TEST),
    *arms((("bn", 1), ("bn", 2), ("mbn", 1), ("mbn", 2)), "compile"),
    *(Arm("mbn", 2, "compile", "batch"), PLAIN),
)
CPU_SIZES = Sizes(rounds=12, round_seconds=0.5)
QUICK_SIZES = Sizes(rounds=3, round_seconds=0.25, memory=False)


def quick() -> list[Job]:
    """ResNet-20 without a compiler."""
    return [Job("r20-b128", 600, partial(timed, Case("resnet20", 128, cores()), (*EAGER, PLAIN)))]


def on_cpu() -> list[Job]:
    """ResNet-20: one run alone, and runs side by side."""
    n = cores()
    cases = {
        "r20-b128": (Case("resnet20", 128, n), ON_CPU),
        "r20-b8": (Case("resnet20", 8, 1), ON_CPU),
        "r20-b128-one-thread": (Case("resnet20", 128, 1), (BASE, BN_COMPILED)),
    }
    return [
        *(Job(name, 1800, partial(timed, *given)) for name, given in cases.items()),
        *(
            Job(f"processes-r20-b{size}", 300, partial(processes, "resnet20", size, Arm("mbn", 2), n))
            for size in (128, 8)
            if n > 1
        ),
    ]


def on_cuda(sizes: Sizes) -> list[Job]:
    """Captured iterations, compiled ones, both precisions, many networks at once, ImageNet's loader, profiles."""
    cases = {
        f"r{model.removeprefix('resnet')}-b{size}": Case(model, size, cores())
        for model in sizes.models
        for size in sizes.batches
    }

    def times(prefix: str, limit: float, chosen: tuple[Arm, ...]) -> list[Job]:
        return [Job(prefix + name, limit, partial(timed, case, chosen)) for name, case in cases.items()]

    def many(prefix: str, limit: float, mode: str, numbers: dict[int, tuple[int, ...]]) -> list[Job]:
        return [
            Job(f"{prefix}{name}-{arm.norm}", limit, partial(lanes, case, arm, numbers[case.batch_size]))
            for name, case in sorted(cases.items(), key=lambda item: item[1].batch_size)
            for arm in arms(PAIR, mode)
        ]

    def profiles(prefix: str, n: int, batches: tuple[int, ...]) -> list[Job]:
        return [
            Job(f"{prefix}{name}-{arm.norm}", 60, partial(profiled, case, arm, n))
            for name, case in cases.items()
            for arm in arms(PAIR, "graph")
            if case.batch_size in batches
        ]

    return [
        *times("", 30, sizes.arms),
        *many("lanes-", 30, "graph-eager", sizes.lanes),
        *times("compiled-", 60, arms(PAIR, "graph-eager", "graph")),
        *times("bf16-", 60, (CAPTURED, *arms(PAIR, "graph-eager", "graph", precision="bf16"))),
        *many("compiled-lanes-", 60, "graph", sizes.compiled_lanes),
        Job("resnet50", 30, resnet50_speed),
        Job("loader", 30, loader),
        *profiles("profile-", 1, sizes.batches),
        *profiles("profile-lanes-", sizes.profile_lanes, (8,)),
    ]
