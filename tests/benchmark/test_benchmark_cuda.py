"""The benchmark's CUDA variant, on the CPU with the stand-in for CUDA graphs and a small network."""

import contextlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from running import build_small, load_script

from mbn.benchmark import cuda as benchmark_cuda
from mbn.benchmark import lanes as benchmark_lanes
from mbn.benchmark import workload
from mbn.benchmark.cuda import NO_TIME, RECORDED, Many, Place, Sizes, Timed, bars
from mbn.benchmark.kernels import Kernels
from mbn.benchmark.workload import BASE, PLAIN, Arm, Case
from mbn.launch.lanes import SWITCH
from mbn.system import cuda_graph
from mbn.system.errors import UserError
from mbn.training import iteration as update

CPU = torch.device("cpu")
CASE = Case("resnet20", 8, 1)
MBN2 = Arm("mbn", 2, "graph-eager")
SIZES = Sizes(
    models=("resnet20",),
    batches=(8,),
    images=64,
    rounds=2,
    round_seconds=0.01,
    lanes={8: (1, 2)},
    compiled_lanes={8: (1, 2)},
    lane_seconds=0.1,
    compiling=0.0,
    workers=1,
    pictures=16,
    large_batch=8,
    loader_seconds=0.1,
    profile_seconds=0.05,
    profile_lanes=2,
)
NAMES = [
    *("r20-b8", "lanes-r20-b8-bn", "lanes-r20-b8-mbn", "compiled-r20-b8", "bf16-r20-b8"),
    *("compiled-lanes-r20-b8-bn", "compiled-lanes-r20-b8-mbn", "resnet50", "loader"),
    *("profile-r20-b8-bn", "profile-r20-b8-mbn", "profile-lanes-r20-b8-bn", "profile-lanes-r20-b8-mbn"),
]


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    """What a compiler makes is not an operation that the stand-in could note."""
    monkeypatch.setattr(update, "compiled", lambda method, kind: method)


@pytest.fixture(autouse=True)
def profiler(monkeypatch):
    """A profiler that sees two kernels: on a CPU the real one sees nothing of other threads."""

    def seen(work, device):
        work()
        return Kernels(0.5, 0.25, 0.375, {"convolution": (10, 0.25), "sum": (40, 0.125)})

    monkeypatch.setattr(benchmark_cuda, "kernels", seen)


# Holds no CIFAR-10; the same in all tests, as configurations are composed once for each folder.
EMPTY = Path("nothing-here")


@pytest.fixture
def place():
    dataset, arrays, _ = benchmark_cuda.open_images(EMPTY, CPU, True, 64)
    return Place(EMPTY, CPU, build_small, dataset, arrays, SIZES)


def run(tmp_path, build=build_small, limit=300.0, **options):
    return benchmark_cuda.run(EMPTY, tmp_path / "out", CPU, build, limit, sizes=SIZES, **options)


def not_a_number(text):
    raise AssertionError(f"{text} is not JSON")


def test_all_cases_run_and_are_on_file_one_by_one(tmp_path, monkeypatch, capsys, recording):
    files = []
    write = benchmark_cuda.write_atomically

    def written(path, content):
        write(path, content)
        if path.suffix == ".json":
            files.append(json.loads(path.read_text(), parse_constant=not_a_number))

    monkeypatch.setattr(benchmark_cuda, "write_atomically", written)
    run(tmp_path)
    assert [list(file["cases"]) for file in files] == [NAMES[: i + 1] for i in range(len(NAMES))]
    cases = files[-1]["cases"]
    assert {name: case["status"] for name, case in cases.items()} == dict.fromkeys(NAMES, "done")
    assert files[-1]["images"] == ("random (no whole CIFAR-10 in the folder nothing-here)")
    methods = ("BN 1 forward", "MBN 1 forward", "MBN 2 forwards", "GN 1 forward")
    assert set(cases["r20-b8"]["seconds"]) == {
        *(f"{method}, {mode}" for method in methods for mode in ("eager", "graph-eager")),
        "plain loop",
    }
    pair = ("BN 1 forward", "MBN 2 forwards")
    assert set(cases["compiled-r20-b8"]["seconds"]) == {f"{m}, {mode}" for m in pair for mode in graph_modes()}
    assert set(cases["bf16-r20-b8"]["seconds"]) == {
        RECORDED.name,
        *(f"{m}, {mode}, bf16" for m in pair for mode in graph_modes()),
    }
    assert all(len(s) == 2 and min(s) > 0 for name in NAMES for s in cases[name].get("seconds", {}).values())
    for name in NAMES:
        if name.startswith("profile"):
            assert cases[name]["kernels"]["busy"] == 0.25
            assert cases[name]["iterations"] >= cases[name]["lanes"] == 1 + ("lanes" in name)
        elif "lanes" in name:
            assert list(cases[name]["rates"]) == ["1", "2"]
            assert min(cases[name]["rates"].values()) > 0
    assert cases["loader"]["rate"] > 0
    printed = capsys.readouterr().out
    lines = [line.partition(" ")[0] for line in printed.splitlines()]
    assert [line for line in lines if line in NAMES] == NAMES
    (page,) = (tmp_path / "out").glob("*.md")
    assert page.read_text() in printed
    assert all(f"\n## {name}\n" in page.read_text() for name in NAMES)
    assert "ResNet-50 trains on this many a second: BN 1 forward, graph-eager, bf16 " in page.read_text()


def test_a_profile_is_told_by_the_iteration():
    found = Kernels(0.5, 0.25, 0.375, {"convolution": (10, 0.25), "sum": (40, 0.125)})
    outcome = benchmark_cuda.Profiled(CASE, MBN2, 2, iterations=10, kernels=found)
    assert outcome.line() == (
        "MBN 2 forwards, graph-eager, lanes 2: 50.000 ms an iteration, of which 25.000 ms with a kernel running; "
        "5 kernels, 37.500 ms added up"
    )
    assert outcome.rows()[2:] == ["| convolution | 1.0 | 25000.0 | 25000 |", "| sum | 4.0 | 3125.0 | 12500 |"]


def graph_modes():
    return "graph-eager", "graph"


def test_what_is_not_asked_for_and_what_has_no_time_is_said(tmp_path, capsys, recording):
    report = run(tmp_path, only=["lanes-*", "loader"], skip=["*-bn", ""], limit=300)
    status = {name: case["status"] for name, case in report["cases"].items()}
    assert status == dict.fromkeys(NAMES, "skipped: not asked for") | {"lanes-r20-b8-mbn": "done", "loader": "done"}
    report = run(tmp_path, limit=0, skip=["loader"])
    assert {case["status"] for name, case in report["cases"].items() if name != "loader"} == {NO_TIME}
    assert f"r20-b8 (0.0 s): {NO_TIME}\n" in capsys.readouterr().out
    (page,) = (tmp_path / "out").glob("*.md")
    assert f"- r20-b8: {NO_TIME}\n" in page.read_text()
    assert "- loader: skipped: not asked for\n" in page.read_text()
    with pytest.raises(UserError, match=r"no case is named r99\*: there are r20-b8, "):
        run(tmp_path, only=["r99*"])


class Clock:
    """Time that passes when a fake says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        fake = types.SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now, sleep=lambda _: None)
        monkeypatch.setattr(benchmark_cuda, "time", fake)


def fake_measured(monkeypatch, seconds=lambda measured: 0.5, step=lambda: None):
    class Fake:
        in_mode = True

        def __init__(self, case, arm, *_):
            self.arm = arm

        def step(self):
            step()

        def wait(self):
            pass

        def seconds(self, iterations):
            return seconds(self)

    monkeypatch.setattr(benchmark_cuda, "prepare", Fake)


def test_a_round_that_the_limit_breaks_off_does_not_count(monkeypatch, place):
    """Of 6.5 s two arms take 2 to start and 2 a round: the third round breaks off after its first arm."""
    clock = Clock(monkeypatch)

    def second(_):
        clock.now += 1
        return clock.now

    fake_measured(monkeypatch, second)
    place.sizes = Sizes()
    result = benchmark_cuda.timed(CASE, [RECORDED, MBN2], place, 6.5)
    assert result.seconds == {RECORDED.name: [3, 5], MBN2.name: [4, 6]}
    assert result.missing == {"rounds from 3 to 6": NO_TIME}


def test_arms_that_the_limit_leaves_no_time_for_are_named(monkeypatch, place):
    """Each takes a second to start; compiling begins only with 20 s left."""
    clock = Clock(monkeypatch)

    def second(_):
        clock.now += 1
        return 1.0

    fake_measured(monkeypatch, second)
    place.sizes = Sizes(rounds=1)
    result = benchmark_cuda.timed(CASE, [RECORDED, Arm("bn", mode="graph"), MBN2], place, 10)
    assert result.missing == {"BN 1 forward, graph": NO_TIME}
    assert list(result.seconds) == [RECORDED.name, MBN2.name]
    result = benchmark_cuda.timed(CASE, [RECORDED, BASE], place, clock.now + 1)
    assert result.missing == {BASE.name: NO_TIME, "rounds from 1 to 1": NO_TIME}
    found = benchmark_cuda.many(CASE, Arm("bn", mode="graph"), (1, 2), place, clock.now + 10)
    assert (found.rates, found.missing) == ({}, {"1 lanes and more": NO_TIME})


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path, monkeypatch, capsys, recording):
    """Memory that is not enough for ResNet-50, a compiler that is missing, and a loader that breaks."""

    def build(*, builder, **rest):
        if builder.endswith("resnet50"):
            raise torch.OutOfMemoryError("it is full")
        return build_small(**rest)

    def no_compiler(method, kind):
        raise RuntimeError("no compiler\nat all")

    def broken(place, deadline):
        raise UserError("no pictures")

    monkeypatch.setattr(update, "compiled", no_compiler)
    monkeypatch.setattr(benchmark_cuda, "loader", broken)
    cases = run(tmp_path, build, only=["compiled-*", "lanes-*-bn", "resnet50", "loader"], skip=["*-mbn"])["cases"]
    assert cases["loader"]["status"] == "failed: UserError: no pictures"
    assert set(cases["resnet50"]["missing"].values()) == {"failed: OutOfMemoryError: it is full"}
    why = "failed: RuntimeError: no compiler"
    assert cases["compiled-r20-b8"]["missing"] == {"BN 1 forward, graph": why, "MBN 2 forwards, graph": why}
    assert len(cases["compiled-r20-b8"]["seconds"][MBN2.name]) == 2
    assert cases["compiled-lanes-r20-b8-bn"]["missing"] == {"more lanes": why}
    status = {name: case["status"] for name, case in cases.items()}
    assert [name for name, text in status.items() if text == "done"] == ["lanes-r20-b8-bn"]
    assert f"  BN 1 forward, graph: {why}\n" in capsys.readouterr().out


def test_an_arm_that_fails_in_a_round_has_no_times(monkeypatch, place):
    calls = []

    def seconds(measured):
        calls.append(measured.arm)
        if measured.arm == MBN2 and calls.count(MBN2) == 3:
            raise RuntimeError("once")
        return 0.5

    fake_measured(monkeypatch, seconds)
    place.sizes = Sizes(rounds=3)
    result = benchmark_cuda.timed(CASE, [RECORDED, MBN2], place, time.monotonic() + 100)
    assert result.seconds == {RECORDED.name: [0.5] * 3}
    assert result.missing == {MBN2.name: "failed: RuntimeError: once"}


def test_iterations_that_are_not_recorded_are_not_taken_for_recorded_ones(monkeypatch, place, capsys):
    def record(function):
        raise RuntimeError("not here")

    monkeypatch.setattr(cuda_graph, "record", record)
    result = benchmark_cuda.timed(CASE, [BASE, RECORDED], place, time.monotonic() + 100)
    assert list(result.seconds) == [BASE.name]
    assert result.missing == {RECORDED.name: "failed: RuntimeError: iterations cannot be recorded"}
    assert "warning: iterations cannot be recorded here" in capsys.readouterr().err


# Lanes.


def lanes_rate(place, n, seconds):
    with benchmark_cuda.lanes_of(CASE, MBN2, place) as lanes:
        for _ in range(n):
            lanes.add()
        return lanes.rate(seconds)


@pytest.mark.parametrize("n", [1, 3])
def test_lanes_are_counted_from_their_start_to_their_end(n, monkeypatch, place):
    """A step of 20 ms, never shorter: n lanes make at most 50 n a second, and most of them on a busy machine, too.

    The four iterations up to the recording do not count.
    """
    fake_measured(monkeypatch, step=lambda: time.sleep(0.02))
    rate = lanes_rate(place, n, 0.4)
    assert 25 * n < rate <= 50 * n


def test_a_lane_that_ends_late_counts_with_the_time_it_took(monkeypatch, place):
    """One iteration of 0.3 s in a window of 0.05 s: 3.3 a second, not 20."""
    fake_measured(monkeypatch, step=lambda: time.sleep(0.3))
    rate = lanes_rate(place, 1, 0.05)
    assert 2 < rate <= 1 / 0.3


def test_lanes_are_networks_of_their_own(monkeypatch, place, recording):
    made, switch = [], set()

    def prepare(case, arm, dataset, *rest):
        made.append((workload.prepare(case, arm, dataset, *rest), dataset))
        switch.add(sys.getswitchinterval())
        return made[-1][0]

    monkeypatch.setattr(benchmark_cuda, "prepare", prepare)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    try:
        assert lanes_rate(place, 2, 0.1) > 0
        assert (switch, sys.getswitchinterval()) == ({SWITCH}, 0.004)
    finally:
        sys.setswitchinterval(interval)
    assert len(recording) == 2
    (one, images), (other, other_images) = made
    assert one.model is not other.model
    assert (images.seed, other_images.seed) == (0, 1)
    assert images.train_images.data_ptr() == other_images.train_images.data_ptr()


def test_lanes_are_all_that_holds_streams(tmp_path, monkeypatch, recording):
    """torch has 32 streams, and there are cases of 32 lanes."""
    inside, most = [], []

    @contextlib.contextmanager
    def own_stream(device):
        inside.append(device)
        most.append(len(inside))
        yield
        inside.pop()

    for module in (benchmark_cuda, benchmark_lanes):
        monkeypatch.setattr(module, "own_stream", own_stream)
    run(tmp_path, only=["lanes-r20-b8-mbn", "compiled-r20-b8"])
    assert (max(most), inside) == (2, [])
    assert most == [1, 2, 1]


def test_a_lane_that_fails_ends_the_case_with_what_was_measured(monkeypatch, place):
    made = []

    class Fake:
        in_mode = True

        def __init__(self, *_):
            made.append(self)
            if len(made) == 3:
                raise torch.OutOfMemoryError("it is full")

        def step(self):
            time.sleep(0.001)

        def wait(self):
            pass

    monkeypatch.setattr(benchmark_cuda, "prepare", Fake)
    found = benchmark_cuda.many(CASE, MBN2, (1, 2, 4), place, time.monotonic() + 100)
    assert list(found.rates) == [1, 2]
    assert found.missing == {"more lanes": "failed: OutOfMemoryError: it is full"}


# Images and pages.


def test_images_are_random_where_there_is_no_cifar(tmp_path, monkeypatch):
    dataset, arrays, what = benchmark_cuda.open_images(tmp_path, CPU, False, 64)
    assert what == f"random (no whole CIFAR-10 in the folder {tmp_path.name})"
    assert dataset.train_images.shape == arrays.train_images.shape == (64, 32, 32, 3)
    (tmp_path / "cifar-10-batches-py").mkdir()
    whole = benchmark_cuda.random_arrays(100, 32, 10)
    monkeypatch.setattr(benchmark_cuda.datasets, "load_cifar", lambda name, folder: whole)
    dataset, arrays, what = benchmark_cuda.open_images(tmp_path, CPU, False, 64)
    assert (len(dataset.train_labels), arrays, what) == (64, None, "CIFAR-10")
    assert benchmark_cuda.open_images(tmp_path, CPU, True, 64)[2] == "random (as asked for)"


def test_pictures_are_like_imagenets(tmp_path):
    benchmark_cuda.make_pictures(tmp_path, 66)
    files = sorted((tmp_path / "train").rglob("*.jpeg"))
    assert len(files) == 66
    sizes = [file.stat().st_size for file in files]
    assert 100e3 < sum(sizes) / len(sizes) < 120e3
    assert len({file.read_bytes() for file in files}) == 64


def outcomes():
    """In ms, ResNet-20: the plain loop 10, MBN recorded 2.1, compiled 2.0, BN 1.5; ResNet-56: BN 3.0, MBN 6."""
    compiled = Arm("mbn", 2, "graph")
    small, large, little = Case("resnet20", 128, 16), Case("resnet56", 128, 16), Case("resnet20", 8, 16)

    def ms(**found):
        return {name: [1e-3 * t, 1e-3 * t, 1.0] for name, t in found.items()}

    return {
        "r20-b128": Timed(small, ms(**{RECORDED.name: 1.5, MBN2.name: 2.1, PLAIN.name: 10, BASE.name: 0.1})),
        "compiled-r20-b128": Timed(small, ms(**{compiled.name: 2.0})),
        "bf16-r20-b128": Timed(small, ms(**{f"{compiled.name}, bf16": 0.1})),
        "r56-b128": Timed(large, ms(**{RECORDED.name: 3.0, MBN2.name: 6.0})),
        "lanes-r20-b8-bn": Many(little, RECORDED, {1: 100.0, 2: 199.0, 4: 350.0, 8: 340.0}),
        "lanes-r20-b8-mbn": Many(little, MBN2, {1: 100.0, 2: 199.0}),
        "lanes-r20-b128-bn": Many(small, RECORDED, {1: 100.0, 2: 130.0}),
        "compiled-lanes-r20-b8-mbn": Many(little, compiled, {1: 100.0, 4: 310.0}),
    }


def test_bars_are_met_missed_or_not_measured():
    found = {bar.text: (round(bar.value, 3), bar.verdict) for bar in bars(outcomes())}
    missing = [text for text, (_, verdict) in found.items() if verdict == "not measured"]
    lanes = "iterations/s, best number of lanes / one lane"
    assert {text: value for text, value in found.items() if text not in missing} == {
        "ResNet-20, batch 128: MBN, 2 forwards, graph / the plain loop": (0.2, "met"),
        "ResNet-56, batch 128: BN, 1 forward, graph, ms an iteration": (3.0, "met"),
        "ResNet-56, batch 128: MBN, 2 forwards, graph, ms an iteration": (6.0, "**missed**"),
        "ResNet-20, batch 128: MBN, 2 forwards / BN, 1 forward, graph": (1.333, "met"),
        "ResNet-56, batch 128: MBN, 2 forwards / BN, 1 forward, graph": (2.0, "**missed**"),
        f"ResNet-20, batch 8: BN 1 forward, graph-eager: {lanes}": (3.5, "met"),
        f"ResNet-20, batch 8: MBN 2 forwards, graph-eager: {lanes}": (1.99, "**missed**"),
        f"ResNet-20, batch 8: MBN 2 forwards, graph: {lanes}": (3.1, "met"),
        f"ResNet-20, batch 128: BN 1 forward, graph-eager: {lanes}": (1.3, "met"),
    }
    assert missing == [
        "ResNet-20, batch 8: MBN, 2 forwards / BN, 1 forward, graph",
        "ResNet-56, batch 8: MBN, 2 forwards / BN, 1 forward, graph",
        f"ResNet-56, batch 8: BN 1 forward, graph-eager: {lanes}",
        f"ResNet-56, batch 8: MBN 2 forwards, graph-eager: {lanes}",
        f"ResNet-20, batch 128: MBN 2 forwards, graph-eager: {lanes}",
        f"ResNet-56, batch 128: BN 1 forward, graph-eager: {lanes}",
        f"ResNet-56, batch 128: MBN 2 forwards, graph-eager: {lanes}",
    ]


def test_the_page_has_every_number():
    found = outcomes()
    for outcome in found.values():
        if isinstance(outcome, Timed):
            outcome.starts = dict.fromkeys(outcome.seconds, 1.0)
            outcome.memory = {key: {"allocated": 5e6, "reserved": 8e6} for key in outcome.seconds}
    found["lanes-r20-b8-bn"].missing["16 lanes and more"] = NO_TIME
    report = {
        **{"device": "cuda: Toy", "cores": 16, "versions": {"torch": "2.0"}, "date": "2026-01-01", "commit": None},
        **{"images": "CIFAR-10", "seconds": 200.0, "cases": {"loader": {"status": NO_TIME}}},
    }
    page = benchmark_cuda.page(report, found)
    assert "MBN, 2 forwards, graph / the plain loop | 0.200 | at most 0.20 | met |" in page
    assert "batch 8: MBN, 2 forwards / BN, 1 forward, graph | - | at most 1.45 | not measured |" in page
    assert "| plain loop | 10.000 (10.000 to 505.000) | 12800 | 6.67 (3.83 to 6.67) | 1.0 |" in page
    assert f"| {MBN2.name} | 5 | 8 |" in page
    assert "| 4 | 350.0 | 3.50 |" in page
    assert f"16 lanes and more: {NO_TIME}." in page
    assert page.endswith(f"## Not measured\n\n- loader: {NO_TIME}\n")


# The command.


def test_the_command_chooses_by_the_kind_of_device(monkeypatch, tmp_path, capsys):
    script, calls = load_script("benchmark"), []
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.setattr(benchmark_cuda, "run", lambda *given, **options: calls.append((given, options)))
    common = ["--device", "cuda", f"machine.data={tmp_path}", f"machine.results={tmp_path}"]
    assert script.main([*common, "--only", "r20-*,loader", "--skip", "r20-b8", "--limit", "0", "--random"]) == 0
    assert script.main(common) == 0
    given = (tmp_path, tmp_path / "benchmarks", torch.device("cuda"), script.models.build)
    assert calls == [
        (given, {"limit": 0.0, "only": ["r20-*", "loader"], "skip": ["r20-b8"], "random": True}),
        (given, {"limit": 300.0, "only": ["*"], "skip": [""], "random": False}),
    ]
    with pytest.raises(SystemExit):
        script.main(["--device", "cpu", "--limit", "5"])
    assert "are for CUDA, not for cpu" in capsys.readouterr().err
