"""Tables from toy records: golden markdown, LaTeX and CSV, parsed too; and the committed ones from the committed."""

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import toy
from scipy import stats

from mbn import grid
from mbn.config import REPOSITORY
from mbn.system.errors import UserError
from mbn.tables import page as table

BN, MBN = [8.1, 8.3, 8.4, 8.6, 8.2], [7.5, 7.8, 7.6, 8.1, 7.4]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Table 4: batch 8 is complete, batch 16 has three seeds of BN and one of MBN, the rest nothing; one short run."""
    folder = tmp_path_factory.mktemp("results")
    g = grid.read("table4")
    for seed in range(5):
        toy.write(folder, g.cell("8", "BN"), seed, BN[seed])
        precise = 8.0 if seed == 3 else None
        toy.write(folder, g.cell("8", "MBN"), seed, MBN[seed], device="cpu: Toy", seconds=900.0, precise=precise)
    for seed in range(3):
        toy.write(folder, g.cell("16", "BN"), seed, 7 + seed / 10)
    toy.write(folder, g.cell("16", "MBN"), 1, 6.5)
    toy.write(folder, g.cell("8", "BN"), 0, 55.5, scale=0.1)
    return folder


@pytest.fixture(scope="module")
def files(results):
    return table.files(table.load(results), ["table4"])


GOLDEN = """\
|  | BN | paper | MBN | paper |
|---|---|---|---|---|
| 8 | 8.32 ± 0.19 (5) | 19.64 | **7.68 ± 0.28 (5)** | 15.37 |
| 16 | 7.10 ± 0.10 (3 of 5) | 13.26 | 6.50 (1 of 5) | 11.87 |
| 32 | - | 10.45 | - | 9.37 |
| 64 | - | 8.60 | - | 7.79 |
| 128 | - | 6.97 | - | 6.23 |
"""
DIFFERENCES = """\
|  | seeds | difference | 95 % interval | p | p (Welch) |
|---|---|---|---|---|---|
| 8, MBN | 5 | -0.64 | -0.83 to -0.45 | < 0.001 | 0.004 |
| 16, MBN | 1 | -0.60 | - | - | - |
"""
BESIDE = """\
|  | seeds | test error | with precise statistics | best epoch | training error |
|---|---|---|---|---|---|
| 8, BN | 5 | 8.32 | - | 8.32 | 1.00 |
| 8, MBN | 5 | 7.68 | 8.00 (n = 1) | 7.68 | 1.00 |
| 16, BN | 3 | 7.10 | - | 7.10 | 1.00 |
| 16, MBN | 1 | 6.50 | - | 6.50 | 1.00 |
"""
CLAIM = """\
- MBN has a lower test error than BN at every batch size: holds for 8 (-0.64 [-0.83, -0.45], n = 5); is not decided at \
this n for 16 (-0.60, n = 1), 32 (n = 0), 64 (n = 0) and 128 (n = 0).
"""


def test_markdown(files):
    page = files["table4.md"]
    assert page.startswith("# Table 4: Batch sizes, ResNet-56 on CIFAR-10\n\nTable 4 of the paper. Test error in ")
    assert f"\n\n{GOLDEN}\n" in page
    assert f"## Difference to BN\n\n{DIFFERENCES}\n" in page
    assert f"## Claims\n\n{CLAIM}\n" in page
    assert f"## Beside the test error\n\n{BESIDE}\n" in page
    # 8 runs of 0.5 h on a GPU and 1 more, 5 of 0.25 h with 2 threads.
    assert "14 runs, 4.5 GPU hours and 2.5 CPU hours (time x threads), on cpu: Toy; cuda: Toy." in page
    commands = re.findall(r"^python train.py .*", page, re.MULTILINE)
    assert len(commands) == 10
    assert commands[1] == (
        "python train.py dataset=cifar10 model=resnet56 schedule.iterations=78200 batch_size=8 norm=mbn seed=0"
        "   # 8, MBN"
    )


def test_golden_numbers_by_hand():
    assert (f"{statistics.mean(BN):.2f}", f"{statistics.stdev(BN):.2f}") == ("8.32", "0.19")
    test = stats.ttest_rel(MBN, BN)
    low, high = test.confidence_interval(0.95)
    assert f"{low:+.2f} to {high:+.2f}" == "-0.83 to -0.45"
    assert test.pvalue < 0.001
    assert f"{stats.ttest_ind(MBN, BN, equal_var=False).pvalue:.3f}" == "0.004"


def test_worse_or_undecided_is_not_bold(tmp_path):
    g = grid.read("table4")
    for seed, (bn, mbn) in enumerate([(6.0, 6.9), (6.1, 7.1), (6.2, 7.0)]):
        toy.write(tmp_path, g.cell("8", "BN"), seed, bn)
        toy.write(tmp_path, g.cell("8", "MBN"), seed, mbn)
    for seed, (bn, mbn) in enumerate([(6.0, 5.0), (6.1, 6.2), (6.2, 6.0)]):
        toy.write(tmp_path, g.cell("16", "BN"), seed, bn)
        toy.write(tmp_path, g.cell("16", "MBN"), seed, mbn)
    page = table.files(table.load(tmp_path), ["table4"])["table4.md"]
    assert "(3 of 5)**" not in page
    assert "does not hold for 8 (+0.90" in page
    assert "is not decided at this n for 16 (-0.37" in page


def rows_of(latex):
    body = latex.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    return [line.removesuffix(r" \\") for line in body.strip().splitlines() if line != r"\midrule"]


def assert_parses(latex):
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    assert latex.count("$") % 2 == 0
    columns = re.search(r"\\begin\{tabular\}\{(lr*)\}", latex)[1]
    rows = rows_of(latex)
    assert rows
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
    for environment in ("table", "tabular"):
        assert latex.count(rf"\begin{{{environment}}}") == latex.count(rf"\end{{{environment}}}") == 1
    text = re.sub(r"\\[&%$#_{}]", "", latex)
    assert not re.search(r"[%#_λ±]", text), "a character that LaTeX takes for something else"


def test_latex(files):
    assert_parses(files["table4.tex"])
    assert rows_of(files["table4.tex"])[:3] == [
        "& BN & paper & MBN & paper",
        r"8 & 8.32 $\pm$ 0.19 (5) & 19.64 & \textbf{7.68 $\pm$ 0.28 (5)} & 15.37",
        r"16 & 7.10 $\pm$ 0.10 (3 of 5) & 13.26 & 6.50 (1 of 5) & 11.87",
    ]


@pytest.mark.parametrize("name", grid.names())
def test_latex_of_every_grid_parses(name):
    for content in (table.latex(table.Measured(grid.read(name), {}, scale=s)) for s in (1.0, 0.1)):
        assert_parses(content)


def test_csv(results):
    tables = [table.Measured(grid.read(name), table.load(results)) for name in ("table4", "table3")]
    rows = list(csv.DictReader(io.StringIO(table.cells_csv(tables))))
    assert len(rows) == 10 + 24
    first, second, third, fourth = rows[:4]
    assert (first["table"], first["row"], first["column"], first["paper"]) == ("table4", "8", "BN", "19.64")
    assert (first["n"], first["seeds"], first["mean"], first["difference"]) == ("5", "0 1 2 3 4", "8.32", "")
    test = stats.ttest_rel(MBN, BN)
    assert float(second["p"]) == pytest.approx(test.pvalue, rel=1e-5)
    assert float(second["low"]) == pytest.approx(test.confidence_interval(0.95).low, rel=1e-5)
    assert (second["better"], second["bn_seeds"], third["bn_seeds"]) == ("yes", "5", "")
    assert (fourth["seeds"], fourth["sd"], fourth["difference"], fourth["p"]) == ("1", "", "-0.6", "")
    assert fourth["command"].startswith("python train.py dataset=cifar10 ")
    quoted = [r for r in rows if r["row"] == "GoogLeNet" and r["paper"]]
    assert [(r["metric"], r["paper"], r["command"]) for r in quoted] == [
        ("test_error", "27.31", ""),
        ("test_error_top5", "9.15", ""),
    ]


def test_short_runs_have_tables_of_their_own(results, files):
    assert "55.5" not in files["table4.md"]
    short = table.files(table.load(results), ["table4"], scale=0.1)
    assert set(short) == {"table4-scale0.1.md", "table4-scale0.1.tex"}
    page = short["table4-scale0.1.md"]
    assert "**Not the paper's protocol: every run has 0.1 of its length.**" in page
    assert "| 8 | 55.50 (1 of 5) | 19.64 | - | 15.37 |" in page
    assert "| paper, full length |" in page
    assert " schedule.scale=0.1 seed=0 " in page


def test_fewer_seeds(results):
    page = table.files(table.load(results), ["table4"], seeds=3)["table4.md"]
    assert "| 16 | 7.10 ± 0.10 (3) |" in page
    assert "| 8 | 8.27 ± 0.15 (3) |" in page


def command(*arguments):
    return subprocess.run(
        [sys.executable, "scripts/tables.py", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_a_record_edited_by_hand_is_refused(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    path = next((tmp_path / "copy" / "records").rglob("*.json"))
    path.write_text(path.read_text().replace('"test_loss": 0.2,', '"test_loss": 0.1,'))
    done = command(f"machine.results={tmp_path / 'copy'}", "table4")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "was changed after it was written" in done.stderr
    assert not (tmp_path / "copy" / "tables").exists()


def test_a_record_in_the_place_of_another_is_refused(results, tmp_path):
    shutil.copytree(results, tmp_path / "copy")
    path = next((tmp_path / "copy" / "records").rglob("*.json"))
    path.rename(path.with_name(f"{json.loads(path.read_text())['name'].rpartition('/')[2]}x.json"))
    with pytest.raises(UserError, match="move it to"):
        table.load(tmp_path / "copy")


def test_the_command_writes_files(results):
    done = command(f"machine.results={results}", "table6", "table4")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (results / "tables").iterdir()} == {
        *("table4.md", "table4.tex", "table6.md", "table6.tex"),
    }
    assert f"\n{GOLDEN}\n" in (results / "tables" / "table4.md").read_text()


def test_an_unknown_table_is_one_sentence():
    with pytest.raises(UserError, match="there is no table 'table7'"):
        table.measure({}, ["table7"])


def test_readme_part(results):
    names = [*table.PAPER, *table.BATCH_SIZES]
    part = table.readme_part(table.measure(table.load(results), names))
    assert "| [Table 4](results/tables/table4.md) | Batch sizes, ResNet-56 on CIFAR-10 | 4 / 10 | 1 to 5 |" in part
    assert "| [Table 3](results/tables/table3.md) | ImageNet | 0 / 20 (4 only quoted there) | - |" in part
    assert GOLDEN.strip() in part
    assert "](results/figures/batch-size.png)" in part  # its runs are table4-methods' too
    assert "png" not in table.readme_part(table.measure({}, names))
    old = f"a\n{table.MARKERS[0]}\nold\n{table.MARKERS[1]}\nb\n"
    assert table.replace_part(old, "new") == old.replace("old", "new")
    for wrong in ("", table.MARKERS[0], f"{table.MARKERS[1]}{table.MARKERS[0]}"):
        with pytest.raises(UserError, match="must hold"):
            table.replace_part(wrong, "new")


def test_evidence_part(results):
    records = table.load(results)
    part = table.evidence_part(table.measure(records, ["table4", "gradient"]), records)
    where = "[Table 4](tables/table4.md) | MBN has a lower test error than BN at every batch size"
    assert [line for line in part.splitlines() if line.startswith("| [Table")] == [
        f"| {where} | 8 | -0.64 [-0.83, -0.45], n = 5 | -4.27 | holds |  |",
        f"| {where} | 16 | -0.60, n = 1 | -1.39 | is not decided at this n | 15 |",
    ]
    runs = [line for line in part.splitlines() if line.startswith("| [cifar10")]
    assert len(runs) == len(records) == 15
    name = grid.read("table4").cell("8", "MBN").name(3)
    (line,) = [line for line in runs if name in line]
    assert line.startswith(
        f"| [{name}](records/{name}.json) | Table 4: 8, MBN; Gradient: ResNet-56, batch 8, MBN-2 paper | 8.10 | 8.00 | "
        "8.10 | 1.00 | 78,200 | 0.25 | cpu: Toy, 2 threads | eager | 0123456 | "
    )
    assert sum("| no table |" in line for line in runs) == 1  # the short one
    assert "None yet." in table.evidence_part(table.measure({}, ["table4"]), {})


def test_committed_tables_follow_from_committed_records(tmp_path):
    """In a clean copy: every committed table, byte for byte, and the README's part."""
    shutil.copytree(REPOSITORY / "results", tmp_path / "results", ignore=shutil.ignore_patterns("runs", "*.partial"))
    committed = {p.name: p.read_text() for p in (tmp_path / "results" / "tables").iterdir()}
    records = table.load(tmp_path / "results")
    expected = table.files(records)
    for scale in sorted({m[1] for name in committed if (m := re.search(r"-scale([\d.]+)\.(?:md|tex|csv)$", name))}):
        expected |= table.files(records, scale=float(scale))
    assert committed.keys() == expected.keys()
    for name, content in expected.items():
        assert committed[name] == content, f"{name}: run scripts/tables.py"
    tables = table.measure(records)
    for path, part in (
        (REPOSITORY / "README.md", table.readme_part(tables)),
        (REPOSITORY / "results" / "README.md", table.evidence_part(tables, records)),
    ):
        assert path.read_text() == table.replace_part(path.read_text(), part), f"{path}: run scripts/tables.py"


def test_braces_and_greek_in_latex():
    rows = rows_of(table.latex(table.Measured(grid.read("table5"), {})))
    assert rows[5] == r"$\lambda$ = \{0.1, 0.5, 0.9\} & - & 6.23"
