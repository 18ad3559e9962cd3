"""A rental from the first command to the records at home, on the CPU."""

import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from killing import WITHOUT_GIT
from running import COMMIT

from mbn.config import REPOSITORY
from mbn.records import record

SCRIPT = REPOSITORY / "scripts" / "rented_gpu.sh"
COMMON = ["--seeds", "1", "--jobs", "2", "machine.device=cpu", "machine.mode=eager"]
COMMON += ["evaluate.rules=false", "evaluate.precise=false"]


@pytest.fixture
def rental(tmp_path, write_toy):
    """A function that runs a command of rented_gpu.sh, with this Python and its own folders and grids."""
    for folder in ("bin", "load", "load/data", "out", "grids", "home"):
        (tmp_path / folder).mkdir()
    write_toy(tmp_path / "grids" / "short.yaml", 4)
    write_toy(tmp_path / "grids" / "long.yaml", 100_000)

    def call(*arguments, codes=(0,), script=SCRIPT, **more):
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WORK": str(tmp_path / "my work"),
            "RESULTS": str(tmp_path / "home"),
            "MBN_COMMIT": COMMIT,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **more,
        }
        done = subprocess.run(
            ["bash", str(script), *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode in codes, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


@pytest.mark.timeout(1800)
def test_runs_are_trained_brought_home_and_continued(rental, tmp_path):
    """Two runs end; two in one process are stopped by the budget, and their checkpoints come home too."""
    load, out = str(tmp_path / "load"), str(tmp_path / "out")
    common = [*COMMON, "--grids", str(tmp_path / "grids")]
    rental("train", load, out, "9m", "short", *common)
    with tarfile.open(Path(out) / "results.tgz") as archive:
        names = archive.getnames()
    assert sum(name.endswith(".json") for name in names) == 2  # not those that the checkout brought along
    said = rental("home", out)
    assert "2 records imported" in said
    taken = [record.read(path) for path in (tmp_path / "home" / "other_records").rglob("*.json")]
    assert [r["iterations"] for r in taken] == [4, 4]
    assert {(r["commit"], r["dirty"]) for r in taken} == {(COMMIT, False)}  # not what git says of this checkout
    assert all((tmp_path / "home" / "runs" / r["name"] / "metrics.jsonl").exists() for r in taken)

    for file in Path(out).iterdir():
        file.unlink()
    # On a busy machine a lane may not stop in time and is killed (code 75): its last checkpoint comes home.
    rental("train", load, out, "40s", "long", "--lanes", *common, "machine.checkpoint_seconds=0.01", codes=(0, 75))
    assert len(list(Path(out).iterdir())) <= 8
    rental("home", out)
    begun = [path for path in (tmp_path / "home" / "runs").rglob("checkpoint.pt") if "s0" in str(path)]
    assert len(begun) >= 3  # two ended, and at least one that goes on


@pytest.mark.parametrize("installed", [True, False])
def test_the_server_for_processes_is_started_and_ended(rental, tmp_path, installed):
    server = tmp_path / "bin" / "nvidia-cuda-mps-control"
    if installed:
        server.write_text(f'#!/bin/sh\n[ "$1" = -d ] || read said\necho "$1$said" >>{tmp_path}/told\n')
        server.chmod(0o755)
    said = rental(
        *("train", str(tmp_path / "load"), str(tmp_path / "out"), "9m", "short"),
        *("--grids", str(tmp_path / "grids"), *COMMON),
        codes=(0,) if installed else (2,),
        MPS="1",
        PATH=f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{WITHOUT_GIT}",
    )
    if installed:
        assert "2 of 2 runs are done." in said
        assert (tmp_path / "told").read_text() == "-d\nquit\n"
    else:
        assert "error: there is no nvidia-cuda-mps-control here" in said


@pytest.fixture
def checkout(tmp_path):
    """A function that makes a checkout whose reproduce.py is this code, which finds machine.results in `folder`.

    It returns the folder of the checkout's unfinished runs.
    """
    begins = (
        "import pathlib, sys\n"
        "if '--import' in sys.argv:\n"
        "    sys.exit()\n"
        "(path,) = [part.split('=')[1].strip(\"'\") for part in sys.argv if part.startswith('machine.results=')]\n"
        "folder = pathlib.Path(path)\n"
    )

    def make(code):
        for folder in ("configs", "mbn", "models", "tests", "scripts", "results/records"):
            (tmp_path / "checkout" / folder).mkdir(parents=True)
        for name in ("train.py", "pyproject.toml"):
            (tmp_path / "checkout" / name).touch()
        shutil.copy(SCRIPT, tmp_path / "checkout" / "scripts")
        (tmp_path / "checkout" / "scripts" / "reproduce.py").write_text(begins + code)
        return tmp_path / "checkout" / "results" / "unfinished" / "cifar10" / "resnet20"

    return make


@pytest.mark.parametrize(("most", "parts"), [("62M", "ab"), ("56k", "a")], ids=["8 files", "64 MB"])
def test_at_most_8_files_come_home_and_no_checkpoint_that_is_cut_off(rental, checkout, tmp_path, most, parts):
    """Unfinished runs go first, but not those that are as they were brought along; kernels only if all fit."""
    unfinished = checkout(
        "import os, random\n"
        "print(*sys.argv)\n"
        "runs = folder / 'runs/cifar10/resnet20'\n"
        "for name in ('new 1', 'new 2', 'new 3', 'new 4', 'end 1', 'end 2'):\n"
        "    (runs / name).mkdir(parents=True)\n"
        "    (runs / name / 'checkpoint.pt').write_bytes(random.randbytes(12_000))\n"
        "    (runs / name / 'metrics.jsonl').write_text('row\\n' * 9)\n"
        "records = folder / 'records/cifar10/resnet20'\n"
        "records.mkdir(parents=True)\n"
        "for name in ('end 1', 'end 2'):\n"
        "    (records / f'{name}.json').touch()\n"
        "kernels = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "(kernels / 'kernel').write_bytes(random.randbytes(30_000))\n"
    )
    (unfinished / "old").mkdir(parents=True)
    (unfinished / "old" / "checkpoint.pt").write_text("old")
    before = [tmp_path / "home" / "runs" / "cifar10" / "resnet20" / f"new {n}" for n in range(1, 5)]
    for run in before:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("row\n")
        (run / "checkpoint.pt").write_text("before")
    script = tmp_path / "checkout" / "scripts" / SCRIPT.name
    said = rental("train", str(tmp_path / "load"), "out", "60s", "table4", script=script, PART="10k", MOST=most)
    assert " machine.device=cuda " in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("log", "results.tgz", *(f"finished.a{letter}" for letter in parts)),
        *(f"unfinished.a{letter}" for letter in "abcd"),
    }
    assert "unfinished: 6 parts of 10k, of which 4 fit" in said
    assert "half an archive of kernels is useless" in said
    said = rental("home", "out", script=script)
    assert "unfinished: not all checkpoints came home" in said
    here = {path.parent.name: path.read_bytes() for path in (tmp_path / "home" / "runs").rglob("checkpoint.pt")}
    there = {path.parent.name: path.read_bytes() for path in (tmp_path / "my work" / "results").rglob("checkpoint.pt")}
    assert there["old"] == b"old"
    assert "old" not in here
    came = {name for name, content in here.items() if content == there[name]}
    assert len([name for name in came if name.startswith("new")]) == 3
    assert {here[run.name] for run in before if run.name not in came} == {b"before"}


def test_a_second_command_of_a_rental_goes_on_where_the_first_ended(rental, checkout, tmp_path):
    """The checkpoints that were brought along are older than those of the first command, whose record stays."""
    load, out = (tmp_path / name for name in ("load", "out"))
    unfinished = checkout(
        "(path,) = folder.rglob('checkpoint.pt')\n"
        "count = int(path.read_text()) + 1\n"
        "path.write_text(str(count))\n"
        "(folder / 'records' / f'{count}.json').touch()\n"
    )
    (unfinished / "one").mkdir(parents=True)
    (unfinished / "one" / "checkpoint.pt").write_text("0")
    (tmp_path / "checkout" / "results" / "records" / "brought along.json").touch()
    train = partial(rental, "train", str(load), script=tmp_path / "checkout" / "scripts" / SCRIPT.name)
    train(str(out), "60s", "table4")
    train("new folder", "60s", "table4")
    with tarfile.open(tmp_path / "new folder" / "unfinished.aa") as archive:
        assert archive.extractfile("runs/cifar10/resnet20/one/checkpoint.pt").read() == b"2"
    with tarfile.open(tmp_path / "new folder" / "results.tgz") as archive:
        assert sorted(archive.getnames()) == ["records/1.json", "records/2.json"]
    said = train(str(out), "60s", "table4", codes=(2,))
    assert f"error: {out} holds what an earlier command brought: name an empty folder." in said


def test_checkpoints_come_home_beside_a_refused_record_and_only_newer_ones_replace_others(rental, tmp_path):
    out = tmp_path / "out"
    for number, lines in enumerate((2, 3, 1)):
        run = tmp_path / str(number) / "runs" / "one"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("row\n" * lines)
        (run / "checkpoint.pt").write_text(str(number))
        (tmp_path / str(number) / "records").mkdir()
        (tmp_path / str(number) / "records" / "wrong.json").write_text("{}")
        with tarfile.open(out / "results.tgz", "w:gz") as archive:
            archive.add(tmp_path / str(number), ".")
        said = rental("home", "out", codes=(1,))
        assert "wrong.json" in said
        assert (tmp_path / "home" / "runs" / "one" / "checkpoint.pt").read_text() == "011"[number]
        assert ("left as it is there" in said) == (number == 2)


def test_a_checkpoint_comes_home_after_its_journal_and_a_journal_alone_replaces_no_checkpoint(rental, tmp_path):
    """As many checkpoints come as there is room for; the journals come always."""
    out, here = tmp_path / "out", tmp_path / "home" / "runs" / "one"
    for number, (lines, checkpoint) in enumerate([(2, False), (2, True), (3, False)]):
        run = tmp_path / str(number) / "runs" / "one"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text("row\n" * lines)
        if checkpoint:
            (run / "checkpoint.pt").write_text(str(number))
        with tarfile.open(out / "results.tgz", "w:gz") as archive:
            archive.add(tmp_path / str(number), ".")
        rental("home", "out")
    assert (here / "checkpoint.pt").read_text() == "1"
    assert (here / "metrics.jsonl").read_text() == "row\n" * 2


def test_half_an_archive_of_kernels_does_not_end_a_rental(rental, tmp_path):
    load = tmp_path / "load"
    with tarfile.open(load / "inductor.aa", "w:gz") as archive:
        archive.add(SCRIPT, "kernel")
    (load / "inductor.aa").write_bytes((load / "inductor.aa").read_bytes()[:-100])
    said = rental("check", str(load), str(tmp_path / "out"))
    assert "not all could be unpacked" in said
    assert "error:" in (tmp_path / "out" / "log").read_text()


def test_a_package_and_compiled_kernels_come_along(rental, tmp_path):
    """Without a GPU, check still unpacks, says in one sentence that there is none, and brings its log home."""
    load, out = tmp_path / "load", tmp_path / "out"
    (load / "kernels").mkdir()
    (load / "kernels" / "one.py").write_text("x = 1\n")
    with tarfile.open(load / "inductor.aa", "w:gz") as archive:
        archive.add(load / "kernels", "kernels")
    said = rental("check", str(load), str(out))
    assert (tmp_path / "my work" / "inductor" / "kernels" / "one.py").exists()
    assert "error:" in said
    assert "error:" in (out / "log").read_text()


@pytest.mark.parametrize("arguments", [(), ("train", "a", "b"), ("check", "a"), ("fly", "a", "b")], ids=" ".join)
def test_mistakes_show_the_usage(rental, arguments):
    assert "rented_gpu.sh train LOAD OUT" in rental(*arguments, codes=(2,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "load", "out", "9m30", "table4"), "BUDGET is a time, such as 490s, 9m or 1h30m, not 9m30."),
        (("home", "nowhere"), "nowhere is not a folder: name what the rental brought."),
    ],
)
def test_mistakes_are_said_before_anything_is_done(rental, tmp_path, arguments, says):
    assert f"error: {says}" in rental(*arguments, codes=(2,))
    assert not (tmp_path / "my work").exists()
    assert not (tmp_path / "nowhere").exists()
