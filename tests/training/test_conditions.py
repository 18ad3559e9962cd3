"""What a run's bits depend on beside its configuration: a change of it is said at a resume, and is in the record."""

import collections
import contextlib
import itertools
import json
import random
import re
import shutil

import pytest
import running
import torch
from running import TIMES, assert_same_run, digits, send, without

from mbn.records import provenance
from mbn.system.errors import UserError
from mbn.system.signals import StoppedError, StopRequest
from mbn.training import checkpoint_file, iteration, run, state, trained
from mbn.training.conditions import devices, go_on, made_by, parts_of

HASH = "[0-9a-f]{12}"


VERSIONS = provenance.versions()


def swapped_labels():
    """The digits, with two classes exchanged in training."""
    arrays = digits()
    labels = arrays.train_labels.copy()
    labels[arrays.train_labels == 3], labels[arrays.train_labels == 5] = 5, 3
    return arrays._replace(train_labels=labels)


# What is changed before the resume: a setting of the command, or the target and the value of a patch; and the words.
CHANGES = {
    "threads": (("machine.threads=2",), None, "threads 1 -> 2"),
    "device": ((), ("mbn.records.provenance.device_name", lambda _: "cpu: Z80"), "device cpu: .* -> cpu: Z80"),
    "cpu_capability": ((), ("torch.backends.cpu.get_cpu_capability", lambda: "MMX"), "cpu capability .* -> MMX"),
    "mode": ((), ("mbn.training.run.choose_mode", lambda *_: "compile"), "mode eager -> compile"),
    "versions": ((), ("mbn.records.provenance.versions", lambda: VERSIONS | {"torch": "1.0"}), r"torch .* -> 1\.0"),
    "data": ((), ("running.digits", swapped_labels), f"data {HASH} -> {HASH}"),
    "code": ((), ("mbn.records.provenance.code", lambda: "f" * 64), "commit c0ffeec, code .* -> .* code fffffff"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_change_is_said_at_the_resume_and_the_record_lists_both(here, left, after, monkeypatch, key):
    settings, patch, words = CHANGES[key]
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    after(3, send("SIGTERM"))
    here()
    if patch is not None:
        monkeypatch.setattr(*patch)
    done = here(*settings)
    assert done.code == 0
    assert re.search(rf"^warning: conditions change at iteration 3 \({words}\): the bits may not be", done.err, re.M)
    result = left().record()
    first, second = result["parts"]
    assert (first["from"], second["from"]) == (0, 3)
    assert {k for k in first if first[k] != second[k]} == {"from", key}
    assert result["dirty"] == (key == "code")  # no commit alone would give this result
    # The next resume, under the same conditions, says nothing more.
    left().record_path.unlink()
    assert "warning" not in here(*settings).err
    assert left().record()["parts"] == [first, second]


def test_nothing_is_said_and_there_is_one_part_where_nothing_has_changed(here, left, after):
    for _ in range(2):
        after(2, send("SIGTERM"))
        here()
    done = here()
    assert done.err == ""
    (part,) = left().record()["parts"]
    assert part["from"] == 0
    assert None not in (part[key] for key in part if key not in ("tf32", "deterministic"))
    assert re.fullmatch("[0-9a-f]{64}", part["data"])


def test_a_part_that_has_trained_nothing_is_left_out(capsys):
    first = {"device": "cpu", "cpu_capability": "AVX2", "threads": 1, "mode": "eager", "tf32": None}
    first |= {"deterministic": None, "code": "a", "commit": "a", "dirty": False, "versions": {}, "data": "d"}
    other = first | {"threads": 2}
    begun = [{"from": 0, **first}]
    parts = go_on(begun, 3, other)
    assert parts == [*begun, {"from": 3, **other}]
    assert go_on(parts, 3, first | {"threads": 4}) == [*begun, {"from": 3, **first, "threads": 4}]
    assert go_on(parts, 5, other) == parts
    assert "threads 1 -> 4" in capsys.readouterr().err
    assert go_on(parts, 3, first) == begun  # back to the conditions of what was trained
    assert go_on(begun, 0, other) == [{"from": 0, **other}]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("began", [0, 3])
def test_a_mode_that_fails_later_changes_no_earlier_part(here, left, after, began):
    """Where an iteration cannot be captured, the process that tries goes on in another mode, from its own beginning."""
    if began:
        after(began, send("SIGTERM"))
        here()
    after(2, lambda update: setattr(update, "mode", "compile"))
    here()
    result = left().record()
    expected = [(0, "eager"), (3, "compile")] if began else [(0, "compile")]
    assert [(part["from"], part["mode"]) for part in result["parts"]] == expected
    assert result["mode"] == "compile"


@pytest.mark.parametrize(("began", "mode"), [("cuda", "eager"), ("cpu", "compile")])
def test_the_mode_is_chosen_anew_on_another_kind_of_device(here, left, after, monkeypatch, began, mode):
    """A CPU's compile would keep a GPU from capturing iterations, and a GPU's from what suits a CPU."""
    after(3, send("SIGTERM"))
    here()
    content = left().checkpoint()
    checkpoint_file.save(
        content | {"machine": content["machine"] | {"device": began, "mode": "compile"}}, left().checkpoint_path
    )
    monkeypatch.setattr(iteration, "compiled", lambda function, kind: function)  # which takes long
    assert here("machine.device=cpu").code == 0
    assert left().record()["mode"] == mode


def test_another_commit_with_the_same_code_is_listed_without_a_word(here, left, after, monkeypatch):
    after(3, send("SIGTERM"))
    here()
    monkeypatch.setattr(running, "COMMIT", "d" * 40)
    assert here().err == ""
    result = left().record()
    assert [part["commit"] for part in result["parts"]] == ["c0ffee" * 6 + "c0ff", "d" * 40]
    assert (result["commit"], result["dirty"]) == ("d" * 40, False)


@pytest.fixture
def older(here, left, after):
    """A run whose checkpoint is of version 1; changes: other fields."""

    def make(**changes):
        after(3, send("SIGTERM"))
        here()
        state = left().checkpoint()
        (part,) = state["parts"]
        for key in ("version", "parts", "journal", "replaces"):
            del state[key]
        state |= {key: part[key] for key in ("code", "commit", "dirty")} | {"devices": [part["device"]]} | changes
        checkpoint_file.save({key: value for key, value in state.items() if value is not ...}, left().checkpoint_path)

    return make


def test_a_checkpoint_without_its_conditions_goes_on_with_a_line_that_says_so(here, left, whole, older):
    older()
    done = here()
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert done.err.startswith("note: this checkpoint is from before versions, data and journal were kept in it")
    first, second = left().record()["parts"]
    assert (first["from"], first["versions"], first["data"], second["from"]) == (0, None, None, 3)
    assert left().record()["dirty"] is False
    running.assert_same_bits(left().checkpoint()["model"], whole().checkpoint()["model"])


@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_without_the_code_s_hash_goes_by_the_commit(here, left, older, monkeypatch, changed):
    older(code=..., untested=...)
    if changed:
        monkeypatch.setattr(running, "COMMIT", "d" * 40)
    assert ("commit c0ffeec" in here().err) == changed
    assert left().record()["dirty"] == changed


def test_a_signal_while_the_first_images_are_awaited_leaves_a_checkpoint(here, left, monkeypatch):
    def none_come(self, *_):
        self.stop.code = 75
        raise StoppedError
        yield

    with monkeypatch.context() as patch:
        patch.setattr("mbn.data.in_memory.DeviceDataset.train_batches", none_come)
        stopped = here()
    assert (stopped.code, left().checkpoint()["iteration"]) == (75, 0)
    assert "resuming at iteration 0 of 8" in here().out


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        ({"devices": ["EPYC", "H100"]}, "EPYC, then H100"),
        ({"devices": ["EPYC"]}, "EPYC, then H100"),
        ({}, "cpu, then H100"),  # a checkpoint from before names were kept
    ],
)
def test_a_record_names_every_device_that_its_run_has_used(saved, expected):
    machine = {"device": "cpu", "mode": "eager", "threads": 1}
    parts = parts_of({"machine": machine, "commit": "a", "dirty": False, **saved})
    assert devices([*parts, parts[0] | {"device": "H100"}]) == expected


def test_a_device_of_which_only_the_kind_was_kept_is_no_other_one(older, here, left):
    older(devices=...)
    assert "device" not in here().err
    assert "then" not in left().record()["device"]


@pytest.mark.parametrize(
    ("parts", "dirty"),
    [
        (["a clean"], False),
        (["a clean", "a clean"], False),
        (["a clean", "b clean"], True),
        (["a dirty", "a clean"], True),
        (["a unknown", "a clean"], None),
        (["a unknown", "b clean"], True),
    ],
)
def test_several_codes_or_changes_in_any_part_make_a_record_dirty(parts, dirty):
    states = {"clean": False, "dirty": True, "unknown": None}
    pairs = [part.split() for part in parts]
    listed = [{"code": code, "commit": code, "dirty": states[state]} for code, state in pairs]
    assert made_by(listed) == {"commit": pairs[-1][0], "code": pairs[-1][0], "dirty": dirty}


def test_code_that_is_edited_while_a_run_starts_trains_nothing_and_the_same_command_does(here, left):
    provenance._texts()
    provenance.check_imported.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "_read", lambda: {**provenance._texts(), "mbn/training/schedule.py": b"lr = 0"})
        done = here()
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith("error: mbn/training/schedule.py was edited while the code was loaded: run the command")
    assert not left().checkpoint_path.exists()
    assert not left().record_path.exists()
    assert here().code == 0


# Parts of a run that do not belong together.


def edit(path, number, **changes):
    """Change one row of a journal."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps(json.loads(lines[number]) | changes)
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("number", [0, 3, -1])
def test_a_row_of_the_journal_that_was_changed_before_a_resume_is_noticed(here, left, after, number):
    after(7, send("SIGTERM"))
    here()
    edit(left().folder / "metrics.jsonl", number, train_loss=0.125)
    before = (left().folder / "metrics.jsonl").read_bytes()
    done = here()
    assert done.code == 1
    assert re.fullmatch(r"error: .*metrics\.jsonl is not the one that this run wrote .*\n", done.err)
    assert (left().folder / "metrics.jsonl").read_bytes() == before
    assert not left().record_path.exists()


def test_a_row_that_is_changed_between_the_last_checkpoint_and_the_record_is_noticed(here, left, monkeypatch):
    finish = run.Run.finish

    def later(self, *args):
        edit(self.folder / "metrics.jsonl", -1, test_error=1.25)
        return finish(self, *args)

    monkeypatch.setattr(run.Run, "finish", later)
    assert "metrics.jsonl is not the one that this run wrote" in here().err
    assert not left().record_path.exists()


def test_the_journal_of_another_seed_is_refused(here, left, after):
    after(7, send("SIGTERM"))
    here()
    here("seed=1")
    (left("seed=1").folder / "metrics.jsonl").replace(left().folder / "metrics.jsonl")
    assert "metrics.jsonl is not the one that this run wrote" in here().err


@pytest.mark.parametrize("row", ["5", "{}", "null", "[1]", '{"kind": "epoch"}', '{"kind": ["epoch"]}', "{", "\udcff"])
def test_a_row_that_is_none_of_ours_is_a_sentence_also_where_no_hash_is_known(here, left, older, row):
    older()
    path = left().folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(row.encode(errors="surrogateescape") + b"\n" + b"".join(lines[1:]))
    done = here()
    assert done.code == 1
    assert re.search(
        r"^error: .*metrics\.jsonl is damaged in row 1: move .* away and run the command again\.$", done.err, re.M
    )


def test_a_journal_without_its_checkpoints_is_set_aside_and_said(here, left, whole, after):
    for number in (1, 2):
        after(7, send("SIGTERM"))
        here()
        rows = (left().folder / "metrics.jsonl").read_bytes()
        for path in left().folder.glob("checkpoint*"):
            path.unlink()
        after(2, send("SIGTERM"))
        done = here()
        assert re.search(rf"^warning: .* training starts over, .* in metrics\.aside-{number}\.jsonl\.$", done.err, re.M)
        assert (left().folder / f"metrics.aside-{number}.jsonl").read_bytes() == rows
        left().checkpoint_path.unlink()
        (left().folder / "metrics.jsonl").unlink(missing_ok=True)
    here()
    assert_same_run(left(), whole())


@pytest.mark.parametrize(
    "changes",
    [
        {"iteration": ...},
        {"model": {}},
        {"optimizer": {}},
        {"generators": {"cpu": torch.zeros(3)}},
        {"row_sums": [1, 2, 3, 4]},
        {"seconds": "1"},
        {"anew": None},
        {"version": 3},
        {"version": "2"},
        {"parts": []},
        {"parts": [{}]},
        {"identity": 5},
    ],
    ids=str,
)
def test_a_checkpoint_with_other_fields_is_a_sentence_and_stays(here, left, after, changes):
    after(3, send("SIGTERM"))
    here()
    state = left().checkpoint() | changes
    checkpoint_file.save({key: value for key, value in state.items() if value is not ...}, left().checkpoint_path)
    before = left().checkpoint_path.read_bytes()
    done = here()
    assert done.code == 1
    assert re.search(
        r"^error: .*checkpoint\.pt is of another version of this code \(.*\): go on with .*\.$", done.err, re.M
    )
    assert left().checkpoint_path.read_bytes() == before


def test_a_record_that_appeared_meanwhile_stays(here, left, whole, after):
    theirs = whole().record_path.read_bytes()  # not trained in the midst of the other

    def import_it(_):
        left().record_path.parent.mkdir(parents=True)
        left().record_path.write_bytes(theirs)

    after(3, import_it)
    done = here()
    assert done.code == 1
    assert f"{left().record_path} appeared while this run was trained, and stays" in done.err
    assert left().record_path.read_bytes() == theirs
    left().record_path.rename(left().results / "theirs.json")
    assert "resuming at iteration 8 of 8" in here().out
    assert_same_run(left(), whole())


def test_a_record_that_appeared_before_the_first_iteration_stays(here, left, whole, monkeypatch):
    def import_it(*given):
        left().record_path.parent.mkdir(parents=True)
        left().record_path.write_bytes(expected.record_path.read_bytes())
        return load(*given)

    expected, load = whole(), run.load_data
    monkeypatch.setattr(run, "load_data", import_it)
    done = here()
    assert done.code == 1
    assert f"{left().record_path} appeared while this run was trained, and stays" in done.err


def test_a_record_that_appeared_while_a_run_was_trained_again_and_stopped_stays(here, left, after):
    here()
    after(3, send("SIGTERM"))
    here("machine.again=true")
    left().record_path.write_text("another")
    done = here("machine.again=true")
    assert "appeared while this run was trained, and stays" in done.err
    assert left().record_path.read_text() == "another"


def test_training_again_deletes_only_what_the_program_wrote(here, left):
    here()
    folder = left().folder
    (folder / "notes").mkdir()
    (folder / "checkpoint.damaged.pt").mkdir()
    names = ("notes/a.txt", "notes.txt", "weights.safetensors", "my checkpoint.pt", "checkpoint-epoch80.pt")
    names += ("checkpoint2.pt", "events.out.tfevents.mine")
    for name in names:
        (folder / name).write_text("mine")
    theirs = {path for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"mine"}
    assert len(theirs) == len(names)
    assert here("machine.again=true").code == 0
    assert all(path.read_text() == "mine" for path in theirs)
    assert len(left().rows()) == (folder / "metrics.jsonl").read_text().count("\n")


def test_a_lock_that_was_lost_ends_the_run_before_it_writes(here, left, after, monkeypatch):
    """Its file was removed, so that a second process could train there: in an iteration, or after the last save."""
    save, epoch = run.Run.save, ("schedule.epochs=1", "schedule.iterations=null")
    after(3, lambda _: (left().folder / "lock").unlink())
    done = here()
    assert done.code == 1
    assert f"{left().folder / 'lock'} was removed, replaced or taken by another process" in done.err
    assert not left().checkpoint_path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "save", lambda self: (save(self), self.folder.joinpath("lock").unlink()))
        assert here(*epoch).code == 1
    assert not left(*epoch).record_path.exists()
    assert here(*epoch).code == 0


@pytest.mark.parametrize("in_a_read", [False, True])
def test_the_time_of_a_suspended_process_is_not_counted(monkeypatch, in_a_read):
    """In an iteration, or while the losses are read: on a GPU nearly all waiting is there."""
    now, stop = [100.0], StopRequest()
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    clock = state.Clock()
    clock.start(stop)
    for seconds, suspended in ((1, False), (7, True), (1, False), (0.5, False), (2, True), (1, False)):
        now[0] += seconds
        stop.continued = suspended
        clock.count(training=True) if in_a_read or seconds == 0.5 else clock.tick()
    clock.count(training=True)
    assert clock.training_seconds == clock.seconds == 3.5
    assert not stop.continued


def test_a_test_loss_that_is_not_finite_is_a_divergence(here, left, monkeypatch):
    evaluate = trained.evaluate
    monkeypatch.setattr(trained, "evaluate", lambda *args: evaluate(*args)._replace(loss=float("nan")))
    done = here()
    assert done.code == 1
    assert "training diverged: the test loss was nan (epoch 1, learning rate" in done.err
    assert left().record()["diverged_at"] == 5


# Many of them.


def with_a_changed_byte(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]


def is_silent(done, run, expected):
    """Whether a run ended without a sentence, and with another record."""
    assert "Traceback" not in done.err
    if done.code == 1 and re.search(r"^error: [^\n]+\.$", done.err, re.M):
        return run.record_path.exists()
    return (done.code, without(run.record(), TIMES)) != (0, expected)


def changed_bytes(here, left, after, whole, number):
    """For each file of a run, its record too: how many of so many changed bytes gave another record without a word."""
    expected = without(whole().record(), TIMES)
    for _ in range(2):
        after(3, send("SIGTERM"))
        here()
    run, draw, found = left(), random.Random(300), collections.Counter()
    folder = run.results / "as it was"
    shutil.copytree(run.folder, folder)
    paths = [path for path in sorted(folder.iterdir()) if path.stat().st_size]

    def put_back():
        shutil.rmtree(run.folder)
        shutil.copytree(folder, run.folder)
        run.record_path.unlink(missing_ok=True)

    for path, _ in itertools.product(paths, range(number)):
        put_back()
        (run.folder / path.name).write_bytes(with_a_changed_byte(path.read_bytes(), draw))
        found[path.name] += is_silent(here(), run, expected)
    put_back()
    here()
    content, read = run.record_path.read_bytes(), run.record()
    for _ in range(number):
        run.record_path.write_bytes(with_a_changed_byte(content, draw))
        with contextlib.suppress(UserError):
            found["record"] += run.record() != read
    return len(paths) + 1, found


def test_a_changed_byte_of_any_file_changes_no_record_in_silence(here, left, after, whole):
    files, found = changed_bytes(here, left, after, whole, 3)
    assert files >= 6
    assert not any(found.values()), found


@pytest.mark.long("4", "Changed bytes, as many in every file of a stopped run and in its record, and no false record")
def test_many_changed_bytes(here, left, after, whole, count, figure):
    number = count(300)
    files, found = changed_bytes(here, left, after, whole, number)
    silent = sum(found.values())
    figure(
        files * number - silent, files * number, f"{silent} silent differences; {number} bytes in each of {files} files"
    )


@pytest.mark.long("4", "Resumes with one condition changed, each of which was said and is in the record")
def test_many_changed_resumes(here, left, after, monkeypatch, count, figure):
    draw, number, kinds = random.Random(100), count(100), itertools.cycle(CHANGES)
    said = collections.Counter()
    for seed in range(number):
        iteration, key = draw.randint(1, 7), next(kinds)
        settings, patch, words = CHANGES[key]
        run = f"seed={seed}"
        after(iteration, send("SIGTERM"))
        here(run)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", lambda f, **_: f)
            if patch is not None:
                patched.setattr(*patch)
            err = here(run, *settings).err
        line = re.search(rf"^warning: conditions change at iteration {iteration} \({words}\): ", err, re.M)
        said[key] += bool(line) and [part["from"] for part in left(run).record()["parts"]] == [0, iteration]
    figure(said.total(), number, ", ".join(f"{n} {key}" for key, n in said.items()))
