"""reproduce.py: what it prints, and how it trains: side by side, within a budget, no run twice, and resumed."""

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_records
from running import load_script

from mbn import grid
from mbn.config import DATASETS, REPOSITORY, cores, load, run_name
from mbn.launch.missing_runs import runs
from mbn.launch.pool import Outcome
from mbn.records import record
from mbn.system import files

SCRIPT = REPOSITORY / "scripts" / "reproduce.py"


@pytest.fixture
def script():
    return load_script("reproduce")


@pytest.fixture
def here(script, capsys):
    """A function that runs reproduce.py in this process; its exit code, output and errors."""
    return lambda *arguments: (script.main([str(a) for a in arguments]), *capsys.readouterr())


@pytest.fixture
def dry(here):
    """A function that gives the commands of a dry run, as lists of overrides."""

    def call(*arguments):
        code, out, _ = here("--dry-run", *arguments)
        assert code == 0
        lines = [shlex.split(line) for line in out.splitlines()]
        assert all(line[:2] == ["python", "train.py"] for line in lines)
        return [line[2:] for line in lines]

    return call


@pytest.mark.parametrize(
    ("device", "driver", "visible", "expected"),
    [
        ("auto", True, None, True),
        ("auto", True, "0", True),
        ("auto", True, "", False),
        ("auto", True, "-1", False),
        ("auto", False, None, False),
        ("cpu", True, None, False),
        ("cuda", False, None, True),
    ],
)
def test_a_gpu_is_known_by_its_driver_and_stopped_later_before_the_budget_ends(
    script, monkeypatch, device, driver, visible, expected
):
    config, margins = load([f"machine.device={device}"]), []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: driver if str(path) == "/dev/nvidiactl" else exists(path))
    assert script.accelerated(config) == expected

    class NoPool:
        def __init__(self, missing, results, jobs, start, budget, margin, starting):
            margins.append(margin)

        def work(self):
            return Outcome()

    monkeypatch.setattr("mbn.launch.pool.Pool", NoPool)
    options = script.parser().parse_args(["table4"])
    assert script.train([], Path("results"), 1, [], config, options) == 0
    assert margins == [15.0 if expected else 60.0]


def wait_until(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(results):
    """Processes that train with this folder of results."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if "train.py" in line and f"machine.results={results}" in line]


# What it prints.


def test_results_that_are_not_there_are_said_to_be_new_and_not_made(here, tmp_path):
    for folder, new in ((tmp_path, False), (tmp_path / "typo", True)):
        code, _, err = here("table6", "--dry-run", f"machine.results={folder}")
        assert (code, f"{folder} is a new folder" in err) == (0, new)
    assert not list(tmp_path.iterdir())


def test_printed_commands_are_the_runs_that_are_meant(dry, tmp_path):
    results = f"machine.results={tmp_path}"
    lines = dry("table5", results, "--seeds", "2", "evaluate.precise=true", "--scale", "0.1")
    names = [run_name(load(line)) for line in lines]
    assert names == [run.name for run in runs(["table5"], range(2), scale=0.1)]
    assert names[:5] != [run.name for run in runs(["table5"], [0])]
    assert all(line[-2:] == [results, "evaluate.precise=true"] for line in lines)
    for more, seeds in (((), range(5)), (("--seed", "3"), [3])):
        lines = dry("table6", "norm.memory=10", *more, "machine.threads=1", "evaluate.rules=false", results)
        assert [line[-5] for line in lines] == [f"seed={seed}" for seed in seeds]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ("machine.device=cpu", ["precise=true", "rules=true"]),
        ("machine.device=cpu evaluate.rules=false", ["precise=true", "rules=false"]),
        ("machine.device=cuda", []),
        ("machine.device=cuda evaluate.rules=true", ["rules=true"]),
    ],
)
def test_controls_are_asked_for_on_a_cpu_unless_they_are_set(settings, asked, dry, tmp_path):
    (line,) = dry("table6", "norm.memory=10", "--seed", "0", *settings.split(), f"machine.results={tmp_path}")
    assert [word.removeprefix("evaluate.") for word in line if word.startswith("evaluate.")] == asked


@pytest.mark.parametrize(
    ("table", "jobs", "settings", "shares"),
    [
        ("table6", 3, "", ["threads=2"]),
        ("table3", 3, "", ["threads=2", "workers=2"]),  # its images are files, which each run decodes
        ("table3", 16, "", ["threads=1", "workers=1"]),
        ("table3", 3, "machine.workers=5", ["threads=2", "workers=5"]),
        ("table3", 3, "machine.workers=5 machine.threads=4", ["workers=5", "threads=4"]),
        ("table3", 1, "", []),
    ],
)
def test_runs_side_by_side_share_the_cores(table, jobs, settings, shares, dry, tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 8)
    line = dry(table, "--seed", "0", "--jobs", jobs, *settings.split(), f"machine.results={tmp_path}")[0]
    own = [word.removeprefix("machine.") for word in line if word.startswith(("machine.threads", "machine.workers"))]
    assert own == shares


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        ("", "no table", 2),
        ("tabel4", "no table 'tabel4': choose among", 2),
        ("table6 --budget 9", "--budget", 2),
        ("table6 --budget 9m --launcher slurm", "--budget", 2),
        ("table6 --jobs 2 --launcher slurm", "--jobs and --lanes", 2),
        ("table6 --no-lanes --launcher slurm", "--jobs and --lanes", 2),
        ("table6 --slurm gpus=1", "--launcher slurm", 2),
        ("table6 --gpus-per-run 4", "--launcher slurm", 2),
        ("table6 --seeds 0", "--seeds: must be a whole number from 1 to 10000", 2),
        ("table6 --seeds 10001", "--seeds: must be a whole number from 1 to 10000", 2),
        ("table6 --seed 4294967296", "--seed", 2),
        ("table6 --jobs many", "--jobs", 2),
        ("table6 --scale -1", "schedule.scale must be above 0", 2),
        ("table6 --sceds 2", "--sceds", 2),
        ("table6 norm=bn", "they have mbn", 2),
        ("table6 +norm.eps=1", "norm.eps", 2),
        ("table6 machine.again=true", "machine.again", 2),
        ("table6 machine.together=4", "--jobs N", 2),
        ("table6 machine.thread=1", "no setting", 2),
        ("--import nowhere", "cannot import", 2),
        ("--import=", "argument --import: must be a folder or an archive, not ''", 2),
        ("--import nowhere --dry-run", "--import writes records, and --dry-run writes nothing: give one", 2),
        ("--import nowhere table6 --dry-run", "--import writes records, and --dry-run writes nothing: give one", 2),
        ("--status table4 norm=bn", "leave out norm=bn", 2),
        ("--status tabel4", "no table 'tabel4': choose among", 2),
        ("--status machine.results=nowhere", "there is no folder", 2),
    ],
)
def test_mistakes_are_one_sentence(here, arguments, says, code):
    ended, out, error = here(*arguments.split())
    assert (ended, out) == (code, "")
    assert re.fullmatch(rf"error: .*{re.escape(says)}.*\.\n", error)


def test_a_table_whose_records_no_table_would_read_is_refused_before_it_trains(here, monkeypatch):
    monkeypatch.setitem(DATASETS, "imagenet", dataclasses.replace(DATASETS["imagenet"], in_tables=False))
    assert here("table4", "--dry-run", "--seed", "0")[0] == 0
    code, _, err = here("table3", "--dry-run")
    assert code == 1
    assert re.match(r"error: table3 has the data set imagenet.*: set in_tables=True", err)


def test_the_status_is_a_line_for_each_table(here, tmp_path):
    g = grid.read("table4")
    for row, column, seed in (("8", "BN", 0), ("8", "BN", 1), ("8", "MBN", 0), ("8", "MBN", 4)):
        toy_records.write(tmp_path, g.cell(row, column), seed, 8.0)
    toy_records.write(tmp_path, g.cell("16", "BN"), 0, 9.0, scale=0.1, seconds=360.0)
    before = sorted(tmp_path.rglob("*"))

    def lines(*arguments):
        code, out, _ = here("--status", *arguments, f"machine.results={tmp_path}")
        assert code == 0
        assert max(map(len, out.splitlines())) <= 100
        return [re.split(r"  +", line) for line in out.partition("\n\n")[0].splitlines()[1:]]

    # A run at batch 8 took half an hour; at other sizes the time for an image is that of these runs. Tables 1 and 4
    # share two runs of each seed.
    assert lines("table4", "table1", "--seeds", "2") == [
        ["table4", "3 of", "20", "60 h", "21 .. .. .. .."],
        ["table1", "0 of", "28", "48 h, 22 unknown", ".--. .... .... ...."],
        ["all, each once", "3 of", "44", "76 h, 22 unknown"],
    ]
    assert lines("table4", "--seed", "4")[0] == ["table4", "1 of", "10", "30 h", ".1 .. .. .. .."]
    assert lines("table4", "--seeds", "1", "--scale", "0.1")[0][1:] == ["1 of", "10", "3.0 h", ".. 1. .. .. .."]
    assert [line[0] for line in lines()] == [*grid.names(), "all, each once"]
    assert [line[0] for line in lines("all")] == [n for n in grid.names() if n != "table3"] + ["all, each once"]
    assert sorted(tmp_path.rglob("*")) == before


def test_starting_does_not_import_torch():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


def test_threads_are_divided(dry, tmp_path):
    common = ("table6", "--seed", "0", f"machine.results={tmp_path}", "machine.device=cpu")
    for jobs in ("auto", cores(), 2 * cores()):
        assert all("machine.threads=1" in line for line in dry(*common, "--jobs", jobs)) or cores() == 1
    for more in (("--jobs", "1"), ("--jobs", "2", "machine.threads=3")):
        wanted = [o for o in more if o.startswith("machine.threads")]
        assert all([o for o in line if o.startswith("machine.threads")] == wanted for line in dry(*common, *more))


@pytest.mark.parametrize(("seeds", "threads"), [(1, []), (2, ["machine.threads=8"]), (5, ["machine.threads=3"])])
def test_few_runs_share_all_cores(seeds, threads, dry, tmp_path, script, monkeypatch):
    monkeypatch.setattr(script, "cores", lambda: 16)
    settings = ("norm.memory=10", "machine.device=cpu", f"machine.results={tmp_path}")
    for line in dry("table6", "--seeds", seeds, *settings):
        assert [word for word in line if word.startswith("machine.threads")] == threads


# Training.


@pytest.mark.timeout(900)
def test_a_real_grid_is_killed_and_continued(checkout, write_toy):
    write_toy(checkout.toy, 8)
    checkout.folder, results = REPOSITORY, checkout.results
    command = ["toy", "--grids", str(checkout.toy.parent), "--jobs", "2", "--seeds", "2"]
    command += [f"machine.results={results}", "machine.device=cpu", "machine.mode=eager"]
    command += ["evaluate.rules=false", "evaluate.precise=false"]
    last = runs(["toy"], [1], folder=checkout.toy.parent)[-1]
    with files.lock(last.folder(results) / "lock"):  # so that it cannot end before the signal
        process = checkout.begin(*command)
        wait_until(lambda: list(results.rglob("events.out*")))
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate()
    assert process.returncode == 75, out + error
    assert not running(results)
    assert len(checkout.records()) < 4
    assert "the same command goes on" in out
    names = [path.parent.relative_to(results / "runs").as_posix() for path in checkout.checkpoints()]
    begun = [name for name in names if not record.path_of(results, name).exists()]
    checkout.call(*command)
    assert "".join(checkout.logs()).count("resuming at iteration") == len(begun)
    assert [record.read(path)["iterations"] for path in checkout.records()] == [8] * 4
    assert checkout.call(*command, "--dry-run")[0] == ""


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_stops_all_with_checkpoints(checkout, number, code):
    held = checkout.hold()
    process = checkout.begin("toy", "--seeds", "2", "--jobs", "2")
    wait_until(lambda: len(checkout.checkpoints()) == 2)
    process.send_signal(getattr(signal, number))
    out, error = process.communicate()
    assert process.returncode == code, out + error
    assert not checkout.records()
    assert "4 are left, 2 of them begun" in out
    assert all(0 < int(path.read_text()) < 12 for path in checkout.checkpoints())
    assert all("stopped." in log for log in checkout.logs())  # by itself, not killed
    if number == "SIGTERM":
        held.unlink()
        checkout.call("toy", "--seeds", "2", "--jobs", "4")
        assert len(checkout.records()) == 4
        assert len(checkout.starts()) == 6


def test_a_second_signal_kills_at_once(checkout):
    (checkout.folder / "train.py").write_text(
        "import signal, time\n"
        "for n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, lambda *_: print('asked', flush=True))\n"
        "print('deaf', flush=True)\ntime.sleep(600)"
    )
    process = checkout.begin("toy", "--jobs", "2", f"machine.results={checkout.results}")
    wait_until(lambda: checkout.logs() == ["deaf\n"] * 2)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: checkout.logs() == ["deaf\nasked\n"] * 2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    process.communicate()
    wait_until(lambda: not running(checkout.results))


def test_a_failed_run_does_not_stop_the_rest(checkout, write_toy):
    write_toy(checkout.toy, 12, 'cells:\n  BN/ResNet-20: ["schedule.lr=[1e30]"]\n')
    out, error = checkout.call("toy", "--seeds", "2", "--jobs", "2", code=1)
    assert len(checkout.records()) == 2
    assert "2 of 4 runs failed" in error
    assert out.count(": failed: ") == error.count("no space is left") == 2
    for line in error.splitlines()[-2:]:
        log = Path(line.partition("(log: ")[2].removesuffix(")"))
        assert "no space is left" in log.read_text()


def test_a_run_that_diverges_is_done_and_is_not_trained_again(checkout, write_toy):
    write_toy(checkout.toy, 12, 'cells:\n  BN/ResNet-20: ["schedule.lr=[1e20]"]\n')
    out, _ = checkout.call("toy", "--seeds", "1", "--jobs", "2")
    assert out.endswith("2 of 2 runs are done, 1 of which diverged.\n")
    assert re.search(r": diverged at iteration 3 of 12, 0 s$", out, re.MULTILINE)
    starts = (checkout.results / "starts").read_text()
    assert checkout.call("toy", "--seeds", "1")[0] == "2 of 2 runs have their record.\n"
    assert (checkout.results / "starts").read_text() == starts
    out, _ = checkout.call("toy", "--status", "--seeds", "1")
    assert "toy               2 of   2  nothing" in out


def test_the_budget_stops_all_and_a_later_call_goes_on(checkout):
    """When it stops them, to the look: test_pool.py. A slow machine has begun fewer by then."""
    held = checkout.hold()
    out, _ = checkout.call("toy", "--seeds", "1", "--jobs", "2", "--budget", "11s")
    assert f"the budget of 11 s is spent: 2 are left, {len(checkout.checkpoints())} of them begun" in out
    assert not checkout.records()
    starts = checkout.starts()
    checkout.call("toy", "--seeds", "1", "--budget", "2s")  # too little time to begin anything
    assert checkout.starts() == starts
    held.unlink()
    out, _ = checkout.call("toy", "--seeds", "1", "--jobs", "2", "--budget", "1h")
    assert "2 of 2 runs are done" in out
    assert "left" not in out


def test_two_at_once_share_the_work(checkout):
    both = [checkout.begin("toy", "--seeds", "2", "--jobs", "2") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sorted(checkout.starts()) == sorted(set(checkout.starts()))
    assert len(checkout.starts()) == len(checkout.records()) == 4
    assert all("4 of 4 runs are done" in out for out, _ in outputs)


def test_a_run_whose_holder_died_is_taken_over(checkout):
    held, command = checkout.hold(), ("toy", "--seed", "0", "--jobs", "2")
    holder = checkout.begin(*command)
    wait_until(lambda: len(checkout.checkpoints()) == 2)
    other = checkout.begin(*command)
    assert any("waiting for 2 runs" in line for line in other.stdout)
    holder.send_signal(signal.SIGTERM)
    output = holder.communicate()
    assert holder.returncode == 75, output
    held.unlink()
    output = other.communicate()
    assert other.returncode == 0, output
    assert len(checkout.records()) == 2
    assert len(checkout.starts()) == 4


def test_results_may_be_in_a_folder_with_signs_in_its_name(checkout, tmp_path):
    checkout.results = tmp_path / "my results, (1)=ü"
    checkout.call("toy", "--seed", "0", f"machine.results='{checkout.results}'")
    assert len(checkout.records()) == 2


def test_records_are_imported_and_those_refused_are_named(checkout, tmp_path):
    checkout.call("toy", "--seed", "0", f"machine.results={tmp_path / 'there'}")
    for path in (tmp_path / "there").rglob("records/**/mbn*.json"):
        record.rewrite(path, dirty=True)
    out, error = checkout.call("--import", str(tmp_path / "there"), code=1)
    assert re.fullmatch(r"digits/resnet20/bn-f1-\S+\n1 records imported\.\n", out)
    assert re.fullmatch(r"refused: \S+mbn\S+json .*--allow-dirty\.\n", error)
    out, _ = checkout.call("--import", str(tmp_path / "there"), "--allow-dirty")
    assert re.fullmatch(r"digits/resnet20/mbn-f\S+\n1 records imported, 1 were here already\.\n", out)
