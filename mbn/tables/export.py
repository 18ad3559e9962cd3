"""Tables for other programs: LaTeX, one CSV of all cells; and all files of results/tables."""

import csv
import io
from pathlib import Path

from mbn.system.files import write_atomically
from mbn.tables.cells import Table, file_name, heads, lines
from mbn.tables.controls import controls_page
from mbn.tables.over_seeds import Contrast
from mbn.tables.page import command, markdown
from mbn.tables.robustness import robustness_page
from mbn.tables.rules import rules_page
from mbn.tables.run_cells import run_cells


def latex(table: Table) -> str:
    r"""A table environment for \usepackage{booktabs}."""
    g = table.grid
    caption = f"{g.title}. {g.about}"
    if table.scale != 1:
        caption = f"Not the paper's protocol: every run has {table.scale:g} of its length. {caption}"
    rows = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(caption)}}}",
        rf"\label{{tab:{file_name(g.name, table.scale, table.seeds)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(heads(table))}}}",
        r"\toprule",
        " & ".join(["", *map(_escape, heads(table))]).strip() + r" \\",
        r"\midrule",
        *(" & ".join([_escape(row), *cells]) + r" \\" for row, *cells in _cells(table)),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(rows) + "\n"


def _cells(table: Table) -> list[list[str]]:
    return lines(table, r"$\pm$", r"\textbf{%s}", r"%s $\uparrow$")


def _escape(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"λ": r"$\lambda$", "±": r"$\pm$", "\\": r"\textbackslash{}"}
    return "".join(special.get(c, c) for c in text)


CSV_FIELDS = (
    *("table", "row", "column", "metric", "paper", "n", "seeds", "mean", "sd", "bn_seeds", "difference", "low", "high"),
    *("p", "paper_difference", "p_paper", "mark", "diverged", "command"),
)


def cells_csv(tables: list[Table]) -> str:
    """One line for each number, empty where there is none.

    seeds: those that have the number; bn_seeds: how many BN has, where there is a difference to it. p_paper: of the
    paper's difference, taken for that of one more run of each cell.
    mark: better or worse, where the interval of the difference to BN is on one side of zero.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for table in tables:
        for e in table.entries:
            d = e.to_bn or Contrast()
            low, high = d.interval() or (None, None)
            one_more = d.one_more(e.paper_to_bn)
            writer.writerow(
                [
                    *(table.grid.name, e.cell.row, e.cell.column, e.metric, e.paper or "", len(e.values)),
                    " ".join(map(str, sorted(e.values))),
                    *map(_plain, (e.sample.mean if e.sample else None, e.sd)),
                    *(d.ns[1] if d.ns else "", *map(_plain, (d.mean, low, high, d.p()))),
                    *map(_plain, (e.paper_to_bn, one_more.p if one_more else None)),
                    *(e.mark, e.diverged or ""),
                    "" if e.cell.overrides is None else command(e.cell, table.scale),
                ]
            )
    return file.getvalue()


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def contents(tables: dict[str, Table], every: bool) -> dict[str, str]:
    """The content of each file of results/tables, by its name; none for a table without any run.

    every: these are all tables, so that the file of all cells and the pages about them are written, too.
    """
    run = {name: table for name, table in tables.items() if table.has_runs}
    content: dict[str, str] = {}
    for name, table in run.items():
        file = file_name(name, table.scale, table.seeds)
        content |= {f"{file}.md": markdown(table), f"{file}.tex": latex(table)}
    if every and run:
        first = next(iter(run.values()))
        content[f"{file_name('cells', first.scale, first.seeds)}.csv"] = cells_csv(list(tables.values()))
        if first.usual:
            content |= {f"{name}.md": page for name, page in pages_of_cells(tables).items()}
    return content


def pages_of_cells(tables: dict[str, Table]) -> dict[str, str]:
    """The pages about all cells with runs, by name; without those that would be empty."""
    cells = run_cells(tables)
    pages = {"rules": rules_page(cells), "controls": controls_page(cells), "robustness": robustness_page(tables, cells)}
    return {name: page for name, page in pages.items() if page}


def update(files: dict[Path, bytes]) -> None:
    """Write these files where their content differs, and print which."""
    old = {path for path, content in files.items() if path.exists() and path.read_bytes() == content}
    for path, content in files.items():
        if path not in old:
            write_atomically(path, content)
            print(f"wrote {path}")
    if old:
        print(f"unchanged: {len(old)} file{'s' * (len(old) > 1)}")


def say_not_made(name: str, why: str, path: Path) -> None:
    """Print that a page or a figure is not made. path: where an earlier one may lie, which stays."""
    left = f"; {path} is of records that are gone: delete it" if path.exists() else ""
    print(f"{name}: {why}{left}")
