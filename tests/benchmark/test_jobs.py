"""The runner of jobs, the page and the bars, and benchmark.py."""

import json
import re
import time
from itertools import repeat

import pytest
import torch
from little_work import CASE, CPU, EMPTY, MBN2, SIZES, build
from running import load_script

from mbn.benchmark import imagenet_loader, jobs, suites
from mbn.benchmark.jobs import NO_TIME, Job
from mbn.benchmark.page import CPU_BARS, CUDA_BARS, page
from mbn.benchmark.side_by_side import Rates
from mbn.benchmark.timing import Timed
from mbn.benchmark.workload import BASE, CAPTURED, PAIR, PLAIN, Arm, Case, Setup, arms
from mbn.system.errors import UserError
from mbn.training import iteration

script = load_script("benchmark")
CUDA_JOBS = [
    *("r20-b8", "lanes-r20-b8-bn", "lanes-r20-b8-mbn", "compiled-r20-b8", "bf16-r20-b8"),
    *("compiled-lanes-r20-b8-bn", "compiled-lanes-r20-b8-mbn", "resnet50", "loader"),
    *("profile-r20-b8-bn", "profile-r20-b8-mbn", "profile-lanes-r20-b8-bn", "profile-lanes-r20-b8-mbn"),
]


def run(build=build, limit=300.0, **options):
    return jobs.run(suites.on_cuda(SIZES), Setup(EMPTY, CPU, build, SIZES), limit, **options)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    monkeypatch.setattr(script.models, "build", build)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")


def test_all_jobs_of_a_gpu_are_done_and_written_one_by_one(tmp_path, monkeypatch, capsys, graphs):
    """The CPU stands for the GPU."""
    monkeypatch.setattr(script.suites, "on_cpu", lambda: suites.on_cuda(SIZES))
    files = []
    write = jobs.write_atomically
    monkeypatch.setattr(jobs, "write_atomically", lambda path, content: files.append(content) or write(path, content))
    assert script.main(["--device", "cpu", f"machine.data={EMPTY}", f"machine.results={tmp_path}"], SIZES) == 0
    files = [json.loads(content, parse_constant=pytest.fail) for content in files]
    assert [list(file["cases"]) for file in files] == [CUDA_JOBS[: i + 1] for i in range(len(CUDA_JOBS))]
    cases = files[-1]["cases"]
    assert {name: case["status"] for name, case in cases.items()} == dict.fromkeys(CUDA_JOBS, "done")
    assert files[-1]["images"] == "random (no whole CIFAR-10 in the folder nothing-here)"
    found = {name: set(case["seconds"]) for name, case in cases.items() if "seconds" in case}
    graphs = {arm.name for arm in arms(PAIR, "graph-eager", "graph")}
    assert found == {
        "r20-b8": {arm.name for arm in (*arms(PAIR, "graph-eager", "eager"), PLAIN)},
        "compiled-r20-b8": graphs,
        "bf16-r20-b8": {CAPTURED.name} | {f"{name}, bf16" for name in graphs},
        "resnet50": {f"{name}, bf16" for name in graphs if "eager" in name},
    }
    assert all(len(s) == 2 and min(s) > 0 for case in cases.values() for s in case.get("seconds", {}).values())
    for name, case in cases.items():
        if name.startswith("profile"):
            assert case["iterations"] >= case["lanes"] == 1 + ("lanes" in name)
        elif "lanes" in name:
            assert list(case["rates"]) == ["1", "2"]
            assert min(case["rates"].values()) > 0
    assert cases["loader"]["rate"] > 0
    printed = capsys.readouterr().out
    assert [line.partition(" ")[0] for line in printed.splitlines() if " s): " in line] == CUDA_JOBS
    (text,) = (tmp_path / "benchmarks").glob("*.md")
    assert text.read_text() in printed
    assert all(f"\n## {name}\n" in text.read_text() for name in CUDA_JOBS)


def test_skipped_jobs_are_reported_with_the_reason(capsys, graphs):
    report, findings = run(only="lanes-*,loader", skip="*-bn,")
    status = {name: case["status"] for name, case in report["cases"].items()}
    assert status == dict.fromkeys(CUDA_JOBS, "skipped: not asked for") | {"lanes-r20-b8-mbn": "done", "loader": "done"}
    assert "\n## Not measured\n\n- r20-b8: skipped: not asked for\n" in page(report, findings, [])
    report, _ = run(limit=0, skip="loader")
    assert {case["status"] for name, case in report["cases"].items() if name != "loader"} == {NO_TIME}
    assert re.search(rf"^r20-b8 \([\d.]+ s\): {NO_TIME}$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(UserError, match=r"no job is named r99\*: there are r20-b8, "):
        run(only="r99*")


def test_a_job_has_its_own_limit_within_that_of_all(monkeypatch, setup):
    monkeypatch.setattr(jobs.time, "monotonic", lambda: 1000.0)
    given = []
    work = lambda setup, deadline: given.append(deadline) or Rates(CASE, MBN2)  # noqa: E731
    jobs.run([Job("short", 5, work), Job("long", 50, work)], setup, 20)
    assert given == [1005, 1020]


def test_failures_are_reported_and_the_rest_goes_on(monkeypatch, capsys, graphs):
    """Too little memory for ResNet-50, no compiler, and a loader that fails."""

    def full(*, builder, **rest):
        if builder.endswith("resnet50"):
            raise torch.OutOfMemoryError("it is full")
        return build(**rest)

    def no_compiler(method, kind):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(iteration, "compiled", no_compiler)
    monkeypatch.setattr(imagenet_loader, "make_pictures", lambda *_: 1 / 0)
    cases = run(full, only="compiled-*,lanes-*-bn,resnet50,loader", skip="*-mbn")[0]["cases"]
    assert cases["loader"]["status"] == "failed: ZeroDivisionError: division by zero"
    assert set(cases["resnet50"]["missing"].values()) == {"failed: OutOfMemoryError: it is full"}
    why = "failed: RuntimeError: no compiler"
    assert cases["compiled-r20-b8"]["missing"] == {"BN 1 forward, graph": why, "MBN 2 forwards, graph": why}
    assert len(cases["compiled-r20-b8"]["seconds"][MBN2.name]) == 2
    assert cases["compiled-lanes-r20-b8-bn"]["missing"] == {"more lanes": why}
    status = {name: case["status"] for name, case in cases.items()}
    assert [name for name, text in status.items() if text == "done"] == ["lanes-r20-b8-bn"]
    assert f"  BN 1 forward, graph: {why}\n" in capsys.readouterr().out


def test_numbers_are_written_to_five_digits(tmp_path):
    jobs.write_report(tmp_path / "report.json", {"rates": {8: (2 / 3e6, 123456)}})
    assert json.loads((tmp_path / "report.json").read_text()) == {"rates": {"8": [6.6667e-07, 123456]}}


# Bars.


def timed(case, **ms):
    seconds = {name: [1e-3 * t, 1e-3 * t, 1.0] for name, t in ms.items()}
    return Timed(case, seconds, dict.fromkeys(seconds, 1.0), dict.fromkeys(seconds, 5_000_000))


def on_gpu():
    """In ms, ResNet-20: the plain loop 10, MBN captured 2.1, compiled 2.0, BN 1.5; ResNet-56: BN 3.0, MBN 6."""
    compiled = Arm("mbn", 2, "graph")
    small, large, little = Case("resnet20", 128, 16), Case("resnet56", 128, 16), Case("resnet20", 8, 16)
    return {
        "r20-b128": timed(small, **{CAPTURED.name: 1.5, MBN2.name: 2.1, PLAIN.name: 10, BASE.name: 0.1}),
        "compiled-r20-b128": timed(small, **{compiled.name: 2.0}),
        "bf16-r20-b128": timed(small, **{f"{compiled.name}, bf16": 0.1}),
        "r56-b128": timed(large, **{CAPTURED.name: 3.0, MBN2.name: 6.0}),
        "lanes-r20-b8-bn": Rates(little, CAPTURED, {1: 100.0, 2: 199.0, 4: 350.0, 8: 340.0}),
        "lanes-r20-b8-mbn": Rates(little, MBN2, {1: 100.0, 2: 199.0}),
        "lanes-r20-b128-bn": Rates(small, CAPTURED, {1: 100.0, 2: 130.0}),
        "compiled-lanes-r20-b8-mbn": Rates(little, compiled, {1: 100.0, 4: 310.0}),
    }


def test_the_page_has_every_number_and_says_which_bars_are_met():
    found = on_gpu()
    found["lanes-r20-b8-bn"].missing["16 lanes and more"] = NO_TIME
    report = {
        **{"device": "cuda: Toy", "cores": 16, "versions": {"torch": "2.0"}, "date": "2026-01-01", "commit": None},
        **{"images": "CIFAR-10", "seconds": 200.0, "cases": {"loader": {"status": NO_TIME}}},
    }
    text = page(report, found, CUDA_BARS)
    assert "| plain loop | 10 (10 to 505) | 12800 | 6.67 (3.83 to 6.67) | 1.0 | 5.0 |" in text
    assert "| 4 | 350.0 | 3.50 |" in text
    assert f"16 lanes and more: {NO_TIME}." in text
    assert text.endswith(f"## Not measured\n\n- loader: {NO_TIME}\n")
    bars = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| ResNet-"))
    missing = [value for value in bars.values() if value.endswith("not measured")]
    lanes = "iterations/s, best number of lanes / one lane"
    assert {text: value for text, value in bars.items() if value not in missing} == {
        "ResNet-20, batch 128: MBN, 2 forwards, graph / the plain loop": "0.200 | at most 0.20 | met",
        "ResNet-56, batch 128: BN, 1 forward, graph, ms an iteration": "3.000 | at most 3.50 | met",
        "ResNet-56, batch 128: MBN, 2 forwards, graph, ms an iteration": "6.000 | at most 5.00 | **missed**",
        "ResNet-20, batch 128: MBN, 2 forwards / BN, 1 forward, graph": "1.333 | at most 1.45 | met",
        "ResNet-56, batch 128: MBN, 2 forwards / BN, 1 forward, graph": "2.000 | at most 1.45 | **missed**",
        f"ResNet-20, batch 8: BN 1 forward, graph-eager: {lanes}": "3.500 | at least 3.00 | met",
        f"ResNet-20, batch 8: MBN 2 forwards, graph-eager: {lanes}": "1.990 | at least 3.00 | **missed**",
        f"ResNet-20, batch 8: MBN 2 forwards, graph: {lanes}": "3.100 | at least 3.00 | met",
        f"ResNet-20, batch 128: BN 1 forward, graph-eager: {lanes}": "1.300 | at least 1.30 | met",
    }
    assert set(missing) == {f"- | at {at} | not measured" for at in ("most 1.45", "least 3.00", "least 1.30")}


def test_the_bars_of_a_cpu():
    """In ms: every arm 100, the plain loop 50; batch 8 in the time of batch 128."""
    ms = dict.fromkeys((arm.name for arm in suites.ON_CPU), 100) | {PLAIN.name: 50}
    findings = {name: timed(CASE, **ms) for name in ("r20-b128", "r20-b8", "r20-b128-one-thread")}
    wanted = [("1.000", "met")] * 11
    wanted[3] = ("2.000", "**missed**")  # to the plain loop
    wanted[7] = ("16.000", "**missed**")  # one thread
    assert [(value, verdict) for _, value, _, verdict in map(cells, CPU_BARS, repeat(findings))] == wanted
    assert {verdict for *_, verdict in map(cells, CPU_BARS, repeat({}))} == {"not measured"}


def cells(bar, findings):
    return bar.row(findings).strip("| ").split(" | ")


# The command.


@pytest.mark.parametrize(("device", "limit"), [("cpu", 3600), ("cuda", 300)])
def test_the_command_chooses_by_the_kind_of_device(monkeypatch, tmp_path, device, limit):
    calls = []

    def run(todo, setup, *options):
        calls.append((todo[0].name, len(todo), setup.folder, setup.random, *options[:3]))
        raise UserError("enough")

    monkeypatch.setattr(script.jobs, "run", run)
    monkeypatch.setattr(script, "file_stem", lambda device: device.type)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    common = ["--device", device, f"machine.data={tmp_path}", f"machine.results={tmp_path}"]
    assert script.main([*common, "--only", "r20-*,loader", "--skip", "r20-b8", "--limit", "0.5", "--random"]) == 1
    assert script.main(common) == 1
    first = ("r20-b128", 3) if device == "cpu" else ("r20-b8", 42)
    assert calls == [
        (*first, tmp_path, True, 0.5, "r20-*,loader", "r20-b8"),
        (*first, tmp_path, False, limit, "*", ""),
    ]


@pytest.mark.parametrize("part", [["--only", "a"], ["--skip", "b"], ["--limit", "9"], ["--limit", "9999"], []])
def test_a_part_does_not_take_the_place_of_a_whole_measurement(part, monkeypatch, tmp_path):
    def run(todo, setup, limit, only, skip, path):
        jobs.write_report(path, {})
        return {"cases": {"a": {"status": "done"}}}, {}

    monkeypatch.setattr(script.jobs, "run", run)
    monkeypatch.setattr(script, "page", lambda *_: "")
    assert script.main(["--device", "cpu", f"machine.results={tmp_path}", *part], SIZES) == 0
    found = list((tmp_path / "benchmarks").iterdir())
    assert len(found) == 2
    assert {path.stem.endswith("-part") for path in found} == {part not in ([], ["--limit", "9999"])}


def test_quick_prints_a_table_and_writes_nothing(tmp_path, capsys):
    given = ("--quick", "--device", "cpu", f"machine.data={EMPTY}", f"machine.results={tmp_path}")
    assert script.main(list(given), SIZES) == 0
    out = capsys.readouterr().out
    assert all(f"\n| {arm.name} | " in out for arm in (*suites.EAGER, PLAIN))
    assert not list(tmp_path.iterdir())


DEVICES = "must be auto, cpu, cuda, cuda:N or mps"
WRONG_OPTIONS = [
    *[(f"--device={device}", f"{DEVICES}, not '{device}'") for device in ("foo", "cuda:x", "")],
    *[(f"--limit={limit}", f"must be a number above 0, not '{limit}'") for limit in ("-1", "0", "nan", "x")],
]


@pytest.mark.parametrize(("option", "said"), WRONG_OPTIONS)
@pytest.mark.parametrize("name", ["benchmark", "check_gpu"])
def test_a_wrong_option_is_one_sentence(name, option, said, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("it began"))
    assert load_script(name).main([option]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"argument {option.partition('=')[0]}: {said}; --help" in err


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps"])
def test_a_device_that_is_not_there_is_one_sentence(device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(script.jobs, "run", lambda *_: pytest.fail("it began"))
    assert script.main(["--quick", "--device", device]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: there is no {device} here: ")
    assert err.count("\n") == 1


def test_jobs_that_fail_or_have_no_time_end_with_exit_code_1(monkeypatch, capsys):
    given = ["--quick", "--device", "cpu", f"machine.data={EMPTY}"]
    assert script.main([*given, "--limit", "1e-9"], SIZES) == 1
    assert NO_TIME in capsys.readouterr().out

    def broken(**_):
        raise RuntimeError("broken")

    monkeypatch.setattr(script.models, "build", broken)
    assert script.main(given, SIZES) == 1
    assert "failed: RuntimeError: broken" in capsys.readouterr().out


def test_runs_side_by_side_are_part_of_the_cpus_benchmark(monkeypatch, setup):
    """Processes at the same time; the first measurement is of one run with all threads."""
    monkeypatch.setattr(suites, "cores", lambda: 2)
    *_, job = suites.on_cpu()
    assert job.name == "processes-r20-b8"
    found = job.work(setup, time.monotonic() + 200)
    assert list(found.rates) == [1, 2]
    assert min(found.rates.values()) > 0
    assert job.work(setup, 0.0).missing == {"1 at once": NO_TIME, "2 at once": NO_TIME}
