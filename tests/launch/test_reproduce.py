"""Which runs reproduce.py means, and how it trains them: together, in time, never twice, and to be gone on with."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from mbn import grid
from mbn.config import REPOSITORY, load, run_name
from mbn.launch import missing_runs
from mbn.launch import slurm as cluster
from mbn.records import record
from mbn.records.import_records import gather
from mbn.system.errors import UserError

SCRIPT = REPOSITORY / "scripts" / "reproduce.py"
TOY = """
title: Toy
about: Toy.
base: [dataset=digits, model=resnet20, batch_size=64, schedule.iterations={iterations}]
rows:
  BN: [norm=bn]
  MBN: [norm=mbn, forwards=1]
columns:
  ResNet-20: []
"""
# As train.py seen from outside, without torch: a lock, a checkpoint, a record, the exit codes; 0.1 s an iteration.
FAKE = """
import sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
from mbn import config, files, record, signals
from mbn.errors import UserError

def train(cfg):
    name = config.run_name(cfg)
    results = Path(cfg.machine.results)
    folder = results / "runs" / name
    if record.path_of(results, name).exists():
        return
    with files.lock(folder / "lock"), signals.Stop() as stop:
        with (results / "starts").open("a") as file:
            file.write(name + "\\n")
        if cfg.schedule.lr == [1e30]:
            raise UserError("training diverged: try a smaller schedule.lr.")
        saved = folder / "checkpoint.pt"
        for i in range(int(saved.read_text()) if saved.exists() else 0, config.iterations(cfg)):
            time.sleep(0.1)
            saved.write_text(str(i + 1))
            if stop.code is not None:
                time.sleep(0.5)  # saving: a second signal would end it before it says so
                raise UserError("stopped.", code=stop.code)
        content = dict.fromkeys(record.FIELDS, 0.0) | {
            "name": name, "config": record.config_for_record(cfg), "iterations": config.iterations(cfg),
            "test_error_precise": None, "commit": "c" * 40, "dirty": False, "curves": {}}
        record.write(results, content)

try:
    train(config.load(sys.argv[1:]))
except UserError as error:
    print(f"error: {error}")
    sys.exit(error.code)
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the scripts with a toy grid of 2 methods, and a train.py that only pretends."""
    folder = tmp_path / "checkout"
    for part in ("mbn", "configs", "scripts"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(folder / "scripts" / "grids")
    grids = folder / "scripts" / "grids"
    grids.mkdir()
    (grids / "toy.yaml").write_text(TOY.format(iterations=12))
    (folder / "train.py").write_text(FAKE)
    return folder


BEGUN = []


@pytest.fixture(autouse=True)
def _nothing_left():
    """What a failed test leaves running is stopped."""
    yield
    for process in BEGUN:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate()
    BEGUN.clear()


def begin(checkout, *arguments):
    """Start reproduce.py of a checkout."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    BEGUN.append(subprocess.Popen([sys.executable, checkout / "scripts" / "reproduce.py", *arguments], **pipes))
    return BEGUN[-1]


def call(checkout, *arguments, code=0):
    """Run reproduce.py of a checkout to its end; its output."""
    process = begin(checkout, *arguments)
    out, error = process.communicate()
    assert process.returncode == code, out + error
    assert "Traceback" not in error
    return out, error


def refusal(checkout, *arguments):
    out, error = call(checkout, *arguments, code=2)
    assert not out
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith(".\n")
    return error


def dry(*arguments):
    """The commands of a dry run in this checkout, as lists of overrides."""
    out, _ = call(REPOSITORY, "--dry-run", *arguments)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert all(line[:2] == ["python", "train.py"] for line in lines)
    return [line[2:] for line in lines]


def records(folder):
    return sorted(folder.rglob("records/**/*.json"))


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(results):
    """Processes that train with this folder of results."""
    listed = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in listed if "train.py" in line and f"machine.results={results}" in line]


# Which runs.


@pytest.mark.parametrize(
    ("table", "count"), [("table4", 10), ("table1", 14), ("table2", 14), ("table5", 5), ("table6", 3)]
)
def test_a_dry_run_prints_what_is_missing(table, count, tmp_path):
    lines = dry(table, "--seeds", "1", "--results", str(tmp_path))
    assert len(lines) == count
    assert all(f"machine.results={tmp_path}" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_printed_commands_are_the_runs_that_are_meant(tmp_path):
    lines = dry("table5", "--seeds", "2", "--results", str(tmp_path), "--scale", "0.1", "--", "evaluate.precise=true")
    names = [run_name(load(line)) for line in lines]
    assert names == [run.name for run in missing_runs.runs(["table5"], range(2), scale=0.1)]
    assert names[:5] != [run.name for run in missing_runs.runs(["table5"], [0])]


def test_all_is_everything_but_imagenet_and_a_shared_run_stands_once(tmp_path):
    for name in ("table1", "table3", "table6"):
        shutil.copy(REPOSITORY / "scripts" / "grids" / f"{name}.yaml", tmp_path)
    names = [run.name for run in missing_runs.runs(["all"], [0], folder=tmp_path)]
    assert not any(name.startswith("imagenet") for name in names)
    # ResNet-20 with MBN and a memory of 20 stands in both.
    assert len(set(names)) == len(names) == 14 + 3 - 1
    assert set(missing_runs.NOT_IN_ALL) < set(grid.names())


def test_order_is_all_cells_with_one_seed_then_with_the_next():
    runs = missing_runs.runs(["table6", "table5"], [0, 1, 2])
    assert [run.config.seed for run in runs] == [0] * 8 + [1] * 8 + [2] * 8
    assert [run.config.model.name for run in runs[:8]] == ["resnet20"] * 3 + ["resnet56"] * 5
    assert all(f"seed={run.config.seed}" in run.overrides and run_name(run.config) == run.name for run in runs)


def test_seeds_by_default_and_one_alone(tmp_path):
    lines = dry("table6", "norm.memory=10", "--results", str(tmp_path))
    assert [[o for o in line if o.startswith("seed")] for line in lines] == [[f"seed={s}"] for s in range(5)]
    assert all("seed=3" in line for line in dry("table6", "--seed", "3", "--results", str(tmp_path)))


@pytest.mark.parametrize(
    ("tables", "filters", "count"),
    [
        (["table4"], ["norm=bn,mbn", "batch_size=8"], 2),
        (["table4"], ["norm=mbn"], 5),
        (["table4"], ["batch_size=8,128"], 4),
        (["table1"], ["model=nin,vgg16", "norm=mbn"], 2),
        (["table5"], ["norm.lam=[0.1],[0.1,0.5,0.9]"], 2),
        (["table6", "table1"], ["norm.memory=20"], 4),
        (["table1"], ["schedule.iterations=78200", "optimizer.weight_decay=1e-4"], 14),
    ],
)
def test_filters(tables, filters, count):
    assert len(missing_runs.runs(tables, [0], filters)) == count


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (["nrom=bn"], "no setting 'nrom'"),
        (["norm.size=3"], "no setting 'norm.size'"),
        (["schedule=cifar10"], "no setting 'schedule'"),
        (["norm=bn,brn"], "norm=brn: they have bn, mbn"),
        (["seed=1"], "--seed"),
        (["machine.threads=2"], "behind --"),
        (["norm="], "cannot read"),
        (["norm.memory=20", "norm=bn"], "at once"),
    ],
)
def test_filters_that_mean_nothing(filters, says):
    with pytest.raises(UserError) as caught:
        missing_runs.runs(["table4"], [0], filters)
    assert says in str(caught.value)


def test_settings_behind_the_dashes_never_change_which_runs_are_meant(checkout):
    for text in ("norm=bn", "seed=4", "schedule.epochs=3", "+norm.eps=1"):
        assert "only machine.* and evaluate.*" in refusal(checkout, "toy", "--", text)
    assert "--results" in refusal(checkout, "toy", "--", "machine.results=/tmp")
    assert "machine.again" in refusal(checkout, "toy", "--", "machine.again=true")
    assert "no setting" in refusal(checkout, "toy", "--", "machine.thread=1")
    out, _ = call(checkout, "toy", "--jobs", "2", "--dry-run", "--", "machine.threads=3", "evaluate.precise=true")
    assert all(line.endswith("machine.threads=3 evaluate.precise=true") for line in out.splitlines())
    assert out.count("machine.threads") == 10


def test_mistakes_are_one_sentence(checkout):
    assert "no table" in refusal(checkout)
    _, error = call(checkout, "tabel4", code=1)
    assert error == "error: there is no table 'tabel4': choose among toy, or all.\n"
    assert "--budget" in refusal(checkout, "toy", "--budget", "9")
    assert "--seeds" in refusal(checkout, "toy", "--seeds", "0")
    assert "--jobs" in refusal(checkout, "toy", "--jobs", "many")
    assert "--scale" in refusal(checkout, "toy", "--scale", "-1")
    assert "--sceds" in refusal(checkout, "toy", "--sceds", "2")


def test_starting_does_not_import_torch():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


def a_record(results, *overrides, **fields):
    config = load(["dataset=digits", *overrides])
    content = dict.fromkeys(record.FIELDS, 0.0) | {
        "name": run_name(config),
        "config": record.config_for_record(config),
        "commit": "c" * 40,
        "dirty": False,
        "curves": {},
    }
    return record.write(results, content | fields)


def test_the_estimate_is_from_records_of_the_same_kind_else_of_the_same_network(tmp_path):
    length = "schedule.iterations=100"
    for seed, seconds in enumerate((10.0, 20.0, 90.0)):
        a_record(tmp_path, "batch_size=8", length, f"seed={seed}", seconds=seconds, images=800)
    (tmp_path / "records" / "broken.json").write_text("{")
    estimate = missing_runs.Estimate(tmp_path)
    assert estimate.seconds(load(["dataset=digits", "batch_size=8", "schedule.iterations=1000"])) == pytest.approx(200)
    other = load(["dataset=digits", "norm=bn", "batch_size=16", "schedule.iterations=1000"])
    assert estimate.seconds(other) == pytest.approx(400)
    assert estimate.seconds(load(["dataset=digits", "model=vgg16"])) is None


# Training.


def test_a_real_grid_is_killed_and_gone_on_with(tmp_path):
    grids, results = tmp_path / "grids", tmp_path / "results"
    grids.mkdir()
    (grids / "toy.yaml").write_text(TOY.format(iterations=8))
    settings = ["--grids", str(grids), "--results", str(results), "--jobs", "2", "--seeds", "2"]
    settings += ["--", "machine.device=cpu", "machine.mode=eager", f"machine.data={tmp_path}"]
    process = begin(REPOSITORY, "toy", *settings)
    wait_until(lambda: list(results.rglob("events.out*")), seconds=200)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 75, out + error
    assert not running(results)
    assert 0 <= len(records(results)) < 4
    assert "the same command goes on" in out
    out, error = call(REPOSITORY, "toy", *settings)
    assert len(records(results)) == 4
    assert "resuming at iteration" in "".join(path.read_text() for path in results.rglob("log.txt"))
    for path in records(results):
        assert record.read(path)["iterations"] == 8
    assert dry("toy", *settings) == []


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGUSR1", 75), ("SIGUSR2", 75)])
def test_a_signal_stops_all_with_checkpoints(checkout, number, code):
    results = checkout / "results"
    process = begin(checkout, "toy", "--seeds", "2", "--jobs", "2")
    wait_until(lambda: len(list(results.rglob("checkpoint.pt"))) == 2)
    process.send_signal(getattr(signal, number))
    out, error = process.communicate()
    assert process.returncode == code, out + error
    assert not records(results)
    assert "4 are left, 2 of them begun" in out
    reached = [int(path.read_text()) for path in results.rglob("checkpoint.pt")]
    assert all(0 < i < 12 for i in reached)
    for path in results.rglob("log.txt"):
        assert "stopped." in path.read_text()  # by itself, not killed
    if number != "SIGTERM":
        return
    call(checkout, "toy", "--seeds", "2", "--jobs", "4")
    assert len(records(results)) == 4
    assert len((results / "starts").read_text().splitlines()) == 6


def test_a_second_signal_kills_at_once(checkout):
    (checkout / "train.py").write_text(
        "import signal, time\nfor n in (signal.SIGTERM, signal.SIGINT): signal.signal(n, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\ntime.sleep(100)"
    )
    process = begin(checkout, "toy", "--jobs", "2", "--results", str(checkout / "deaf"))
    wait_until(lambda: [p.read_text() for p in checkout.rglob("log.txt")] == ["deaf\n"] * 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.communicate()
    wait_until(lambda: not running(checkout / "deaf"), 10)


def test_a_failed_run_does_not_stop_the_rest(checkout):
    toy = checkout / "scripts" / "grids" / "toy.yaml"
    toy.write_text(toy.read_text() + 'cells:\n  BN/ResNet-20: ["schedule.lr=[1e30]"]\n')
    out, error = call(checkout, "toy", "--seeds", "2", "--jobs", "2", code=1)
    assert len(records(checkout)) == 2
    assert "2 of 4 runs failed" in error
    assert error.count("training diverged") == 2
    for line in error.splitlines()[-2:]:
        log = Path(line.partition("(log: ")[2].removesuffix(")"))
        assert "training diverged" in log.read_text()
    assert out.count(": failed: ") == 2


def test_the_budget_stops_in_time_and_a_later_call_goes_on(checkout):
    toy = checkout / "scripts" / "grids" / "toy.yaml"
    toy.write_text(TOY.format(iterations=100))
    began = time.monotonic()
    out, _ = call(checkout, "toy", "--seeds", "1", "--jobs", "2", "--budget", "11s")
    assert time.monotonic() - began < 15
    assert "the budget of 11 s is spent: 2 are left, 2 of them begun" in out
    assert not records(checkout)
    # Too little time to begin anything.
    out, _ = call(checkout, "toy", "--seeds", "1", "--budget", "2s")
    assert len((checkout / "results" / "starts").read_text().splitlines()) == 2
    out, _ = call(checkout, "toy", "--seeds", "1", "--jobs", "2", "--budget", "1h")
    assert "2 of 2 runs are done" in out
    assert "left" not in out


def test_two_at_once_share_the_work(checkout):
    both = [begin(checkout, "toy", "--seeds", "2", "--jobs", "2") for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    starts = (checkout / "results" / "starts").read_text().splitlines()
    assert sorted(starts) == sorted(set(starts))
    assert len(starts) == len(records(checkout)) == 4
    assert all("4 of 4 runs are done" in out for out, _ in outputs)


def test_a_run_whose_holder_died_is_taken_over(checkout):
    both = [begin(checkout, "toy", "--seed", "0", "--jobs", "2") for _ in range(2)]
    wait_until(lambda: len(list(checkout.rglob("checkpoint.pt"))) == 2)
    both[0].send_signal(signal.SIGTERM)
    outputs = [process.communicate() for process in both]
    assert sorted(process.returncode for process in both) in ([0, 75], [0, 0]), outputs
    assert both[1].returncode == 0
    assert len(records(checkout)) == 2


def test_threads_are_divided(checkout):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for jobs, wanted in (("auto", 1), (str(2 * cores), 1), (str(cores), 1)):
        out, _ = call(checkout, "toy", "--seed", "0", "--dry-run", "--jobs", jobs, "--", "machine.device=cpu")
        assert out.count(f"machine.threads={wanted} ") == 2 or cores == 1
    out, _ = call(checkout, "toy", "--seed", "0", "--dry-run", "--jobs", "1")
    assert "machine.threads" not in out


def test_results_elsewhere_with_signs_in_their_name(checkout, tmp_path):
    results = tmp_path / "my results, (1)=ü"
    call(checkout, "toy", "--seed", "0", "--results", str(results))
    assert len(records(results)) == 2


# Jobs of submitit.


def test_local_jobs_are_trained_stopped_and_gone_on_with(checkout):
    results = checkout / "results"
    process = begin(checkout, "toy", "--seed", "0", "--jobs", "2", "--launcher", "local")
    wait_until(lambda: len(list(results.rglob("checkpoint.pt"))) == 2)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 75, out + error
    assert all("stopped." in path.read_text() for path in results.rglob("log.txt"))
    assert not records(results)
    out, _ = call(checkout, "toy", "--seed", "0", "--jobs", "2", "--launcher", "local")
    assert "2 of 2 runs are done" in out
    assert len(records(results)) == 2


def test_a_preempted_job_saves_and_goes_on(checkout):
    results = checkout / "results"
    (checkout / "scripts" / "grids" / "toy.yaml").write_text(TOY.format(iterations=30))
    process = begin(checkout, "toy", "norm=bn", "--seed", "0", "--launcher", "local")
    wait_until(lambda: list(results.rglob("checkpoint.pt")))
    listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
    (job,) = [
        line.split()[0] for line in listed.splitlines() if "submitit.core._submit" in line and str(results) in line
    ]
    os.kill(int(job), signal.SIGUSR2)
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    (log,) = results.rglob("log.txt")
    assert log.read_text().count("stopped.") == 1
    assert len((results / "starts").read_text().splitlines()) == 2
    assert len(records(results)) == 1


def test_a_cluster_that_is_not_there(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    _, error = call(checkout, "toy", "--launcher", "slurm", "--slurm", "partition=gpu,time=8:00:00,gpus=1", code=1)
    assert "Slurm did not take the runs" in error
    assert "--launcher slurm" in refusal(checkout, "toy", "--slurm", "gpus=1")
    assert "--budget" in refusal(checkout, "toy", "--launcher", "slurm", "--budget", "1h")


def test_options_for_slurm():
    options = cluster.slurm_options("partition=gpu,time=8:00:00,gpus=1,cpus-per-task=4")
    assert options == {"partition": "gpu", "time": 480, "gpus": 1, "cpus_per_task": 4}
    times = {"90": 90, "1-00": 1440, "1-02:30": 1590, "5:30": 6}
    assert {text: cluster.slurm_options(f"time={text}")["time"] for text in times} == times
    for text in ("gpu", "time=soon", "a="):
        with pytest.raises(UserError):
            cluster.slurm_options(text)


# Records from elsewhere.


@pytest.fixture
def trained(tmp_path):
    """A folder with three records, and other JSON."""
    folder = tmp_path / "there"
    for seed in range(3):
        a_record(folder / "results", f"seed={seed}")
    (folder / "package.json").write_text('{"name": "other"}')
    return folder


def packed(folder, suffix):
    path = folder.parent / f"packed{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*.json"):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, "deep/inside")
    return path


@pytest.mark.parametrize("suffix", ["", ".tar.gz", ".zip"])
def test_import(checkout, trained, suffix):
    source = packed(trained, suffix) if suffix else trained
    out, error = call(checkout, "--import", str(source))
    assert "3 records imported, 1 other JSON files passed over" in out
    assert not error
    there = records(trained)
    here = records(checkout)
    assert [p.read_bytes() for p in here] == [p.read_bytes() for p in there]
    assert [p.relative_to(checkout) for p in here] == [p.relative_to(trained) for p in there]
    out, _ = call(checkout, "--import", str(source))
    assert "0 records imported, 3 were here already" in out


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    content["checksum"] = record.checksum(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p.write_text(p.read_text().replace("0.0", "1.0", 1)), "checksum"),
        (lambda p: p.write_text(p.read_text()[:100]), "not JSON"),
        (lambda p: p.write_bytes(b"\xff\xfe" + p.read_bytes()), "not JSON"),
        (lambda p: edit(p, name="digits/resnet20/mbn-f2-b8-s0-00000000"), "its configuration gives"),
        (lambda p: edit(p, name="../../outside"), "its configuration gives"),
        (lambda p: edit(p, config=[]), "impossible configuration"),
        (lambda p: edit(p, more=1), "wrong fields"),
        (lambda p: edit(p, dirty=True), "--allow-dirty"),
        (lambda p: edit(p, commit=None, dirty=None), "--allow-dirty"),
        (lambda p: p.write_text(" " * (2 << 20)), "too large"),
    ],
)
def test_import_refuses_one_and_takes_the_others(trained, tmp_path, spoil, says):
    path = records(trained)[0]
    spoil(path)
    gathered = gather(packed(trained, ".tar.gz"), tmp_path / "here")
    assert len(gathered.taken) == len(records(tmp_path / "here")) == 2
    assert len(gathered.refused) == 1
    assert says in gathered.refused[0]
    assert path.name in gathered.refused[0]


def test_import_of_dirty_records_when_told_so(checkout, trained):
    edit(records(trained)[0], dirty=True)
    _, error = call(checkout, "--import", str(trained), code=1)
    assert error.startswith("refused: ")
    out, _ = call(checkout, "--import", str(trained), "--allow-dirty")
    assert "1 records imported, 2 were here already" in out


def test_import_does_not_overwrite(trained, tmp_path):
    here = tmp_path / "here"
    a_record(here, "seed=1", test_error=50.0)
    before = records(here)[0].read_bytes()
    gathered = gather(trained, here)
    assert len(gathered.taken) == 2
    assert "differs from" in gathered.refused[0]
    assert records(here)[0].read_bytes() == before or before in [p.read_bytes() for p in records(here)]


def test_import_of_nothing(checkout, tmp_path):
    for content in (None, b"no archive", b"PK\x03\x04 broken"):
        if content is not None:
            (tmp_path / "x.zip").write_bytes(content)
        _, error = call(checkout, "--import", str(tmp_path / "x.zip"), code=1)
        assert error.startswith("error: cannot import")
    (tmp_path / "empty").mkdir()
    _, error = call(checkout, "--import", str(tmp_path / "empty"), code=1)
    assert "no records" in error
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(REPOSITORY / "mbn")
    (tmp_path / "cut.tar.gz").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    _, error = call(checkout, "--import", str(tmp_path / "cut.tar.gz"), code=1)
    assert error.startswith("error: cannot read")
