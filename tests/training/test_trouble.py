"""What can happen to a run from outside: a full disk, signals, damage, a malicious file, a second process."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import toy_records
from checkouts import TOY, Checkout
from running import TINY, PowerCutError, Run, Trap, build_tiny, cut, digits, fingerprint, outcome, start
from test_files import small_disk
from test_real_cifar import FOUND
from test_reproduce import running, wait_until
from test_run import SIGNALS

from mbn import grid
from mbn.config import REPOSITORY
from mbn.data import datasets
from mbn.records import record
from mbn.system import files
from mbn.system.errors import UserError
from mbn.training import checkpoint_file
from mbn.training import run as trainer

SENTENCE = re.compile(r"(warning: [^\n]*\n)*error: [^\n]*\.\n")


# A full disk: no file may exceed a number of bytes, which decides the write that fails first.


FULL = ["machine.checkpoint_seconds=1e-9", "schedule.iterations=40"]


def said_what_to_do(stopped, where):
    """Whether a run on a full disk ended in one sentence that names a file there."""
    sentence = SENTENCE.fullmatch(stopped.err) and "free some space and run the command again." in stopped.err
    return stopped.code == 1 and bool(sentence) and str(where) in stopped.err


@pytest.mark.parametrize("size", [10, 300, 2000, 6000, 12000], ids=str)
def test_a_full_disk_ends_in_one_sentence_that_names_the_file_and_loses_nothing(here, left, size):
    """From no room at all to room for all files except the checkpoint, which is the largest."""
    digits()  # scikit-learn's import makes a semaphore
    with small_disk(size):
        stopped = here(*FULL)
    assert said_what_to_do(stopped, left(*FULL).folder), stopped
    assert here(*FULL).code == 0


@pytest.mark.long("2", "Limits on the size of a file: one sentence with the file's name, then resumed to the same bits")
def test_many_full_disks(here, left, count, figure):
    """Limits evenly from zero to the size at which everything fits; the last runs need not fail."""
    run = left(*FULL)
    digits()
    assert here(*FULL).code == 0
    expected = fingerprint(run)
    largest = max(path.stat().st_size for path in run.folder.iterdir())
    right, total = 0, count(60)
    for number in range(total):
        shutil.rmtree(run.results)
        with small_disk(largest * number // total):
            stopped = here(*FULL)
        right += said_what_to_do(stopped, run.results) and here(*FULL).code == 0 and fingerprint(run) == expected
    figure(right, total)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_to_go_on_from(here, left, monkeypatch):
    """The journal's row does not fit, in mid-training."""
    write = trainer.Journal.write

    def fills(self, row):
        if row["iteration"] < 20:
            return write(self, row)
        with small_disk(self.path.stat().st_size + 3):
            write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Journal, "write", fills)
        stopped = here(*FULL)
    run = left(*FULL)
    assert said_what_to_do(stopped, f"cannot write {run.folder}/metrics.jsonl"), stopped
    assert re.search(r"it needs \d+ bytes", stopped.err)
    assert run.checkpoint()["iteration"] == 19
    done = here(*FULL)
    assert (done.code, "resuming at iteration 19 of 40" in done.out) == (0, True), done.err
    assert [row["iteration"] for row in run.rows()] == list(range(1, 41))


@pytest.mark.parametrize("tail", [b'{"kind": "tr', b"\0" * 700, b"\xff\xfe\x85\n{]\n", b"\n\n"], ids=repr)
def test_a_run_goes_on_with_a_journal_that_a_power_failure_cut(here, left, after, tail):
    """The checkpoint's rows are there, and after them whatever the file system left of the others."""
    more = ["machine.checkpoint_seconds=1e-9"]
    after(5, cut)
    with pytest.raises(PowerCutError):
        here(*more)
    with (left(*more).folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    done = here(*more)
    assert done.code == 0, done.err
    assert "resuming at iteration 4 of 8" in done.out
    assert [row["iteration"] for row in left(*more).rows()] == list(range(1, 9))


def test_rows_are_on_the_disk_before_the_checkpoint_that_needs_them(here, left, monkeypatch):
    """Their order shows it: fsync of the journal, then the checkpoint."""
    seen = []
    fsync, save = os.fsync, checkpoint_file.save
    journal = left().folder / "metrics.jsonl"

    def noted(descriptor):
        inode = os.fstat(descriptor).st_ino
        seen.append("metrics.jsonl" if journal.exists() and inode == journal.stat().st_ino else "another")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(checkpoint_file, "save", lambda *args: (seen.append("save"), save(*args)))
    assert here().code == 0
    saves = [i for i, name in enumerate(seen) if name == "save"]
    assert len(saves) == 2
    assert all(seen[i - 1] == "metrics.jsonl" for i in saves)


# Signals.


@pytest.mark.long("3", "Signals to train.py (ResNet-20, MBN) answered by their exit code within 30 s, nothing lost")
def test_signals_to_real_runs(tmp_path, count, figure):
    """At random moments, from the first import on. Every tenth run gets a second one; Ctrl-C then ends it at once."""
    overrides = ["dataset=digits", "model=resnet20", "batch_size=64", "machine.threads=1", "machine.device=cpu"]
    overrides += ["schedule.iterations=2000", f"machine.results={tmp_path}"]
    draw = random.Random(3)
    right, slowest, total = 0, 0.0, count(24)
    run = Run(tmp_path, overrides)
    reached = 0
    for number in range(total):
        name, code = list(SIGNALS.items())[number % 4]
        process = start(*overrides)
        journal = run.folder / "metrics.jsonl"
        before = journal.stat().st_mtime_ns if journal.exists() else 0
        if number % 6 != 5:  # else while it imports
            wait_until(lambda journal=journal, before=before: journal.exists() and journal.stat().st_mtime_ns > before)
        else:
            process.stdout.readline()  # how long the run will be: from here on it imports torch
        time.sleep(draw.uniform(0, 2))
        began = time.monotonic()
        process.send_signal(getattr(signal, name))
        if number % 10 == 9:
            time.sleep(0.001)
            process.send_signal(getattr(signal, name))
        ended = outcome(process)
        slowest = max(slowest, time.monotonic() - began)
        state = checkpoint_file.newest(run.checkpoint_path)
        now = state["iteration"] if state else 0
        sound = ended.code == code and "Traceback" not in ended.err and time.monotonic() - began < 30 and now >= reached
        right, reached = right + sound, now
    figure(right, total, f"the slowest took {slowest:.1f} s")


def begin_reproduce(folder, iterations, jobs, seeds):
    """A function that begins reproduce.py on a toy grid, and its results' folder."""
    grids, results = folder / "grids", folder / "results"
    grids.mkdir()
    (grids / "toy.yaml").write_text(TOY.format(iterations=iterations))
    settings = ["toy", "--grids", grids, f"machine.results={results}", "--jobs", str(jobs), "--seeds", str(seeds)]
    settings += ["machine.device=cpu", "machine.mode=eager", f"machine.data={folder}"]
    return lambda: Checkout(REPOSITORY, results).begin(*settings), results


@pytest.mark.long("3", "Signals to reproduce.py with two trainings: its exit code, checkpoints, no child left")
def test_signals_to_reproduce(tmp_path, count, figure):
    begin, results = begin_reproduce(tmp_path, iterations=2000, jobs=2, seeds=1)
    draw = random.Random(4)
    right, total = 0, count(8)
    for number in range(total):
        name, code = list(SIGNALS.items())[number % 4]
        before = {path: path.stat().st_mtime_ns for path in results.rglob("metrics.jsonl")}
        process = begin()
        wait_until(
            lambda before=before: (
                sum(p.stat().st_mtime_ns > before.get(p, 0) for p in results.rglob("metrics.jsonl")) == 2
            ),
            200,
        )
        time.sleep(draw.uniform(0, 3))
        process.send_signal(getattr(signal, name))
        process.communicate(timeout=120)
        states = list(results.rglob("checkpoint.pt"))
        right += process.returncode == code and not running(results) and len(states) == 2
    figure(right, total)


# Damage.


def damage(content, draw, cut):
    """The content with one byte changed, or with its end missing."""
    if cut:
        return content[: draw.randrange(len(content))]
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]


def unlocked():
    """In place of a check that the run's lock is held."""


def damages(run, flips, cuts, capsys):
    """Damage a run's newest checkpoint that often; return how often a resumed run says so and uses the one before."""
    path, before = run.checkpoint_path, checkpoint_file.previous(run.checkpoint_path)
    whole, older = path.read_bytes(), before.read_bytes()
    expected = checkpoint_file.read(before)
    draw = random.Random(350)
    noticed = 0
    threads = torch.get_num_threads()
    for number in range(flips + cuts):
        path.write_bytes(damage(whole, draw, number >= flips))
        capsys.readouterr()
        resumed = trainer.Run(run.config, lambda layers: build_tiny(layers=layers, classes=10), run.folder, unlocked)
        said = capsys.readouterr().err
        same = resumed.state.iteration == expected["iteration"] and all(
            torch.equal(value, expected["model"][name]) for name, value in resumed.model.state_dict().items()
        )
        noticed += same and f"warning: {path} is damaged" in said and before.read_bytes() == older
    torch.set_num_threads(threads)
    return noticed


def test_damage_in_a_checkpoint_is_noticed(here, left, capsys):
    assert here("machine.checkpoint_seconds=1e-9").code == 0
    assert damages(left("machine.checkpoint_seconds=1e-9"), 30, 5, capsys) == 35


@pytest.mark.long("4", "300 flipped bytes and 50 truncations of a checkpoint: warned of, and the one before used")
def test_350_damages(here, left, count, figure, capsys):
    assert here("machine.checkpoint_seconds=1e-9").code == 0
    flips, cuts = count(300), count(50)
    figure(damages(left("machine.checkpoint_seconds=1e-9"), flips, cuts, capsys), flips + cuts, "0 silent loads")


def refused_cifar(name, source, file, content, folder):
    """Whether CIFAR's loader refuses a file with that content, and says its name and what to do."""
    there = folder / source.name
    there.mkdir(parents=True)
    for other in source.iterdir():
        (there / other.name).symlink_to(other)
    (there / file).unlink()
    (there / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        datasets.load_cifar(name, folder)
    shutil.rmtree(there)
    return str(there / file) in str(caught.value) and "run the command again" in str(caught.value)


@pytest.mark.long("4", "CIFAR's files, each with a flipped byte: refused with the file's name and what to do")
@pytest.mark.skipif(not FOUND, reason="CIFAR is not here")
def test_damaged_cifar(tmp_path, figure):
    refused = []
    for name, folder in (("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")):
        for path in sorted((FOUND[0] / folder).glob("*")):
            if re.fullmatch(r"data_batch_\d|test_batch|.*meta|train|test", path.name):
                content = bytearray(path.read_bytes())
                content[len(content) // 2] ^= 1
                refused.append(refused_cifar(name, path.parent, path.name, content, tmp_path))
    figure(sum(refused), len(refused))


@pytest.mark.long("4", "Records with one field edited by hand: tables.py refuses, names the file, writes nothing")
def test_edited_records(tmp_path, count, figure):
    cell = grid.read("table6").cells[0]
    path = toy_records.write(tmp_path / "results", cell, 0, 8.0)
    content = json.loads(path.read_text())
    keys = [key for key in content if content[key] is not None][: count(len(content))]
    refused = 0
    for key in keys:
        edited = content | {key: [content[key], 1] if isinstance(content[key], dict) else f"{content[key]}1"}
        if isinstance(content[key], float):
            edited[key] = content[key] + 0.01
        path.write_text(json.dumps(edited))
        out = tmp_path / "out"
        command = [sys.executable, str(REPOSITORY / "scripts" / "tables.py"), "table6"]
        done = subprocess.run([*command, f"machine.results={tmp_path / 'results'}"], capture_output=True, text=True)
        sentence = re.fullmatch(r"error: [^\n]*\.\n", done.stderr) is not None
        refused += done.returncode == 1 and sentence and str(path) in done.stderr and not out.exists()
    figure(refused, len(keys))


# No code from data.


def test_nothing_is_unpickled_in_this_project():
    """torch.load is used with weights_only=True everywhere, and pickle only for the name of its error."""
    files = [*(REPOSITORY / "mbn").rglob("*.py"), *(REPOSITORY / "scripts").glob("*.py"), REPOSITORY / "train.py"]
    text = "\n".join(path.read_text() for path in files)
    loads = re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", text)
    assert len(loads) == text.count("torch.load(") >= 2
    assert all("weights_only=True" in load for load in loads)
    assert set(re.findall(r"pickle\.\w+", text.replace("cloudpickle.", ""))) == {"pickle.UnpicklingError"}
    assert not re.search(r"allow_pickle=True|yaml\.(unsafe_|full_)?load\(", text)


@pytest.mark.long("5", "Malicious pickles as checkpoint, as CIFAR batch and as weights file, of which none ran")
def test_malicious_files(tmp_path, here, left, figure):
    sprung = tmp_path / "sprung"
    trap = Trap(sprung)
    safe = {}

    def note(name, said):
        safe[name] = not sprung.exists() and bool(said)
        assert trap.__reduce__()[1] == (str(sprung),)

    here("machine.checkpoint_seconds=1e-9")
    run = left("machine.checkpoint_seconds=1e-9")
    state = run.checkpoint()
    run.record_path.unlink()
    forms = {"plain": pickle.dumps(trap, protocol=2)}  # of another torch warns
    for name, content in (("zip", trap), ("nested", {**state, "model": {**state["model"], "fc.bias": trap}})):
        torch.save(content, tmp_path / name)
        forms[name] = (tmp_path / name).read_bytes()
    for name, content in forms.items():
        for checksum in (False, True):
            tail = checkpoint_file.MARK + record.hashlib.sha256(content).hexdigest().encode() if checksum else b""
            run.checkpoint_path.write_bytes(content + tail)
            done = here("machine.checkpoint_seconds=1e-9")
            note(f"checkpoint {name} {checksum}", done.code == 0 and "warning" in done.err)
            run.record_path.unlink()
    for suffix in (".pt", ".pth", ".bin", ".safetensors"):
        for name, content in forms.items():
            path = tmp_path / f"weights{suffix}"
            path.write_bytes(content)
            done = subprocess.run(
                [sys.executable, str(REPOSITORY / "scripts" / "evaluate.py"), str(path), "dataset=digits"],
                capture_output=True,
                text=True,
            )
            note(f"weights {name} {suffix}", done.returncode == 1 and SENTENCE.fullmatch(done.stderr))
    for path in sorted((FOUND[0] / "cifar-10-batches-py").glob("*batch*")) if FOUND else []:
        note(f"cifar {path.name}", refused_cifar("cifar10", path.parent, path.name, forms["plain"], tmp_path))
    pickle.loads(forms["plain"])
    assert sprung.exists()  # the trap is one
    figure(sum(safe.values()), len(safe), "" if all(safe.values()) else str([k for k, v in safe.items() if not v]))


# Two at once.


def both(forkers, results, overrides=TINY):
    """Run the same command twice at the same time; return how both ended."""
    job = {"job": "train", "network": "tiny", "overrides": [*overrides, f"machine.results={results}"]}
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda forker: forker.run(**job), forkers))


def one_trained(ends, run):
    """Whether one of two processes trained and the other named it, or said that the run is finished."""
    codes, length = sorted(e.code for e in ends), run.config.schedule.iterations
    text = "".join(e.text for e in ends)
    if codes == [0, 76]:
        right = re.search(rf"error: {re.escape(str(run.folder))} is being trained by process \d+ on ", text) is not None
    else:
        # Late: it saw the record, or looked for it just before it was written and then got the lock.
        late = text.count("The run is finished") + text.count(f"resuming at iteration {length} of {length}")
        right = codes == [0, 0] and late == 1
    return right and "Traceback" not in text and run.record()["iterations"] == length


def pairs(forkers, folder, times):
    right = named = 0
    for number in range(times):
        ends = both(forkers, folder / str(number))
        named += any(e.code == 76 for e in ends)
        right += one_trained(ends, Run(folder / str(number), TINY))
    return right, named


def test_the_same_command_twice_at_once_one_trains_and_the_other_names_it(forkers, tmp_path):
    assert pairs(forkers, tmp_path, 3)[0] == 3


def test_the_holder_that_is_named_is_the_present_one(tmp_path, monkeypatch):
    """The second process looks when the first has the lock but has not yet written its name."""
    path = tmp_path / "lock"
    node = os.uname().nodename
    path.write_text(f"process 4194305 on {node}\n")  # no process has this number
    code = (
        "import fcntl, os, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.readline()\n"
        "file.truncate(0)\nfile.write(f'process {os.getpid()} on {os.uname().nodename}\\n')\nfile.flush()\n"
        "print('named', flush=True)\nsys.stdin.read()\n"
    )

    def let_it_write(_):
        """In place of the pause before the second look."""
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "named\n"

    monkeypatch.setattr(files, "time", types.SimpleNamespace(sleep=let_it_write))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on {node}"), files.lock(path):
            pass


@pytest.mark.long("6", "The same command twice at once: one trained, the other named the holder")
def test_many_pairs(forkers, tmp_path, count, figure):
    total = count(50)
    right, named = pairs(forkers, tmp_path, total)
    figure(right, total, f"{named} times while the other trained, else just after it had ended")


@pytest.mark.long("6", "Killed holders of a run whose lock the next process took over at once")
def test_locks_of_dead_processes(forkers, tmp_path, count, figure):
    total, right = count(20), 0
    for number in range(total):
        results = tmp_path / str(number)
        job = {"job": "train", "network": "tiny", "overrides": [*TINY, f"machine.results={results}"]}
        killed = forkers[0].run(**job, place="first forward", at=number % 8)
        right += killed.code == -9 and forkers[0].run(**job).code == 0
    figure(right, total)


@pytest.mark.long("6", "Runs of a grid shared by two reproduce.py at once, each trained once")
def test_two_grids_at_once(tmp_path, figure):
    begin, results = begin_reproduce(tmp_path, iterations=8, jobs=1, seeds=4)
    calls = [begin() for _ in range(2)]
    outputs = [process.communicate(timeout=1200) for process in calls]
    assert [process.returncode for process in calls] == [0, 0], outputs
    logs = list(results.rglob("log.txt"))
    once = sum(path.read_text().count(": training loss ") == 1 for path in logs)
    figure(once, 8)
