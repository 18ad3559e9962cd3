"""Records that cannot be true are refused, even with a fitting checksum: read, imported, written, and in tables."""

import contextlib
import json
import math
import re
from itertools import islice

import nonsense
import pytest
import toy_records
from hypothesis import example, given
from hypothesis import strategies as st
from running import load_script

from mbn import grid
from mbn.config import load, run_name
from mbn.records import record, sense
from mbn.records.curves import curves, last_epoch
from mbn.records.import_records import gather
from mbn.system.errors import UserError
from mbn.training.state import Sums

CELL = grid.read("table6").cells[0]


@pytest.fixture
def path(tmp_path):
    """A sound record's file."""
    return toy_records.write(tmp_path / "results", CELL, 0, 8.0)


# A record that cannot be true: the change, and the beginning of what is said.
SEEN = [
    ("test_error", math.nan, "test_error must be a number from 0 to 100, not NaN"),
    ("test_error", math.inf, "test_error must be a number from 0 to 100, not Infinity"),
    ("test_error", 250, "test_error must be a number from 0 to 100, not 250"),
    ("test_error", -3, "test_error must be a number from 0 to 100, not -3"),
    ("test_error", True, "test_error must be a number from 0 to 100, not true"),
    ("test_error", "8", 'test_error must be a number from 0 to 100, not "8"'),
    ("test_error", 8.003, "test_error must be a whole number of the 10000 test images, in percent, not 8.003"),
    ("test_error_best", 8.01, "test_error_best must be at most test_error (8.0), not 8.01"),
    ("test_error_top5", 8.01, "test_error_top5 must be at most test_error (8.0), not 8.01"),
    ("iterations", 10, "iterations must be 78200, as its configuration gives, not 10"),
    ("images", 10, "images must be 10000000, as its configuration gives, not 10"),
    ("device", None, "device must be a text without control characters, not null"),
    ("device", "\x1b[2J", r'device must be a text without control characters, not "\u001b[2J"'),
    ("date", 20261126, "date must be a date such as 2026-01-31T12:00:00+00:00, not 20261126"),
    ("seconds", math.nan, "seconds must be a number, at least 0, not NaN"),
    ("mode", "auto", 'mode must be one of eager, compile, graph, graph-eager, not "auto"'),
    ("curves.test_error", [9.0], "curves.test_error must be a list of numbers, as many as curves.images has"),
    ("curves.gap", [9.0], "curves.gap is not known"),
]


@pytest.mark.parametrize(("key", "value", "says"), SEEN, ids=[f"{key} {value}" for key, value, _ in SEEN])
def test_what_cannot_be_true_is_refused_in_one_sentence_that_names_the_field(path, key, value, says):
    _, made = nonsense.signed(json.loads(path.read_text()), "", key, value)
    path.write_text(json.dumps(made))
    with pytest.raises(UserError) as caught:
        record.read(path)
    assert str(caught.value) == f"{path} cannot be true: {says}; delete it and train again."


def test_these_are_not_imported_and_enter_no_table(path, tmp_path, capsys):
    items = [nonsense.signed(json.loads(path.read_text()), "", key, value) for key, value, _ in SEEN]
    assert accepted(items, path, tmp_path, capsys) == []


def refusals(made, path, tmp_path, capsys):
    """What reading, importing and tables say to a record in the place of another."""
    path.write_text(json.dumps(made))
    said = []
    with pytest.raises(UserError) as caught:
        record.read(path)
    said.append(str(caught.value))
    said += gather(path.parent, tmp_path / "home", allow_dirty=True).refused
    capsys.readouterr()
    results = f"machine.results={tmp_path / 'results'}"
    assert load_script("tables").main(["table6", results]) == 1
    said.append(capsys.readouterr().err.removesuffix("\n"))
    assert load_script("reproduce").main(["--status", "table6", results]) == 0
    return said


def accepted(items, path, tmp_path, capsys):
    """Which of these nonsense records are not refused everywhere, each time in one sentence with the file's name."""
    return [
        what
        for what, made in items
        if not all(
            re.fullmatch(r"[^\n]*\.", said) and said.isprintable() and ". " not in said and path.name in said
            for said in refusals(made, path, tmp_path, capsys)
        )
        or (tmp_path / "home").exists()
    ]


def test_nonsense_is_refused_by_all_that_reads_records(path, tmp_path, capsys):
    items = islice(nonsense.nonsense(json.loads(path.read_text())), 7, None, 250)
    assert accepted(items, path, tmp_path, capsys) == []


@pytest.mark.long("4", "Records with fitting checksums that cannot be true: import, read and tables refuse each")
def test_nonsense_records(path, tmp_path, capsys, count, figure):
    items = list(nonsense.nonsense(json.loads(path.read_text())))
    n = count(200)
    chosen = [items[i * len(items) // n] for i in range(n)]
    wrong = accepted(chosen, path, tmp_path, capsys)
    figure(n - len(wrong), n, f"{len(wrong)} accepted" + "".join(f", {what}" for what in wrong))


# Writing.


def test_nonsense_is_not_written(path):
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is not written, .*: test_error_precise must be .* not 101; report this"):
        record.rewrite(path, test_error_precise=101)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match=r"is not written, .*: seconds must be a number"):
        toy_records.write(path.parent, CELL, 1, 8.0, seconds=math.inf)


# Four iterations an epoch, of which the run has two and a half.
BATCH, LENGTH = 360, 10
SHORT = load(["dataset=digits", f"batch_size={BATCH}", f"schedule.iterations={LENGTH}", "norm=bn"])
FINITE = st.floats(0, 3.4e38)


def journal(losses, measured):
    """The rows of a run with these training losses; measured: what it found at the end of each epoch."""
    of_row, of_epoch, images = Sums(), Sums(), 0
    for t, loss in enumerate(losses, 1):
        n = BATCH if t % 4 else 1437 - 3 * BATCH
        images, ends = images + n, t % 4 == 0 or t == LENGTH
        of_row.add(loss, 0, n)
        of_epoch.add(loss, 0, n)
        row = {"kind": "train", "images": images, "train_loss": of_row.loss, "train_error": 0.0}
        of_row = Sums()
        if ends:
            row |= {"kind": "epoch", "train_loss": of_epoch.loss, **measured}
            of_epoch = Sums()
        yield row


@given(st.lists(FINITE, min_size=LENGTH, max_size=LENGTH), FINITE)
@example([2.0] * LENGTH, 7.7e28)
@example([0.0, 7.7e28, 0.1, 0.1] + [1e19, 0.1, 0.1] * 2, 2.0)
def test_a_run_with_finite_losses_gaps_and_norms_has_a_record(path, losses, size):
    """Also where a loss is so large that the mean of small ones after it is lost in its rounding."""
    errors = dict.fromkeys(("test_error", "test_error_best", "test_error_top5"), 100 * 29 / 360)
    found = errors | dict.fromkeys(("test_loss", "gap_mean", "gap_std", "weight_norm"), size)
    rows = list(journal(losses, found))
    results = errors | {"test_loss": size, "train_loss": last_epoch(rows, 1437)[0], "curves": curves(rows)}
    of_run = {"iterations": LENGTH, "images": rows[-1]["images"], "parts": None}
    assert sense.fault(record.read(path) | results | of_run, SHORT) is None


def test_a_curve_that_is_not_finite_is_left_out():
    row = {"kind": "epoch", "train_loss": 1.0, "train_error": 1.0, "test_error": 8.0, "gap_mean": 1.0}
    rows = [row | {"images": 5, "gap_std": math.inf}, row | {"images": 9, "gap_std": 1.0}]
    assert set(curves(rows)) == {"images", "train_loss", "train_error", "test_error", "gap_mean", "training"}


def test_means_from_differences_of_sums_may_miss_zero_by_their_rounding(path):
    result = record.read(path)
    result["curves"]["training"]["loss"][-1] = -1e-13
    record.rewrite(path, curves=result["curves"])
    result["curves"]["training"]["loss"][-1] = -1e-3
    with pytest.raises(UserError, match=r"curves\.training\.loss must hold a number"):
        record.rewrite(path, curves=result["curves"])


def test_a_method_without_statistics_has_no_precise_error(tmp_path):
    cell = grid.read("table4-methods").cell("8", "GN (untuned)")
    with pytest.raises(UserError, match="test_error_precise must be null with gn, not 8"):
        toy_records.write(tmp_path, cell, 0, 8.0, test_error_precise=8.0)


@pytest.mark.parametrize("overrides", ["dataset=imagenet model=resnet50 batch_size=256", "dataset=digits", "norm=gn"])
def test_sound_records_of_every_data_set_and_length_pass(tmp_path, overrides):
    config = load([*overrides.split(), "schedule.epochs=3", "schedule.scale=0.77"])
    n = config.dataset.test_images
    for k in (0, 1, n // 3, n - 1, n):
        error = 100 * k / n
        cell = type("Cell", (), {"config": lambda self, seed, scale: config})()
        path = toy_records.write(tmp_path, cell, 0, error, test_error_top5=error)
        assert record.read(path)["test_error"] == error
    assert path == record.path_of(tmp_path, run_name(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"dead_relus": None}, "curves.dead_relus must be a list"),
        ({"dead_relus": [2] * 100}, "curves.dead_relus must be the sums of stage_dead_relus"),
        ({"stage_dead_relus": [3]}, "curves.stage_dead_relus must be curves by stages, beside dead_relus, not [3]"),
        ({"stage_dead_relus": {}}, "curves.dead_relus must be the sums of stage_dead_relus"),
        ({"stage_dead_relus": {"layer1": [3]}}, "curves.stage_dead_relus.layer1 must be a list of numbers, as many"),
        (
            {"stage_dead_relus": {"layer1": [3.5] * 100}},
            "curves.stage_dead_relus.layer1 must hold whole numbers, at le",
        ),
        ({"stage_dead_relus": {"\n": [3] * 100}}, "curves.stage_dead_relus must be curves by stages"),
    ],
)
def test_dead_relus_by_stage_are_whole_numbers_that_add_up(path, change, says):
    result = record.read(path)
    result["curves"] |= {"dead_relus": [3] * 100, "stage_dead_relus": {"layer1": [1] * 100, "layer2": [2] * 100}}
    result["curves"] |= change
    said = sense.fault(result, CELL.config(0, 1.0))
    assert said is None if says is None else said.startswith(says)


# A run that diverged.

DIVERGED = {**dict.fromkeys(sense.RESULTS), "curves": {}, "diverged_at": 91}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (DIVERGED, None),
        (DIVERGED | {"diverged_at": 0}, None),
        *((DIVERGED | {key: 8.0}, f"{key} must be null where diverged_at is not, not 8.0") for key in sense.RESULTS),
        (DIVERGED | {"curves": {"images": [8]}}, "curves must be {} where diverged_at is not null"),
        (DIVERGED | {"controls": {}}, "controls must be null where diverged_at is not"),
        (DIVERGED | {"diverged_at": None}, "test_error must be a number"),
        (DIVERGED | {"diverged_at": -1}, "diverged_at must be a whole number, at least 0, not -1"),
        (DIVERGED | {"diverged_at": True}, "diverged_at must be a whole number, at least 0, not true"),
        (DIVERGED | {"diverged_at": 78_200}, "diverged_at must be less than its 78200 iterations, not 78200"),
        ({"diverged_at": 91}, "test_error must be null where diverged_at is not, not 8.0"),
        *(({key: None}, f"{key} must be a number") for key in sense.RESULTS if key != "test_error_precise"),
    ],
)
def test_a_run_that_diverged_has_no_results_and_every_other_run_has_all(path, fields, says):
    said = sense.fault(record.read(path) | fields, CELL.config(0, 1.0))
    assert said is None if says is None else said.startswith(says)


def test_the_record_of_a_run_that_diverged_is_written_read_imported_and_told_in_a_sentence(tmp_path):
    path = toy_records.write_diverged(tmp_path / "results", CELL, 0, at=91)
    result = record.read(path)
    assert record.in_a_sentence(result) == f"{result['name']}: diverged at iteration 91 of 78,200"
    assert gather(path.parent, tmp_path / "home", allow_dirty=True).taken == [result["name"]]


# What was measured of the final weights.

BY = {
    **{"device": "cpu: x", "threads": 1, "code": "0" * 64, "commit": None, "dirty": None, "versions": {"torch": "2"}},
    "date": "2026-01-31T12:00:00+00:00",
}
SOUND = {
    **{"test_error_precise": 8.01, "population_gap": {"mean": 0.1, "std": 0.0}, "train_error": 3.002},
    **{"rules": {"test batch of 8": 9.99}, "by": BY},
}
NONE = {"train_error": None, "rules": None}
NO_PRECISE = {"test_error_precise": None, "population_gap": None}


@pytest.mark.parametrize(
    ("changes", "norm", "says"),
    [
        ({}, "bn", None),
        (NONE, "bn", None),
        (NO_PRECISE, "bn", None),
        (NO_PRECISE | {"rules": None}, "gn", None),
        (NO_PRECISE | NONE, "bn", "controls must be null where nothing was measured"),
        ({"test_error_precise": 8.001}, "bn", "test_error_precise must be a whole number of the 10000 test images"),
        ({"train_error": 3.0001}, "bn", "train_error must be a whole number of the 50000 training images"),
        ({"train_error": "3"}, "bn", "controls.train_error must be a number from 0 to 100"),
        ({"rules": {"test batch of 8": 9.999}}, "bn", "test batch of 8 must be a whole number of the 10000 test"),
        ({"rules": {"test batch of 8": 101}}, "bn", "controls.rules must be test errors from 0 to 100"),
        ({"rules": {}}, "bn", "controls.rules must be test errors"),
        ({"rules": None}, "bn", "controls.rules must be null if and only if controls.train_error is"),
        ({"population_gap": None}, "bn", "controls.population_gap must be null if and only if"),
        ({"population_gap": {"mean": -1, "std": 0}}, "bn", "controls.population_gap must be a mean and a std"),
        ({"by": None}, "bn", "controls must have"),
        ({"by": BY | {"date": None}}, "bn", "controls.by.date must be a date"),
        ({"by": BY | {"code": "x"}}, "bn", "controls.by.code must be 64 hexadecimal digits"),
        ({"more": 1}, "bn", "controls must have"),
        ({}, "gn", "controls.test_error_precise and controls.rules must be null with gn"),
    ],
)
def test_controls_can_be_true(changes, norm, says, tmp_path):
    config = load(["dataset=cifar10", f"norm={norm}"])
    cell = type("Cell", (), {"config": lambda self, seed, scale: config})()
    outcome = pytest.raises(UserError, match=re.escape(says)) if says else contextlib.nullcontext()
    with outcome:
        toy_records.write(tmp_path, cell, 0, 8.0, controls=SOUND | changes)


# The parts of a run, and its journal.

PART = {
    **{"from": 0, "device": "cpu: x", "cpu_capability": "AVX2", "threads": 2, "mode": "eager", "tf32": True},
    **{"deterministic": False, "code": "0" * 64, "commit": "0123456789" * 4, "dirty": False},
    **{"versions": {"torch": "2.11"}, "data": "0" * 64},
}
UNKNOWN = dict.fromkeys(PART)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parts": [PART], "journal": "0" * 64}, None),
        ({"parts": [UNKNOWN | {"from": 0}, PART | {"from": 78_199}], "journal": None}, None),
        ({"parts": [PART, PART | {"from": 78_200}]}, None),
        ({"parts": None}, None),
        ({"parts": [PART], "code": "1" * 64}, "code must be that of one of its parts"),
        ({"parts": [PART], "mode": "compile"}, "mode must be that of one of its parts"),
        ({"parts": [PART | {"dirty": True}]}, "dirty must be true, as in one of its parts"),
        ({"parts": []}, "parts must be a list of parts"),
        ({"parts": ["x"]}, "parts must be a list of parts"),
        ({"parts": [PART | {"more": 1}]}, r"parts\[0\] must have from, "),
        ({"parts": [UNKNOWN]}, r"parts\[0\]\.from must be a whole number"),
        ({"parts": [PART | {"from": 1}]}, "parts must begin at iterations in their order, from 0 to 78200"),
        ({"parts": [PART, PART | {"from": 5}, PART | {"from": 4}]}, "parts must begin at"),
        ({"parts": [PART, PART | {"from": 78_201}]}, "parts must begin at"),
        ({"parts": [PART | {"tf32": 1}]}, r"parts\[0\]\.tf32 must be true or false, not 1"),
        ({"parts": [PART, PART | {"from": 3, "mode": "auto"}]}, r"parts\[1\]\.mode must be one of"),
        ({"parts": [PART | {"versions": {"torch": 2}}]}, r"parts\[0\]\.versions must be texts"),
        ({"journal": "x"}, "journal must be 64 hexadecimal digits"),
    ],
)
def test_the_parts_of_a_run_and_its_journal(path, fields, says):
    said = sense.fault(record.read(path) | fields, CELL.config(0, 1.0))
    assert said is None if says is None else re.match(says, said)
