"""The cells of all runs, planned or not, and what pages call them."""

import dataclasses

import pytest
import toy_records

from mbn import grid
from mbn.methods import METHODS
from mbn.tables.by_seed import _order, by_seed
from mbn.tables.cells import read_records, read_tables
from mbn.tables.evidence import evidence_part
from mbn.tables.run_cells import run_cells

PLACE = "ResNet-20 on CIFAR-10, batch 8"


def test_methods_are_sorted_by_labels_that_may_have_several_words(monkeypatch):
    monkeypatch.setitem(METHODS, "another", dataclasses.replace(METHODS["bn"], label="Batch Norm"))
    methods = ["Batch Norm-2", "MBN-2 batch", "BRN-2", "BN-1", "Batch Norm-1", "GN"]
    assert sorted(methods, key=_order) == ["BN-1", "BRN-2", "MBN-2 batch", "GN", "Batch Norm-1", "Batch Norm-2"]


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
    labels = {cell.label: cell.planned for cell in run_cells(tables)}
    assert labels == {
        f"{PLACE}, BN-1": True,
        f"{PLACE}, BRN-2": True,
        f"{PLACE}, BRN-2 momentum=0.1": False,
        f"{PLACE}, 7,820 iterations, BN-1": False,
        f"{PLACE}, model.gamma=uniform, BN-1": False,
        f"{PLACE}, model.gamma=uniform, MBN-2": False,
        "ResNet-56 on CIFAR-10, batch 8, optimizer.warmup=400, 1,250,000 iterations, MBN-2": False,
    }


def test_a_place_of_a_table_is_told_from_another_by_a_setting_in_brackets(tmp_path):
    g = grid.read("table4-no-decay")
    for column in ("BN", "BN no decay", "MBN no decay"):
        toy_records.write(tmp_path, g.cell("8", column), 0, 16.0)
    place = "ResNet-56 on CIFAR-10, batch 8"
    assert [(cell.label, cell.planned) for cell in run_cells(read_tables(read_records(tmp_path)))] == [
        (f"{place}, BN-1", True),
        (f"{place} (optimizer.decay_norm=false), BN-1", True),
        (f"{place} (optimizer.decay_norm=false), MBN-2", True),
    ]


def test_methods_that_share_a_place_have_one_bn(tables):
    bn, mbn = (cell for cell in run_cells(tables) if "gamma" in cell.label)
    assert (bn.method, mbn.method) == ("BN-1", "MBN-2")
    assert mbn.bn.name(3) == bn.runs[3]["name"]


def test_a_row_for_each_place_and_seed(tables):
    assert by_seed(run_cells(tables)) == [
        ["", "BN-1", "BRN-2", "BRN-2 momentum=0.1", "MBN-2"],
        [f"{PLACE}, seed 0", "16.00", "17.00", "16.90", "-"],
        [f"{PLACE}, seed 1", "16.50", "-", "-", "-"],
        [f"{PLACE}, 7,820 iterations, seed 0", "45.00", "-", "-", "-"],
        [f"{PLACE}, model.gamma=uniform, seed 3", "16.80", "-", "-", "17.50"],
        ["ResNet-56 on CIFAR-10, batch 8, optimizer.warmup=400, 1,250,000 iterations, seed 0", "-", "-", "-", "15.00"],
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
    assert cell.label == "ResNet-56 on CIFAR-10, batch 8, 125,000 iterations, MBN-2"


def labels_of(folder, *runs):
    """The labels of the cells of some runs, each a cell, a seed and a test error; and the runs' texts by error."""
    for cell, seed, error in runs:
        toy_records.write(folder, cell, seed, error)
    records = read_records(folder)
    tables = read_tables(records)
    part = evidence_part(tables, records)
    is_in = {f"{error:.2f}": part.split(f" | {error:.2f} | ")[0].rpartition(" | ")[2] for *_, error in runs}
    return [cell.label for cell in run_cells(tables)], is_in


def test_a_batch_size_that_no_table_has_keeps_its_length(tmp_path):
    """78,200 iterations are also 200 epochs at batch 128, but not at batch 4."""
    cell = with_settings(grid.read("table4").cell("8", "BN"), "batch_size=4")
    cell = dataclasses.replace(cell, overrides=tuple(o for o in cell.overrides if o != "batch_size=8"))
    labels, is_in = labels_of(tmp_path, (cell, 0, 21.11))
    assert labels == ["ResNet-56 on CIFAR-10, batch 4, 78,200 iterations, BN-1"]
    assert is_in == {"21.11": "no table: batch_size=4"}


def test_equal_settings_with_another_length_are_another_place(tmp_path):
    """Next to Table 4, and to its twin that counts epochs, whose BN has not run."""
    short, long = grid.read("table4").cell("8", "BN"), grid.read("table4-epochs").cell("8", "BN")
    memory = with_settings(grid.read("table4-epochs").cell("8", "MBN"), "norm.memory=10")
    warm = "optimizer.warmup=1000"
    runs = [(short, 0, 15.55), (with_settings(short, warm), 0, 14.44), (with_settings(long, warm), 0, 9.99)]
    labels, is_in = labels_of(tmp_path, *runs, (memory, 0, 8.88))
    place = "ResNet-56 on CIFAR-10, batch 8"
    assert sorted(labels) == [
        f"{place}, 1,250,000 iterations, MBN-2 memory=10",
        f"{place}, BN-1",
        f"{place}, {warm}, 1,250,000 iterations, BN-1",
        f"{place}, {warm}, BN-1",
    ]
    assert is_in["8.88"] == "no table: norm.memory=10"


def test_other_seeds_are_named_in_the_list_of_runs_alone(tmp_path):
    bn = grid.read("table4").cell("8", "BN")
    uniform = with_settings(bn, "model.gamma=uniform")
    labels, is_in = labels_of(tmp_path, (bn, 5, 15.55), (uniform, 7, 14.44))
    assert labels == []
    assert is_in == {"15.55": "no table: seed=5", "14.44": "no table: model.gamma=uniform"}


def test_a_method_that_no_table_has_on_a_network_is_named_too(tmp_path):
    bn = grid.read("table2").cell("BN", "ResNet-20")
    gn = with_settings(bn, "norm=gn", "norm.channels=8")
    gn = dataclasses.replace(gn, overrides=tuple(o for o in gn.overrides if o != "norm=bn"))
    labels, is_in = labels_of(tmp_path, (gn, 0, 33.33))
    assert labels == ["ResNet-20 on CIFAR-100, batch 128, GN channels=8"]
    assert is_in == {"33.33": "no table: norm.channels=8"}


def test_one_or_two_forwards_are_the_method_and_no_part_of_the_place(tmp_path):
    brn, mbn = (with_settings(grid.read("table2").cell(m, "ResNet-20"), "model.gamma=uniform") for m in ("BRN", "MBN"))
    one = dataclasses.replace(brn, overrides=(*(o for o in brn.overrides if "forwards" not in o), "forwards=1"))
    labels, _ = labels_of(tmp_path, (one, 0, 33.33), (mbn, 0, 32.22))
    place = "ResNet-20 on CIFAR-100, batch 128, model.gamma=uniform"
    assert sorted(labels) == [f"{place}, BRN-1", f"{place}, MBN-2"]
