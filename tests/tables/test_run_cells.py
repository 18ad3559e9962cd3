"""The cells of all runs, planned or not, and what pages call them."""

import dataclasses

import pytest
import toy_records

from mbn import grid
from mbn.tables.by_seed import by_seed
from mbn.tables.cells import read_records, read_tables
from mbn.tables.evidence import evidence_part
from mbn.tables.run_cells import run_cells

PLACE = "ResNet-20 on CIFAR-10, batch 8"


def with_settings(cell, *settings):
    """A cell that no table plans."""
    return dataclasses.replace(cell, overrides=(*cell.overrides, *settings))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two planned cells, a short run, and cells with settings of their own, one next to a cell that counts epochs."""
    folder = tmp_path_factory.mktemp("results")
    g = grid.read("table4-resnet20")
    bn, brn = g.cell("8", "BN-1"), g.cell("8", "BRN-2")
    toy_records.write(folder, bn, 0, 16.0)
    toy_records.write(folder, bn, 1, 16.5)
    toy_records.write(folder, brn, 0, 17.0)
    toy_records.write(folder, bn, 0, 45.0, scale=0.1)
    toy_records.write(folder, with_settings(g.cell("8", "MBN-2"), "model.gamma=uniform"), 3, 17.5)
    toy_records.write(folder, with_settings(bn, "model.gamma=uniform"), 3, 16.8)
    toy_records.write(folder, with_settings(brn, "norm.momentum=0.1"), 0, 16.9)
    epochs = grid.read("table4-epochs").cell("8", "MBN")
    toy_records.write(folder, with_settings(epochs, "optimizer.warmup=400"), 0, 15.0)
    return read_records(folder)


@pytest.fixture(scope="module")
def tables(written):
    return read_tables(written)


def test_every_run_is_in_one_cell_which_has_its_name(tables, written):
    cells = run_cells(tables)
    assert sorted(one["name"] for cell in cells for one in cell.runs.values()) == sorted(written)
    assert all(one["name"] == cell.cell.name(seed) for cell in cells for seed, one in cell.runs.items())


def test_the_labels_name_the_settings_that_no_table_has(tables):
    labels = {cell.label: cell.other for cell in run_cells(tables)}
    assert labels == {
        f"{PLACE}, BN-1": (),
        f"{PLACE}, BRN-2": (),
        f"{PLACE}, BRN-2 momentum=0.1": ("norm.momentum=0.1",),
        f"{PLACE}, schedule.iterations=7820, BN-1": ("schedule.iterations=7820",),
        f"{PLACE}, model.gamma=uniform, BN-1": ("model.gamma=uniform",),
        f"{PLACE}, model.gamma=uniform, MBN-2": ("model.gamma=uniform",),
        "ResNet-56 on CIFAR-10, batch 8, optimizer.warmup=400, MBN-2": ("optimizer.warmup=400",),
    }


def test_methods_that_share_a_place_have_one_bn(tables):
    bn, mbn = (cell for cell in run_cells(tables) if "gamma" in cell.label)
    assert (bn.method, mbn.method) == ("BN-1", "MBN-2")
    assert mbn.bn.name(3) == bn.runs[3]["name"]


def test_a_row_for_each_place_and_seed(tables):
    assert by_seed(run_cells(tables)) == [
        ["", "BN-1", "BRN-2", "BRN-2 momentum=0.1", "MBN-2"],
        [f"{PLACE}, seed 0", "16.00", "17.00", "16.90", "-"],
        [f"{PLACE}, seed 1", "16.50", "-", "-", "-"],
        [f"{PLACE}, schedule.iterations=7820, seed 0", "45.00", "-", "-", "-"],
        [f"{PLACE}, model.gamma=uniform, seed 3", "16.80", "-", "-", "17.50"],
        ["ResNet-56 on CIFAR-10, batch 8, optimizer.warmup=400, seed 0", "-", "-", "-", "15.00"],
    ]


def test_the_list_of_runs_says_what_is_different(tables, written):
    part = evidence_part(tables, written)
    assert ".json) | no table: norm.momentum=0.1 | 16.90 |" in part
    assert part.count("| no table: model.gamma=uniform |") == 2


def test_without_tables_there_are_no_cells():
    assert run_cells({}) == []


def test_a_length_in_iterations_replaces_one_in_epochs(tmp_path):
    g = grid.read("table4-epochs")
    toy_records.write(tmp_path, g.cell("8", "MBN"), 0, 40.0, scale=0.1)
    (cell,) = run_cells({g.name: toy_records.table(g, read_records(tmp_path))})
    assert cell.other == (f"schedule.iterations={round(0.1 * 200 * 6250)}",)
