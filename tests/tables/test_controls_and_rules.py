"""The pages of controls and of other rules, and the table of BN beside MBN, from toy records."""

import pytest
import toy_records
from torch import nn

import mbn
from mbn import grid
from mbn.measure.other_rules import rules
from mbn.tables.cells import read_records, read_tables
from mbn.tables.controls import controls_page
from mbn.tables.export import contents
from mbn.tables.rules import COLUMNS, bn_and_mbn, rules_page
from mbn.tables.run_cells import run_cells

PLACE = "ResNet-56 on CIFAR-10, batch 8"
ERRORS = {("BN", 0): 9.0, ("BN", 1): 8.0, ("BN", 2): 8.5, ("MBN", 0): 7.0, ("MBN", 1): 7.6, ("MBN", 2): 6.8}


@pytest.fixture
def records(tmp_path):
    for (column, seed), error in ERRORS.items():
        toy_records.write(tmp_path, grid.read("table4").cell("8", column), seed, error)
    return read_records(tmp_path)


def put(records, column, seed, **controls):
    """Controls of a run."""
    records[grid.read("table4").cell("8", column).name(seed)]["controls"] = controls


def cells_of(records):
    return run_cells(read_tables(records))


def test_the_page_of_other_rules_has_every_run_and_the_means_of_cells(records):
    assert rules_page(cells_of(records)) == ""
    put(records, "BN", 0, rules={"test batch of 8": 9.0})
    put(records, "BN", 1, rules={"test batch of 8": 9.5})
    of_mbn = {"newest entry as the batch": 7.1, "test batch of 8, held": 7.3, "test batch of 128, rolling": 7.2}
    put(records, "MBN", 0, rules=of_mbn)
    page = contents(read_tables(records), every=True)["rules.md"]
    head = "batches of 8, held | batches of 8, rolling | batches of 128, rolling | newest entry as the batch |"
    training = "batches as in training, held | batches as in training, rolling"
    assert f"|  | runs | as in the tables | {training} | {head}\n" in page
    bn = f"| {PLACE}, BN-1 | 2 | 8.50 | 9.25 | 9.25 | 9.25 | 9.25 | - | - |\n"
    mbn = f"| {PLACE}, MBN-2 | 1 | 7.00 | 7.30 | - | 7.30 | - | 7.20 | 7.10 |\n"
    assert bn + mbn in page
    name = grid.read("table4").cell("8", "BN").name(1)
    assert f"| [{PLACE}, BN-1](../records/{name}.json), seed 1 | 8.00 | 9.50 | 9.50 | 9.50 | 9.50 | - | - |\n" in page
    assert "rules.md" not in contents(read_tables(records, ["table4"]), every=False)


def test_bn_stands_beside_mbn_under_the_rules_that_each_has(records):
    table4 = read_tables(records)["table4"]
    assert bn_and_mbn(cells_of(records), table4) == "None yet."
    of_bn = {"test batch of 8": 12.0, "test batch of 128": 11.0, "averages with momentum 0.9": 9.5}
    put(records, "BN", 0, rules=of_bn)
    put(records, "BN", 2, rules={rule: error + 1 for rule, error in of_bn.items()})
    put(records, "MBN", 2, rules={"test batch of 8, held": 7.3})
    put(records, "BN", 1, rules={"test batch of 8": 99.0})  # MBN's seed 1 was not tested so
    of_mbn = {"test batch of 8, held": 7.1, "test batch of 8, rolling": 7.9, "test batch of 128, held": 7.2}
    put(records, "MBN", 0, rules=of_mbn)
    assert bn_and_mbn(cells_of(records), table4).split("\n\n")[0].splitlines() == [
        "| BN / MBN | as in the tables | batches as in training, held | batches as in training, rolling | batches of "
        "128, held | batches of 128, rolling | averages with momentum 0.9 | averages with momentum 1.0 | the paper |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| {PLACE} (seeds 0, 2) | 8.75 / 6.90 | 12.50 / 7.20 | 12.50 / 7.90 (n = 1) | 11.50 / 7.20 (n = 1) | "
        "11.50 / - | 10.00 / 6.90 | - / 6.90 | 19.64 / 15.37 |",
    ]


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, mbn.BatchRenorm2d, mbn.MemorizedBatchNorm2d])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_every_rule_that_runs_are_tested_under_has_a_column(layer, batch_size):
    model = mbn.convert(nn.Sequential(layer(3)), norm="bn") if layer is nn.BatchNorm2d else layer(3)
    names = set(rules(model, batch_size, *3 * [None]))
    assert names
    shown = {name.format(batch=batch_size) for names in COLUMNS.values() for name in names}
    assert names <= shown


def test_the_page_of_controls_has_means_over_the_runs_and_the_seeds_that_have_them(records):
    assert controls_page(cells_of(records)) == ""
    put(records, "BN", 0, train_error=6.0, population_gap={"mean": 9.5, "std": 0.01}, test_error_precise=9.1)
    put(records, "BN", 1, train_error=5.0, population_gap={"mean": 12.25, "std": 0.01})  # sorted as numbers
    put(records, "MBN", 1, train_error=5.5, test_error_precise=7.5)
    records[grid.read("table4").cell("8", "MBN").name(0)]["curves"]["dead_layers"] = [0, 3]
    gone = records[grid.read("table4").cell("8", "MBN").name(2)]
    gone |= {"test_error": None, "diverged_at": 70000, "curves": {"dead_layers": [9]}}
    by_cell, against = controls_page(cells_of(records)).split("## Against BN")
    bn = "| 8.50 | 5.50 (2) | 9.00 | 9.10 (1) | 9.5000 to 12.2500 | 0.0100 | - |"
    mbn = "| 7.60 | 5.50 (1) | 7.60 | 7.50 (1) | - | - | 0: 3 |"
    assert f"| {PLACE}, BN-1 {bn}\n| {PLACE}, MBN-2 {mbn}\n" in by_cell
    # Seed 1 alone has the training error of both, and none has the precise error of both.
    assert f"| {PLACE}, MBN-2 | -0.40 | +0.50 (1) | - | - |\n" in against
    assert f"{PLACE}, BN-1" not in against


def test_without_bn_there_is_nothing_to_compare(records):
    put(records, "MBN", 1, train_error=5.5)
    page = controls_page([cell for cell in cells_of(records) if cell.method == "MBN-2"])
    assert f"| {PLACE}, MBN-2 | 7.60 | 5.50 (1) |" in page
    assert "Against BN" not in page
