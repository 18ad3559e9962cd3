"""Tables from toy records: golden markdown, LaTeX and CSV, also parsed; and committed tables from committed records."""

import csv
import dataclasses
import io
import re
import shutil
import subprocess
import sys

import pytest
import toy_records
from running import load_script
from scipy import stats

from mbn import grid
from mbn.config import DATASETS, REPOSITORY
from mbn.system.errors import UserError
from mbn.tables import claims
from mbn.tables import page as page_module
from mbn.tables.cells import BATCH_SIZES, read_records, read_tables
from mbn.tables.evidence import evidence_part, evidence_parts, overview_part
from mbn.tables.export import cells_csv, contents, latex
from mbn.tables.over_seeds import p_text
from mbn.tables.page import markdown
from mbn.tables.places import primary
from mbn.tables.readme import elsewhere, finding, readme_part, replace_part

BN, MBN = [8.1, 8.3, 8.4, 8.6, 8.2], [7.5, 7.8, 7.6, 8.1, 7.4]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Table 4: batch 8 is complete, batch 16 has three seeds of BN and one of MBN, the rest nothing; one short run."""
    folder = tmp_path_factory.mktemp("results")
    g = grid.read("table4")
    for seed in range(5):
        toy_records.write(folder, g.cell("8", "BN"), seed, BN[seed], test_error_precise=8.2 if seed == 0 else None)
        fields = {"device": "cpu: Toy", "seconds": 900.0, "test_error_precise": 8.0 if seed == 3 else None}
        toy_records.write(folder, g.cell("8", "MBN"), seed, MBN[seed], **fields)
    for seed in range(3):
        toy_records.write(folder, g.cell("16", "BN"), seed, 7 + seed / 10)
    toy_records.write(folder, g.cell("16", "MBN"), 1, 6.9)
    toy_records.write(folder, g.cell("8", "BN"), 0, 55.5, scale=0.1)
    return folder


@pytest.fixture(scope="module")
def records(results):
    """One run of MBN has controls."""
    records = read_records(results)
    controls = {"test_error_precise": 7.9, "train_error": 0.5, "rules": {"newest entry as the batch": 8.3}}
    records[grid.read("table4").cell("8", "MBN").name(3)]["controls"] = controls
    return records


@pytest.fixture(scope="module")
def table4(records):
    return toy_records.table(grid.read("table4"), records)


GOLDEN = """\
|  | BN | paper | MBN | paper |
|---|---|---|---|---|
| 8 | 8.32 ± 0.19 (5) | 19.64 | **7.68 ± 0.28 (5)** | 15.37 |
| 16 | 7.10 ± 0.10 (3 of 5) | 13.26 | 6.90 (1 of 5) | 11.87 |
| 32 | - | 10.45 | - | 9.37 |
| 64 | - | 8.60 | - | 7.79 |
| 128 | - | 6.97 | - | 6.23 |
"""
DIFFERENCES = """\
|  | n | difference | 95 % interval | p | paper's difference | p against it |
|---|---|---|---|---|---|---|
| 8, MBN | 5+5 | -0.64 | -0.95 to -0.33 | < 0.001 | -4.27 | < 0.001 |
| 16, MBN | 1+3 | -0.20 | -0.76 to +0.36 | 0.446 | -1.39 | 0.014 |
"""
LEVELS = """\
|  | here (n) | 95 % interval for one more run | paper | p |  |
|---|---|---|---|---|---|
| 8, BN | 8.32 (5) | 7.79 to 8.85 | 19.64 | < 0.001 | outside |
"""
BESIDE = """\
|  | seeds | test error | with precise statistics | with precise statistics, memory held (old) | best epoch \
| training error | training error in evaluation |
|---|---|---|---|---|---|---|---|
| 8, BN | 5 | 8.32 | 8.20 (n = 1: 8.10) | - | 8.32 | 1.00 | - |
| 8, MBN | 5 | 7.68 | 7.90 (n = 1: 8.10) | 8.00 (n = 1: 8.10) | 7.68 | 1.00 | 0.50 (n = 1: 8.10) |
| 16, BN | 3 | 7.10 | - | - | 7.10 | 1.00 | - |
| 16, MBN | 1 | 6.90 | - | - | 6.90 | 1.00 | - |
"""
CLAIM = """\
- MBN has a lower test error than BN at every batch size (part of the primary claim MBN < BN)
  - 8: MBN - BN = -0.64 [-0.95, -0.33], n = 5+5, p < 0.001 (uncorrected): holds; the paper's -4.27 is \
excluded (p < 0.001)
  - 16: MBN - BN = -0.20 [-0.76, +0.36], n = 1+3, p = 0.446 (uncorrected): undecided; the paper's -1.39 is \
excluded (p = 0.014)
  - together: MBN - BN = -0.54 [-0.81, -0.27], n = 6+8, p = 0.001 (uncorrected): holds; the paper's -3.61 is \
excluded (p < 0.001)
  - 32; 64; 128: not measured yet
"""


def test_hours_count_each_process():
    one = {"iterations": 100, "parts": [{"from": 0}, {"from": 60, "processes": 3}]}
    assert page_module._processes(one) == pytest.approx(0.6 * 1 + 0.4 * 3)
    assert page_module._processes({"iterations": 100, "parts": None}) == 1
    assert page_module._processes({"iterations": 0, "parts": [{"from": 0, "processes": 2}]}) == 1


def test_markdown(table4, records):
    page = markdown(table4)
    assert page.startswith("# Table 4: Batch sizes, ResNet-56 on CIFAR-10\n\nTable 4 of the paper. Test error in ")
    assert f"\n\n{GOLDEN}\n" in page
    assert f"## Difference to BN\n\n{DIFFERENCES}\n" in page
    of_paper = "In the last column the paper's difference is taken for that of one more run of each cell."
    assert of_paper in page
    assert of_paper not in markdown(read_tables(records, ["gradient"])["gradient"])
    assert f"## Against the paper's numbers\n\n{LEVELS}" in page
    assert f"## Claims\n\n{CLAIM}\n" in page
    # 4 + 4 + 2 degrees of freedom.
    of = "0.44 on ResNet-56 on CIFAR-10 (standard deviation 0.22, known with 10 degrees of freedom)"
    assert f"they would show a difference of test errors of {of} with 80 % power." in page
    assert "with 80 % power" not in markdown(toy_records.table(grid.read("table4"), records, seeds=2))  # not planned
    assert f"## Beside the test error\n\n{BESIDE}\n" in page
    # 8 runs of 0.5 h on a GPU and 1 more, 5 of 0.25 h with 2 threads.
    assert "14 runs, 4.5 GPU hours (each run's, alone or beside others) and 2.5 CPU hours (time x threads), on " in page
    # Batch 16: 6 runs of half an hour. Beyond it 10 runs of 1, 2 and 4 hours, by the median time for an image.
    assert "Missing: 36 of 50 runs, about 73 h (one at a time, at the speed of the records)." in page
    commands = re.findall(r"^python train.py .*", page, re.MULTILINE)
    assert len(commands) == 10
    assert commands[1] == (
        "python train.py dataset=cifar10 model=resnet56 schedule.iterations=78200 batch_size=8 norm=mbn seed=0"
        "   # 8, MBN"
    )


@pytest.mark.parametrize(
    ("mbn", "word", "mark"), [((6.9, 7.1, 7.0), "does not hold", " ↑"), ((5.0, 6.2, 6.0), "undecided", "")]
)
def test_worse_has_an_arrow_and_undecided_no_mark(tmp_path, mbn, word, mark):
    g = grid.read("table4")
    for seed in range(3):
        toy_records.write(tmp_path, g.cell("8", "BN"), seed, 6 + seed / 10)
        toy_records.write(tmp_path, g.cell("8", "MBN"), seed, mbn[seed])
    page = markdown(toy_records.table(g, read_records(tmp_path)))
    assert f"(3 of 5){mark} | 15.37 |" in page
    assert "(3 of 5)**" not in page
    assert word in page


def test_a_run_without_bn_beside_it(tmp_path):
    g = grid.read("table1")
    toy_records.write(tmp_path, g.cell("MBN", "VGG"), 0, 6.0)
    page = markdown(toy_records.table(g, read_records(tmp_path)))
    assert "No run can be compared yet" in page
    assert "- MBN has a lower test error than BN (exploratory): not measured yet" in page
    assert f"at `↑`.\n\n- {g.notes[0]}\n\n## Difference" in page
    assert "Missing: 69 of 70 runs; 19 of them take about 9.5 h (one at a time" in page
    assert "; the time of 50 is unknown (no finished run has such a network)." in page


def test_bn_alone_is_said_to_have_run(tmp_path):
    g = grid.read("table1")
    toy_records.write(tmp_path, g.cell("BN", "VGG"), 0, 6.0)
    table = toy_records.table(g, read_records(tmp_path))
    assert "No run can be compared yet: only BN has a number." in markdown(table)
    assert {row["bn_seeds"] for row in csv.DictReader(io.StringIO(cells_csv([table])))} == {""}


def rows_of(text):
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    return [line.removesuffix(r" \\") for line in body.strip().splitlines() if line != r"\midrule"]


def assert_parses(tex):
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", tex):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert tex.count("$") % 2 == 0
    columns = re.search(r"\\begin\{tabular\}\{(lr*)\}", tex)[1]
    rows = rows_of(tex)
    assert rows
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
    for environment in ("table", "tabular"):
        assert tex.count(rf"\begin{{{environment}}}") == tex.count(rf"\end{{{environment}}}") == 1
    text = re.sub(r"\\[&%$#_{}]", "", tex)
    assert not re.search(r"[%#_λ±]", text), "a character that LaTeX takes for something else"


def test_latex(table4):
    assert rows_of(latex(table4))[:3] == [
        "& BN & paper & MBN & paper",
        r"8 & 8.32 $\pm$ 0.19 (5) & 19.64 & \textbf{7.68 $\pm$ 0.28 (5)} & 15.37",
        r"16 & 7.10 $\pm$ 0.10 (3 of 5) & 13.26 & 6.90 (1 of 5) & 11.87",
    ]
    assert rows_of(latex(toy_records.table(grid.read("table5"), {})))[5] == r"$\lambda$ = \{0.1, 0.5, 0.9\} & - & 6.23"


@pytest.mark.parametrize("name", grid.names())
def test_latex_of_every_grid_parses(name, records):
    assert_parses(latex(toy_records.table(grid.read(name), records)))
    assert_parses(latex(toy_records.table(grid.read(name), {}, scale=0.1)))


def test_csv(table4, records):
    rows = list(csv.DictReader(io.StringIO(cells_csv([table4, toy_records.table(grid.read("table3"), records)]))))
    assert len(rows) == 10 + 24
    first, second, third, fourth = rows[:4]
    assert (first["table"], first["row"], first["column"], first["paper"]) == ("table4", "8", "BN", "19.64")
    assert (first["n"], first["seeds"], first["mean"], first["difference"]) == ("5", "0 1 2 3 4", "8.32", "")
    mean, sd, difference = sum(MBN) / 5, stats.tstd(MBN), (sum(MBN) - sum(BN)) / 5
    # The variance within the three cells of several seeds, by hand: 10 degrees of freedom.
    variance = (4 * stats.tvar(MBN) + 4 * stats.tvar(BN) + 2 * stats.tvar([7.0, 7.1, 7.2])) / 10
    half = stats.t.ppf(0.975, 10) * (2 / 5 * variance) ** 0.5
    p = 2 * stats.t.sf(abs(difference) / (2 / 5 * variance) ** 0.5, 10)
    against = 2 * stats.t.sf(abs(difference + 4.27) / ((2 + 2 / 5) * variance) ** 0.5, 10)  # one more run of each
    expected = {"mean": mean, "sd": sd, "difference": difference, "low": difference - half, "high": difference + half}
    expected |= {"p": p, "paper_difference": -4.27, "p_paper": against}
    assert {name: float(second[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert (second["mark"], second["bn_seeds"], third["bn_seeds"]) == ("better", "5", "")
    assert (fourth["seeds"], fourth["sd"], fourth["difference"], fourth["mark"]) == ("1", "", "-0.2", "")
    assert fourth["command"].startswith("python train.py dataset=cifar10 ")
    quoted = [r for r in rows if r["row"] == "GoogLeNet" and r["paper"]]
    assert [(r["metric"], r["paper"], r["command"]) for r in quoted] == [
        ("test_error", "27.31", ""),
        ("test_error_top5", "9.15", ""),
    ]


def test_scale_and_seeds_choose_the_runs(records, table4):
    page = markdown(toy_records.table(table4.grid, records, seeds=3))
    assert "| 16 | 7.10 ± 0.10 (3) |" in page
    assert "| 8 | 8.27 ± 0.15 (3) |" in page
    assert "55.5" not in markdown(table4)
    short = contents(read_tables(records, scale=0.1), every=True)
    assert {"table4-scale0.1.md", "table4-scale0.1.tex", "cells-scale0.1.csv"} < set(short)
    page = short["table4-scale0.1.md"]
    assert "**Not the paper's protocol: every run has 0.1 of its length.**" in page
    assert "| 8 | 55.50 (1 of 5) | 19.64 | - | 15.37 |" in page
    assert "| paper, full length |" in page
    assert " schedule.scale=0.1 seed=0 " in page
    few = contents(read_tables(records, seeds=2, scale=0.1), every=True)
    assert {"table4-scale0.1-seeds2.md", "cells-scale0.1-seeds2.csv"} < set(few)


def test_a_table_without_runs_is_not_written(records):
    assert set(contents(read_tables(records, ["table4", "table6"]), every=False)) == {"table4.md", "table4.tex"}
    assert contents(read_tables(records, scale=0.5), every=True) == {}


def command(results, *names):
    line = [sys.executable, "scripts/tables.py", f"machine.results={results}", *names]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)


def test_a_record_that_was_edited_or_moved_is_refused(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    path = next((tmp_path / "copy" / "records").rglob("*.json"))
    whole = path.read_text()
    path.write_text(whole.replace('"test_loss": 0.2,', '"test_loss": 0.1,'))
    done = command(tmp_path / "copy", "table4")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert path.name in done.stderr
    assert not (tmp_path / "copy" / "tables").exists()
    path.write_text(whole)
    path.with_name("._macos.json").write_bytes(b"\0")  # as macOS leaves them on disks of others
    assert path.stem in {name.rpartition("/")[2] for name in read_records(tmp_path / "copy")}
    path.rename(path.with_name(f"{path.stem}x.json"))
    with pytest.raises(UserError, match="move it to"):
        read_records(tmp_path / "copy")


def test_the_command_writes_files_and_deletes_none(results, table4):
    old = results / "tables" / "table6.md"
    old.parent.mkdir()
    old.write_text("of a run that is gone")
    done = command(results, "table6", "table4")
    assert done.returncode == 0, done.stderr
    assert (
        f"table6: not written: none of its runs has a record; {old} is of records that are gone: delete it\n"
        in done.stdout
    )
    assert {p.name for p in old.parent.iterdir()} == {"table4.md", "table4.tex", "table6.md"}
    expected = markdown(toy_records.table(table4.grid, read_records(results)))
    assert (results / "tables" / "table4.md").read_text() == expected
    assert old.read_text() == "of a run that is gone"
    assert done.stdout.count("wrote ") == 2
    (results / "tables" / "table4.tex").write_text("of other records")
    again = command(results, "table4").stdout.splitlines()
    assert again == [f"wrote {results / 'tables' / 'table4.tex'}", "unchanged: 1 file"]


@pytest.mark.parametrize(("options", "changes"), [([], True), (["--seeds", "3"], False), (["--scale", "0.1"], False)])
def test_the_two_readmes_tell_of_whole_runs_and_the_planned_seeds_only(
    results, options, changes, tmp_path, monkeypatch
):
    shutil.copytree(results / "records", tmp_path / "results" / "records")
    script, marks = load_script("tables"), ("overview", "bn-and-mbn", "results")
    for name in ("README", "EVIDENCE"):
        page = tmp_path / f"{name}.md"
        page.write_text("".join(f"<!-- {mark} -->\n<!-- /{mark} -->\n" for mark in marks))
        monkeypatch.setattr(script, name, page)
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    assert script.main([*options, f"machine.results={tmp_path / 'results'}"]) == 0
    assert [len((tmp_path / f"{name}.md").read_text()) > 200 for name in ("README", "EVIDENCE")] == [changes] * 2
    assert (tmp_path / "results" / "tables" / "table4.md").exists() == changes


def test_an_unknown_table_is_one_sentence():
    with pytest.raises(UserError, match="there is no table 'table7'"):
        read_tables({}, ["table7"])
    assert load_script("tables").main(["all", "table7"]) == 2


def test_readme_part(records):
    names = ["table3", "table4", *BATCH_SIZES]
    first, picture, words, table, more = readme_part(read_tables(records, names)).split("\n\n")
    assert first.startswith(
        "**At batch 8 MBN has a lower test error than BN, as in the paper; "
        "at batch 16 an advantage of MBN over BN as large as the paper's was not found.** MBN - BN in test error, "
        "ResNet-56 on CIFAR-10: -0.64 [-0.95, -0.33] at batch 8 (the paper: -4.27, outside the 95 % interval for one "
        "more run of each, p < 0.001), -0.20 [-0.76, +0.36] at batch 16 (the paper: -1.39, outside "
    )
    (claim,) = (place for place in primary(read_tables(records, names)) if place.name == "MBN < BN")
    number, p = claim.verdict.number.without_n, p_text(claim.holm)
    expected = f"{number}, {p} after Holm's correction: {claim.verdict.outcome}."
    assert f" Over all batch sizes that have run it is {expected}" in first
    assert "](results/figures/claims-short.png)" in picture
    assert "MBN-2" in words
    assert table.splitlines()[2:] == [
        "| BN, batch 8 | 8.32 ± 0.19 (5) | 19.64 |",
        "| MBN, batch 8 | 7.68 ± 0.28 (5) | 15.37 |",
        "| BN, batch 16 | 7.10 ± 0.10 (3 of 5) | 13.26 |",
        "| MBN, batch 16 | 6.90 (1 of 5) | 11.87 |",
    ]
    assert more.startswith("4 of the 26 numbers of the paper's tables ")  # Table 3 quotes four
    assert "](results/" not in readme_part(read_tables({}, names)).replace("[results/README.md](results/README.md)", "")


def test_a_table_of_a_data_set_whose_records_are_kept_away_is_refused(monkeypatch):
    """Its records would be missed without a word."""
    monkeypatch.setitem(DATASETS, "imagenet", dataclasses.replace(DATASETS["imagenet"], in_tables=False))
    read_tables({}, ["table4"])
    with pytest.raises(UserError, match=r"^table3 has the data set imagenet.*: set in_tables=True"):
        read_tables({}, ["table3", "table4"])


def test_a_part_is_replaced_between_its_markers():
    start, end = "<!-- results -->", "<!-- /results -->"
    old = f"a\n<!-- overview -->\nfirst\n<!-- /overview -->\n{start}\nold\n{end}\nb\n"
    assert replace_part(old, "new") == old.replace("old", "new")
    assert replace_part(old, "new", "overview") == old.replace("first", "new")
    for wrong in ("", start, f"{end}{start}", old + old):
        with pytest.raises(UserError, match=r"page\.md must hold <!-- results -->"):
            replace_part(wrong, "new", name="page.md")


LOWER_AT_8 = {("8", "MBN"): [6.0, 6.1, 6.2], ("8", "BN"): [6.9, 7.0, 7.2]}
HIGHER_AT_8 = {("8", "MBN"): [6.9, 7.0, 7.2, 7.1], ("8", "BN"): [6.0, 6.1, 6.2]}
NUMBERS = "Test error of ResNet-56 on CIFAR-10: MBN {} % ({}), BN {} % ({}){}; the paper: 15.37 % and 19.64 %{}."
EXCLUDED = ", a difference of -4.27, outside the 95 % interval for one more run of each, p < 0.001"
REST = "The paper's other batch sizes have not run."


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({}, ["No run of Table 4 has a record yet."]),
        ({("8", "BN"): [7.0], ("16", "MBN"): [6.0]}, ["Not compared there yet: batch 8, 16, 32, 64 and 128."]),
        (
            LOWER_AT_8,
            [
                "**At batch 8 MBN has a lower test error than BN, as in the paper.**",
                NUMBERS.format("6.10", "3 seeds", "7.03", "3 seeds", ", difference -0.93 [-1.23, -0.64]", EXCLUDED),
                REST,
            ],
        ),
        (
            HIGHER_AT_8,
            [
                "**At batch 8 MBN's advantage in the paper does not hold: BN has the lower test error.**",
                NUMBERS.format("7.05", "4 seeds", "6.10", "3 seeds", ", difference +0.95 [+0.72, +1.18]", EXCLUDED),
                REST,
            ],
        ),
        (
            {("8", "MBN"): [7.0], ("8", "BN"): [6.5]},
            [
                "**At batch 8 BN has a lower test error than MBN so far, but too few seeds have run to be sure.**",
                NUMBERS.format("7.00", "1 seed", "6.50", "1 seed", "", ""),
                REST,
            ],
        ),
        (
            {("8", "MBN"): [6.5], ("8", "BN"): [7.0], ("16", "BN"): [5.0]},
            [
                "**At batch 8 MBN has a lower test error than BN so far, but too few seeds have run to be sure.**",
                NUMBERS.format("6.50", "1 seed", "7.00", "1 seed", "", ""),
                "Not compared there yet: batch 16, 32, 64 and 128.",
            ],
        ),
        (
            {(row, column): [5.0] for row in ("8", "16", "32", "64", "128") for column in ("BN", "MBN")},
            [
                "**At batch 8, 16, 32, 64 and 128 nothing is decided.**",
                "MBN - BN in test error, ResNet-56 on CIFAR-10: +0.00 at batch 8 (the paper: -4.27), "
                "+0.00 at batch 16 (the paper: -1.39), +0.00 at batch 32 (the paper: -1.08), "
                "+0.00 at batch 64 (the paper: -0.81), +0.00 at batch 128 (the paper: -0.74).",
            ],
        ),
        (
            {("8", "MBN"): [15.5, 16.0], ("8", "BN"): [15.6, 15.4]},
            [
                "**At batch 8 an advantage of MBN over BN as large as the paper's was not found.**",
                NUMBERS.format(
                    "15.75", "2 seeds", "15.50", "2 seeds", ", difference +0.25 [-0.91, +1.41]", EXCLUDED
                ).replace("p < 0.001", "p = 0.010"),
                REST,
            ],
        ),
    ],
)
def test_the_finding_is_true_in_every_outcome(errors, said):
    g = grid.read("table4")
    records = {
        g.cell(*place).name(seed): {"test_error": error}
        for place, numbers in errors.items()
        for seed, error in enumerate(numbers)
    }
    assert finding(toy_records.table(g, records)) == " ".join(said)


def test_the_first_page_goes_by_the_corrected_p():
    """MBN - BN at batch 8 alone: +0.87 with p = 0.034, after Holm's correction for three claims 0.103."""
    g = grid.read("table4")
    errors = {"MBN": (15.6, 16.5, 16.0), "BN": (15.0, 15.3, 15.2)}
    records = {g.cell("8", c).name(seed): {"test_error": e} for c, of in errors.items() for seed, e in enumerate(of)}
    table = toy_records.table(g, records)
    uncorrected = claims.judge(g.claims[0], table.all_runs)[0].number.p()
    assert 0.05 / 3 < uncorrected < 0.05
    assert finding(table).startswith("**At batch 8 MBN's advantage in the paper does not hold: BN has the lower")
    said = readme_part({"table4": table})
    assert "does not hold" not in said
    assert said.startswith("**At batch 8 ")


def test_an_advantage_larger_than_the_papers_is_not_said_to_be_missing():
    """Undecided over both places together; at batch 8 the paper's number is excluded, because ours is larger."""
    g, near = grid.read("table4"), (0.0, 0.4)
    errors = {("8", "MBN"): 10.0, ("8", "BN"): 20.0, ("16", "MBN"): 20.0, ("16", "BN"): 10.0}
    records = {
        g.cell(*place).name(seed): {"test_error": error + more}
        for place, error in errors.items()
        for seed, more in enumerate(near)
    }
    assert finding(toy_records.table(g, records), decided=False).startswith(
        "**At batch 8 MBN has a lower test error than BN so far, but too few seeds have run to be sure; at batch 16 an "
        "advantage of MBN over BN as large as the paper's was not found.**"
    )


CLAIMS = """\
| claim | paper | ours [95 %] | n | p | verdict |
|---|---|---|---|---|---|
| **MBN < BN** (primary, 2 of 5 places) | -4.27 to -1.39 | -0.54 [-0.81, -0.27] | 6+8 | 0.004 (Holm) | \
holds; the paper's -3.61 is excluded (p < 0.001) |
| MBN < BN, batch 8, ResNet-56 on CIFAR-10 ([Table 4](tables/table4.md)) | -4.27 | -0.64 [-0.95, -0.33] | 5+5 | \
< 0.001 | holds; the paper's -4.27 is excluded (p < 0.001) |
| MBN < BN, batch 16, ResNet-56 on CIFAR-10 ([Table 4](tables/table4.md)) | -1.39 | -0.20 [-0.76, +0.36] | 1+3 | \
0.446 | undecided; the paper's -1.39 is excluded (p = 0.014) |
"""


def test_evidence_part(records):
    tables = read_tables(records, ["table4", "gradient"])
    overview = overview_part(tables)
    assert overview.startswith(CLAIMS)
    assert "](figures/claims.png)" in overview
    assert "| [Table 4](tables/table4.md): 16, MBN | 6.90 (1) | " in overview
    assert "\n\nNot measured: 12 of 14 comparisons. Missing: " in overview
    part = evidence_part(tables, records)
    assert "| ResNet-56 on CIFAR-10, batch 8, seed 3 | 8.60 | 8.10 |" in part
    assert "](tables/rules.md): test errors of 1 run." in part
    assert part.index("### Tables") < part.index("](figures/status.png)") < part.index("### Runs")
    assert "](tables/table4.md) | Batch sizes, ResNet-56 on CIFAR-10 | 4 / 10 | 1 to 5 | 14 / 50 | 73 h |" in part
    assert "| Table 3 | ImageNet | 0 / 20 (4 only quoted there) | - | 0 / 40 | unknown |" in evidence_part(
        read_tables({}, ["table3"]), {}
    )
    runs = [line for line in part.splitlines() if line.startswith("| [cifar10")]
    assert len(runs) == len(records) == 15
    name = grid.read("table4").cell("8", "MBN").name(3)
    (line,) = [line for line in runs if name in line]
    assert line.startswith(
        f"| [{name}](records/{name}.json) | Table 4: 8, MBN; Gradient: ResNet-56, batch 8, MBN-2 paper | 8.10 | 7.90 | "
        "8.00 | 8.10 | 1.00 | 0.50 | 78,200 | 0.25 | cpu: Toy, 2 threads | eager | 0123456 | "
    )
    assert sum("| no table: schedule.iterations=7820 |" in line for line in runs) == 1
    empty = evidence_part(read_tables({}, ["table4"]), {})
    assert empty.count("None yet.") == 2
    assert "| **MBN < BN** (primary, 0 of 5 places) | -4.27 to -0.74 | - | - | - | not measured |" in overview_part(
        read_tables({}, ["table4"])
    )
    assert "](figures/" not in empty + overview_part(read_tables({}, ["table4"]))


def test_a_primary_claim_with_one_place_is_that_place_and_stands_once(records):
    at_8 = {name: one for name, one in records.items() if "-b8-" in name}
    tables = read_tables(at_8, ["table4", "gradient"])
    (line,) = [line for line in overview_part(tables).splitlines() if line.startswith(("| **MBN < BN", "| MBN < BN"))]
    where = "batch 8, ResNet-56 on CIFAR-10, [Table 4](tables/table4.md)"
    assert line.startswith(f"| **MBN < BN** (primary, 1 of 5 places: {where}) | -4.27 | -0.64 [")
    # A claim of another kind about runs of these cells stands there, with the interval that decides it: 90 %.
    paper, ours = (grid.read("gradient").cell("ResNet-56, batch 8", f"MBN-2 {name}") for name in ("paper", "batch"))
    more = {ours.name(seed): at_8[paper.name(seed)] for seed in range(5)}
    half = stats.t.ppf(0.95, 12) * (2 / 5 * (8 * stats.tvar(MBN) + 4 * stats.tvar(BN)) / 12) ** 0.5
    (line,) = [
        line for line in overview_part(read_tables(at_8 | more)).splitlines() if "BN within 1, ResNet-56" in line
    ]
    assert f"| -0.64, 90 % [{-0.64 - half:+.2f}, {-0.64 + half:+.2f}] | 5+5 | - | holds |" in line


def test_a_primary_claim_with_one_seed_a_cell_has_no_interval_yet(records):
    one = {name: record for name, record in records.items() if "-b8-s0-" in name}
    page = overview_part(read_tables(one, ["table4"]))
    assert "| **MBN < BN** (primary, 0 of 5 places) | -4.27 to -0.74 | - | - | - | no interval yet |" in page
    assert "4.md)) | -4.27 | -0.60 | 1+1 | - | undecided (no interval: too few runs) |" in page


def test_the_first_page_says_what_resnet20_says():
    """By hand: sd² = 0.02 with 2 degrees of freedom; batch 8 has twice the precision of batch 16."""
    g, records = grid.read("table4-resnet20"), {}
    assert elsewhere(toy_records.table(g, records)) == ""
    for row, errors, said in (
        ("8", {"MBN-2": [7.0, 7.2], "BN-1": [6.0, 6.2]}, "+1.00 [+0.39, +1.61] (batch 8)."),
        ("16", {"MBN-2": [9.0], "BN-1": [6.5]}, "+1.50 [+1.00, +2.00] (batch 8 and 16 together)."),
    ):
        for column, numbers in errors.items():
            records |= {g.cell(row, column).name(s): {"test_error": error} for s, error in enumerate(numbers)}
        assert elsewhere(toy_records.table(g, records)) == f"On ResNet-20 MBN - BN is {said}"


def test_cells_whose_runs_diverge_say_so(tmp_path):
    table1 = grid.read("table1")
    cell, mixed = table1.cell("NormProp", "VGG"), table1.cell("MBN", "VGG")
    for one, seed in ((cell, 0), (cell, 1), (mixed, 0)):
        toy_records.write_diverged(tmp_path, one, seed, at=5678)
    toy_records.write(tmp_path, mixed, 1, 7.0)
    records = read_records(tmp_path)
    tables = read_tables(records)
    text = {(e.cell.row, e.cell.column): e.text() for e in tables["table1"].entries}
    assert text["NormProp", "VGG"] == "diverges (2 of 5)"
    assert text["MBN", "VGG"] == "7.00 (1 of 5), 1 diverged"
    assert toy_records.table(table1, records, seeds=2).entry(mixed, "test_error").text() == "7.00 (1), 1 diverged"
    assert toy_records.table(table1, records, seeds=2).entry(cell, "test_error").text() == "diverges (2)"
    part = evidence_part(tables, records)
    assert "| diverges at iteration 5,678 | - | - | 5,678 of 78,200 |" in part
    assert "| Methods on CIFAR-10 | 1 / 12 (1 diverges) | 2 | 4 / 70 |" in part
    without, with_number = (f"| VGG on CIFAR-10, batch 128, seed {text} |" for text in ("0 | x | x", "1 | 7.00 | x"))
    assert part.index(with_number) < part.index(without)
    beside = markdown(tables["table1"]).partition("## Beside the test error")[2].partition("##")[0]
    assert "| MBN, VGG | 2 | 7.00 (n = 1) |" in beside
    assert "NormProp" not in beside
    assert "; for 1 more, training diverges. " in readme_part(tables)
    for seed in range(2):
        del records[mixed.name(seed)]
    assert "## Beside the test error" not in markdown(toy_records.table(table1, records))
    assert contents(tables, every=True).keys() > {"table1.md", "cells.csv"}


def test_committed_tables_follow_from_committed_records():
    """Every committed table, byte for byte, and the parts of the READMEs; every link from these leads somewhere."""
    results = REPOSITORY / "results"
    committed = {p.name: p.read_text() for p in (results / "tables").iterdir()}
    records = read_records(results)
    every = read_tables(records)
    expected = contents(every, every=True)
    for scale in sorted({m[1] for name in committed if (m := re.search(r"-scale([\d.]+)\.(?:md|tex|csv)$", name))}):
        expected |= contents(read_tables(records, scale=float(scale)), every=True)
    assert committed.keys() == expected.keys(), "run scripts/tables.py, and delete the others"
    for name, content in expected.items():
        assert committed[name] == content, f"{name}: run scripts/tables.py"
    parts = [
        (REPOSITORY / "README.md", "results", readme_part(every)),
        *((results / "README.md", mark, part) for mark, part in evidence_parts(every, records).items()),
    ]
    for path, mark, part in parts:
        text = path.read_text()
        assert text == replace_part(text, part, mark), f"{path}: a record has come or gone: run scripts/tables.py"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_what_the_planned_seeds_would_show_goes_by_the_cells_that_pool_their_variance(tmp_path):
    g = grid.read("table4-no-decay")
    for column, errors in {"BN": [15.0, 15.2], "BN no decay": [16.0, 19.0]}.items():
        for seed, error in enumerate(errors):
            toy_records.write(tmp_path, g.cell("8", column), seed, error)
    sentence = page_module.detectable_sentence([read_tables(read_records(tmp_path))["table4-no-decay"]])
    assert "on ResNet-56 on CIFAR-10 (standard deviation 0.14, known with 1 degrees of freedom), " in sentence
    of_others = "(standard deviation 2.12, known with 1 degrees of freedom) with 80 % power."
    assert sentence.endswith(f" on ResNet-56 on CIFAR-10 without weight decay on gamma and beta {of_others}")
