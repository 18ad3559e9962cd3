"""The tables as data: every digit is the paper's, and every cell is a configuration that can run."""

import re

import pytest

from mbn import grid
from mbn.config import DATASETS, load
from mbn.system.errors import ConfigError, UserError
from mbn.tables.cells import BATCH_SIZES

# The lines of the paper's tables as its text has them (tabs between columns).
TEXT = r"""
Table 1: Performance comparisons of MBN and different normalization methods on CIFAR-10, where '-' stands for ...
method	NIN	ResNet-20	ResNet-56	VGG
NormProp	7.25	-	-	11.18
BN	7.54	8.41	6.97	6.75
BRN	-	8.18	6.46	6.64
MBN	-	7.93	6.23	6.43
Table 2: Performance comparisons of MBN and different normalization methods on CIFAR-100, where '-' stands for ...
method	NIN	ResNet-20	ResNet-56	VGG
NormProp	29.24	-	-	39.55
BN	30.26	32.28	29.27	27.80
BRN	-	32.04	29.17	27.44
MBN	-	31.75	28.97	26.79
Table 3: Performance comparisons on ImageNet (singlecrop testing).
network	top-1 error (%)		top-5 error (%)
network	BN	MBN	BN	MBN
GoogLeNet	27.31	-	9.15	-
PReLU-net	24.27	-	7.38	-
VGG	28.07	27.33	9.33	8.91
ResNet-18	30.43	29.79	10.76	10.23
ResNet-34	26.73	25.85	8.74	8.37
ResNet-50	24.01	23.67	7.02	6.74
Table 4: Testing errors of BN and MBN with different batch sizes.
network	batch size	testing error (%)
network		BN	MBN
ResNet-56	8	19.64	15.37
	16	13.26	11.87
	32	10.45	9.37
	64	8.60	7.79
	128	6.97	6.23
Table 5: The effect of the parameter λ on MBN.
network	settings of λ	testing error (%)
	$\lambda = \{0\}$	6.97
	$\lambda = \{0.1\}$	6.87
ResNet-56	$\lambda = \{0.5\}$	6.45
	$\lambda = \{0.9\}$	6.81
	$\lambda = \{0.1, 0.5, 0.9\}$	6.23
Table 6: The influence of memory size on MBN.
network	memory size	testing error (%)
	10	7.87
ResNet-20	20	7.80
	40	7.83
"""
FIGURE1 = (
    "MBN with single forward scheme (MBN-1) yields better performance than BN with whether single or Double-Forward "
    "scheme (6.53% vs. 6.97% and 6.81%)"
)
# Runs for each seed.
COUNTS = {"table1": 14, "table2": 14, "table3": 8, "table4": 10, "table5": 5, "table6": 3}


def printed(number):
    """Row label -> numbers of a table of the text, '-' as None."""
    part = TEXT.partition(f"Table {number}:")[2].partition("\nTable ")[0]
    rows = {}
    for line in part.splitlines()[1:]:
        fields = [f.strip() for f in line.split("\t")]
        numbers = [f for f in fields if re.fullmatch(r"-|\d+\.\d\d", f)]
        label = [f for f in fields if f and f not in numbers]
        if numbers:
            label = label[-1].strip("$").replace("\\lambda", "λ").replace("\\", "")
            rows[label] = [None if n == "-" else n for n in numbers]
    return rows


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_every_digit_is_the_papers(number):
    g = grid.read(f"table{number}")
    assert printed(number) == {
        row: [g.cell(row, column).paper[metric] for metric in g.metrics for column in g.columns] for row in g.rows
    }


def test_columns_are_the_papers():
    for number in (1, 2):
        head = re.search(rf"Table {number}:.*\nmethod\t(.*)", TEXT)[1].split("\t")
        assert list(grid.read(f"table{number}").columns) == head


def test_figure1s_numbers_are_the_texts():
    g = grid.read("figure1")
    mbn1, bn1, bn2 = re.findall(r"(\d\.\d\d)%", FIGURE1)
    numbers = {"one forward": [bn1, None, mbn1], "two forwards": [bn2, None, printed(1)["MBN"][2]]}
    assert g.paper == {"test_error": numbers}


@pytest.mark.parametrize("name", grid.names())
def test_every_cell_and_its_baseline_can_run(name):
    g = grid.read(name)
    cells = [c for c in g.cells if c.overrides is not None]
    assert cells
    assert g.claims
    keys = [[o.partition("=")[0] for o in c.overrides] for c in cells]
    assert all(len(set(k)) == len(k) for k in keys)
    runs = {c.name(0) for c in cells}
    assert len(runs) == len(cells), "two cells of a table are the same run"
    if name in COUNTS:
        assert len(runs) == COUNTS[name]
    for c in cells:
        baseline, own = c.baseline().config(3), c.config(3)
        assert (baseline.norm.name, baseline.forwards) == ("bn", 1)
        assert (baseline.dataset, baseline.schedule, baseline.batch_size) == (own.dataset, own.schedule, own.batch_size)
        assert baseline.model.name == own.model.name
        assert own.seed == baseline.seed == 3


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("table1", "NormProp", "NIN"),
        ("table4-methods", "8", "BRN-1"),
        ("table4-epochs", "16", "MBN"),
        ("table5", "λ = {0.5}", "ResNet-56"),
        ("gradient", "ResNet-20, batch 8", "MBN-1 batch"),
    ],
)
def test_a_cells_configuration_is_what_its_command_gives(name, row, column):
    cell = grid.read(name).cell(row, column)
    for scale in (1.0, 0.1):
        assert cell.config(2, scale) == load(cell.command(2, scale))


@pytest.mark.parametrize("scale", [0.12345678, 1 / 3, 1e-7, 2.0])
def test_a_command_has_all_digits_of_the_scale(scale):
    cell = grid.read("table4").cells[0]
    assert load(cell.command(0, scale)).schedule.scale == scale


@pytest.mark.parametrize("scale", [3000.0, 0.0, -1.0])
def test_a_scale_that_a_command_would_be_refused_is_refused_with_the_cell(scale):
    cell = next(cell for cell in grid.read("table3").cells if cell.overrides is not None)
    with pytest.raises(ConfigError) as caught:
        load([*cell.command(0), f"schedule.scale={scale}"])
    with pytest.raises(ConfigError) as refused:
        cell.config(0, scale)
    assert str(refused.value) == f"table3, row {cell.row}, column {cell.column}: {caught.value}"


def test_runs_that_tables_share_have_one_identity():
    def of(name, row, column):
        return grid.read(name).cell(row, column).name(0)

    bn = {of("table1", "BN", "ResNet-56"), of("table4", "128", "BN"), of("table5", "λ = {0}", "ResNet-56")}
    bn |= {of("figure1", "one forward", "BN"), of("figure2", "ResNet-56", "BN"), of("table4-methods", "128", "BN-1")}
    bn |= {of("table4-epochs", "128", "BN"), of("table5-lam0", "BN", "ResNet-56")}
    assert len(bn) == 1
    mbn = {of("table1", "MBN", "ResNet-56"), of("table4", "128", "MBN"), of("figure1", "two forwards", "MBN")}
    mbn |= {of("table5", "λ = {0.1, 0.5, 0.9}", "ResNet-56"), of("table4-methods", "128", "MBN-2")}
    assert len(mbn) == 1
    assert of("table6", "20", "ResNet-20") == of("table1", "MBN", "ResNet-20")
    assert of("figure2", "VGG", "MBN") == of("table1", "MBN", "VGG")


def test_quoted_and_impossible_cells_have_no_runs():
    absent = [(c.grid, c.row, c.column) for n in grid.names() for c in grid.read(n).cells if c.overrides is None]
    assert len(absent) == 2 + 2 + 4
    assert ("table1", "NormProp", "ResNet-56") in absent
    assert ("table3", "GoogLeNet", "BN") in absent


@pytest.mark.parametrize("name", BATCH_SIZES)
def test_notes_say_what_the_columns_do_not(name):
    g = grid.read(name)
    counts, gn = g.notes
    assert "count of forwards" in counts
    assert all(
        f"{g.cell('8', column).config(0).forwards}" == column[-1] for column in g.columns if column != "GN (untuned)"
    )
    assert "GN is untuned" in gn
    assert {f"{g.cell('8', column).config(0).schedule.lr[0]:g}" for column in g.columns} == {
        re.search(r"learning rate of ([\d.]+),", gn)[1]
    }


def test_a_table_with_wrong_keys_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{(grid.GRIDS / 'table6.yaml').read_text()}\nnots: []\n")
    with pytest.raises(UserError, match="nots"):
        grid.read("mine", tmp_path)


MINE = """\
title: Mine
about: Mine.
base: [dataset=cifar10, model=resnet20]
rows: {A: [batch_size=8], B: [batch_size=16]}
columns: {BN: [norm=bn], MBN: [norm=mbn]}
"""


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("cells: {A/MBM: [seed=1]}", "no cell 'A/MBM'"),
        ("absent: [MBN/A]", "no cell 'MBN/A'"),
        ("paper: {test_error: {C: [null, null]}}", "no row 'C'"),
        ("paper: {test_error: {A: ['8.2 ± 0.1', null]}}", "A needs a number or null"),
        ("paper: {test_error: {A: ['8.2']}}", "A needs a number or null"),
        ("cells: {A/MBN: [batch_size=16]}", "A/MBN has batch_size twice"),
        ("cells: {A/MBN: [schedule.scale=0.1]}", "schedule.scale is not for a table"),
        ("cells: {A/MBN: [seed=1]}", "seed is not for a table"),
        ("cells: {A/MBN: [machine.tf32=true]}", "machine.tf32 is not for a table"),
    ],
)
def test_an_entry_of_a_table_that_would_be_ignored_or_mean_two_things_is_refused(tmp_path, more, says):
    (tmp_path / "mine.yaml").write_text(MINE)
    assert len(grid.read("mine", tmp_path).cells) == 4
    (tmp_path / "mine.yaml").write_text(f"{MINE}{more}\n")
    with pytest.raises(UserError, match=re.escape(says)):
        grid.read("mine", tmp_path)


def test_the_registry_knows_which_data_sets_tables_have():
    used = {cell.config(0).dataset.name for name in grid.names() for cell in grid.read(name).cells if cell.overrides}
    assert used == {name for name, source in DATASETS.items() if source.in_tables}, "set in_tables in the registry"
