"""Tables from records: markdown, LaTeX, one CSV of all cells, and parts of the README and of results/README.md.

A pure function of the records.
"""

import csv
import io
import re
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbn import grid
from mbn.grid import Cell, Grid
from mbn.records import record
from mbn.system.errors import UserError
from mbn.tables import claims
from mbn.tables.claims import Difference, Runs

MARKERS = "<!-- results -->", "<!-- /results -->"
METRICS = {"test_error": "test error", "test_error_top5": "top-5 test error", "train_error": "training error"}
# What records hold beside the test error at the end of training, and says what that is due to.
BESIDE = {
    "test_error": "test error",
    "test_error_precise": "with precise statistics",
    "test_error_best": "best epoch",
    "train_error": "training error",
}
# The grids that are the paper's, in the order of its pages.
PAPER = ("figure1", "table1", "table2", "table3", "table4", "table5", "table6")
# The grids that the plot under the README's Table 4 is drawn from, once it has several batch sizes.
BATCH_SIZES = ("table4-resnet20", "table4-methods")

Records = dict[str, dict[str, Any]]


def load(results: Path) -> Records:
    """All records by name. Errors: UserError for one that is not as it was written, or not in its place."""
    folder = results / "records"
    found = {}
    for path in sorted(folder.rglob("*.json")):
        one = record.read(path)
        if path != record.path_of(results, one["name"]):
            raise UserError(
                f"{path} is the record of {one['name']}: move it to {record.path_of(results, one['name'])}."
            )
        found[one["name"]] = one
    return found


@dataclass(frozen=True)
class Measured:
    """What records say of the cells of one grid, at the seeds and the scale that are asked for."""

    grid: Grid
    records: Records
    seeds: int = 5
    scale: float = 1.0

    def runs(self, cell: Cell) -> Runs:
        """The records of a cell, by seed."""
        if cell.overrides is None:
            return {}
        named = {seed: cell.name(seed, self.scale) for seed in range(self.seeds)}
        return {seed: self.records[name] for seed, name in named.items() if name in self.records}

    @cached_property
    def entries(self) -> list["Entry"]:
        """Row by row, metric by metric, column by column: the order in which the table prints them."""
        return [
            self._entry(self.grid.cell(row, column), metric)
            for row in self.grid.rows
            for metric in self.grid.metrics
            for column in self.grid.columns
        ]

    def _entry(self, cell: Cell, metric: str) -> "Entry":
        values = claims.values(self.runs(cell), metric)
        compared = None
        if cell.overrides is not None and cell.baseline().name(0, self.scale) != cell.name(0, self.scale):
            compared = claims.difference(values, claims.values(self.runs(cell.baseline()), metric))
        return Entry(cell, metric, values, compared, self.seeds)


@dataclass(frozen=True)
class Entry:
    """One number of a table. compared: its difference to BN; None where the cell is BN itself, or nothing is run."""

    cell: Cell
    metric: str
    values: claims.Values
    compared: Difference | None
    seeds: int

    @property
    def paper(self) -> str | None:
        return self.cell.paper.get(self.metric)

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference to BN lies below zero: all metrics are errors."""
        high = self.compared.interval.high if self.compared else None
        return high is not None and high < 0

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    def text(self, plus_minus: str = "±") -> str:
        """Examples: 6.41 ± 0.12 (5), 6.41 (1 of 5), -."""
        if self.mean is None:
            return "-"
        spread = f" {plus_minus} {self.sd:.2f}" if self.sd is not None else ""
        n = len(self.values)
        return f"{self.mean:.2f}{spread} ({n if n == self.seeds else f'{n} of {self.seeds}'})"


def file_name(name: str, scale: float) -> str:
    """Tables of shortened runs are files of their own."""
    return name if scale == 1 else f"{name}-scale{scale:g}"


# Markdown.


def markdown(measured: Measured) -> str:
    """The whole page of a grid."""
    g, scale = measured.grid, measured.scale
    parts = [f"# {_heading(g.name)}: {g.title}"]
    if scale != 1:
        parts.append(
            f"**Not the paper's protocol: every run has {scale:g} of its length.** The paper's numbers, at full "
            "length, stand beside them only as a reminder."
        )
    parts += [g.about, _main_table(measured)]
    parts.append(
        f"Mean ± standard deviation (n seeds, of {measured.seeds} wanted); `-`: nothing has run, or the paper prints "
        "nothing. Bold: the 95 % interval of the difference to BN lies below zero."
    )
    parts += ["## Difference to BN", _difference_table(measured)]
    if g.claims:
        sentences = [claims.sentence(c, claims.judge(c, g, measured.runs)) for c in g.claims]
        parts += ["## Claims", "\n".join(f"- {s}" for s in sentences)]
        parts.append(
            "Paired difference over common seeds [95 % interval]. A claim holds where the interval lies on its side, "
            "does not hold where it lies on the other, and is not decided otherwise."
        )
    parts += ["## Beside the test error", _beside_table(measured)]
    if g.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in g.notes)]
    parts += ["## Cost", _cost(measured), "## Commands", _commands(measured)]
    return "\n\n".join(parts) + "\n"


def _heading(name: str) -> str:
    """Example: Table 4, methods."""
    head, _, rest = name.partition("-")
    return re.sub(r"(\d+)", r" \1", head).capitalize() + (f", {rest}" if rest else "")


def _columns(measured: Measured) -> list[tuple[str, bool]]:
    """The heads of the columns behind the first, and whether each is the paper's."""
    g = measured.grid
    reminder = "paper" if measured.scale == 1 else "paper, full length"
    heads = []
    for metric in g.metrics:
        for column in g.columns:
            heads.append((f"{column}, {METRICS[metric]}" if len(g.metrics) > 1 else column, False))
            if g.paper:
                heads.append((reminder, True))
    return heads


def _rows(measured: Measured) -> Iterable[tuple[str, list[Entry]]]:
    for row in measured.grid.rows:
        yield row, [e for e in measured.entries if e.cell.row == row]


def _main_table(measured: Measured) -> str:
    lines = [["", *(head for head, _ in _columns(measured))]]
    for row, entries in _rows(measured):
        line = [row]
        for e in entries:
            line.append(f"**{e.text()}**" if e.better else e.text())
            if measured.grid.paper:
                line.append(e.paper or "-")
        lines.append(line)
    return _pipes(lines)


def _difference_table(measured: Measured) -> str:
    several = len(measured.grid.metrics) > 1
    lines = [["", *(["of"] if several else []), "seeds", "difference", "95 % interval", "p", "p (Welch)"]]
    for e in measured.entries:
        if e.compared is None or e.compared.interval.n == 0:
            continue
        i = e.compared.interval
        lines.append(
            [
                _label(e.cell),
                *([METRICS[e.metric]] if several else []),
                str(i.n),
                f"{i.mean:+.2f}",
                "-" if i.low is None else f"{i.low:+.2f} to {i.high:+.2f}",
                _p(e.compared.p),
                _p(e.compared.welch),
            ]
        )
    if len(lines) == 1:
        return "No run has one of BN at the same seed beside it yet."
    return _pipes(lines) + (
        "\n\nBN: one forward, on the same network, data and schedule. Paired over the seeds that both have (equal data "
        "order); Welch's test takes the seeds as unpaired. No p is corrected for the number of comparisons."
    )


def _beside_table(measured: Measured) -> str:
    lines = [["", "seeds", *BESIDE.values()]]
    for cell in measured.grid.cells:
        runs = measured.runs(cell)
        if runs:
            columns = [claims.values(runs, field) for field in BESIDE]
            lines.append([_label(cell), str(len(runs)), *(_mean_of(column, len(runs)) for column in columns)])
    if len(lines) == 1:
        return "Nothing has run yet."
    return _pipes(lines) + (
        "\n\nMeans over the seeds, in percent. Precise statistics are taken anew over an epoch of training with the "
        "final weights: what is left of a difference under them was made by training, the rest by the statistics at "
        "test time. The training error is that of augmented images in training, over the last epoch's worth."
    )


def _mean_of(values: claims.Values, n: int) -> str:
    """Example: 6.41, or 6.41 (n = 2) where others of the n have no such number."""
    if not values:
        return "-"
    return f"{statistics.fmean(values.values()):.2f}" + (f" (n = {len(values)})" if len(values) < n else "")


def _label(cell: Cell) -> str:
    return f"{cell.row}, {cell.column}"


def _p(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _pipes(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _cost(measured: Measured) -> str:
    """Hours by kind of device and the devices, over the runs of the table, each counted once."""
    runs = {
        r["name"]: r for cell in measured.grid.cells if cell.overrides is not None for r in measured.runs(cell).values()
    }
    if not runs:
        return "Nothing has run yet."
    several = sum(r["seconds"] for r in runs.values() if ", then " in r["device"])
    alone = [r for r in runs.values() if ", then " not in r["device"]]
    gpu = sum(r["seconds"] for r in alone if not r["device"].startswith("cpu"))
    cpu = sum(r["seconds"] * (r["threads"] or 1) for r in alone if r["device"].startswith("cpu"))
    kinds = ((gpu, "GPU hours"), (cpu, "CPU hours (time x threads)"), (several, "hours on one after the other"))
    hours = [f"{s / 3600:.1f} {kind}" for s, kind in kinds if s]
    devices = sorted({r["device"] for r in runs.values()})
    commits = sorted({(r["commit"] or "unknown")[:7] for r in runs.values()})
    dirty = sum(bool(r["dirty"]) for r in runs.values())
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {' and '.join(hours) or 'no time'}, on {'; '.join(devices)}."
    text += f" Commits: {', '.join(commits)}"
    return text + (f"; {dirty} with uncommitted changes." if dirty else ".")


def _commands(measured: Measured) -> str:
    lines = []
    for cell in measured.grid.cells:
        if cell.overrides is not None:
            lines.append(f"{_command(cell, measured.scale)}   # {_label(cell)}")
    return "```bash\n" + "\n".join(lines) + f"\n```\n\nEach with `seed=0` to `seed={measured.seeds - 1}`."


def _command(cell: Cell, scale: float) -> str:
    return shlex.join(["python", "train.py", *cell.command(0, scale)])


# LaTeX.


def latex(measured: Measured) -> str:
    r"""A table environment for \usepackage{booktabs}."""
    g = measured.grid
    heads = _columns(measured)
    caption = f"{g.title}. {g.about}"
    if measured.scale != 1:
        caption = f"Not the paper's protocol: every run has {measured.scale:g} of its length. {caption}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escape(caption)}}}",
        rf"\label{{tab:{file_name(g.name, measured.scale)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["", *(_escape(head) for head, _ in heads)]).strip() + r" \\",
        r"\midrule",
    ]
    for row, entries in _rows(measured):
        line = [_escape(row)]
        for e in entries:
            text = e.text(r"$\pm$")
            line.append(rf"\textbf{{{text}}}" if e.better else text)
            if g.paper:
                line.append(e.paper or "-")
        lines.append(" & ".join(line) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"} | {"λ": r"$\lambda$", "±": r"$\pm$", "\\": r"\textbackslash{}"}
    return "".join(special.get(c, c) for c in text)


# CSV.

CSV_FIELDS = (
    *("table", "row", "column", "metric", "paper", "n", "seeds", "mean", "sd", "bn_seeds", "difference", "low", "high"),
    *("p", "p_welch", "better", "command"),
)


def cells_csv(tables: list[Measured]) -> str:
    """One line a number. Empty where there is none; seeds are those that have records."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for measured in tables:
        for e in measured.entries:
            i = e.compared.interval if e.compared else claims.interval([])
            runs = e.cell.overrides is not None
            p, welch = (e.compared.p, e.compared.welch) if e.compared else (None, None)
            writer.writerow(
                [
                    *(measured.grid.name, e.cell.row, e.cell.column, e.metric, e.paper or "", len(e.values)),
                    " ".join(map(str, sorted(e.values))),
                    *map(_plain, (e.mean, e.sd)),
                    *(i.n if e.compared else "", *map(_plain, (i.mean, i.low, i.high, p, welch))),
                    *("yes" if e.better else "", _command(e.cell, measured.scale) if runs else ""),
                ]
            )
    return file.getvalue()


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


# The README's part.


def readme_part(tables: dict[str, Measured]) -> str:
    """What stands between the markers: Table 4 and its claim, and how much of each table is measured."""
    lines = [["", "", "numbers measured / in the paper", "seeds"]]
    for name in PAPER:
        measured = tables[name]
        printed = [e for e in measured.entries if e.paper is not None]
        lines.append([_link(name), measured.grid.title, _share(printed), _seeds(printed)])
    others = [
        f"{_link(name)} {_share(tables[name].entries)}" for name in tables if name not in PAPER and name in grid.names()
    ]
    table4 = tables["table4"]
    claim = table4.grid.claims[0]
    parts = [
        f"{_link('table4')}, {_lower(table4.grid.title)}: test error in percent after 78,200 iterations, mean ± "
        "standard deviation (seeds), beside the paper's.",
        _main_table(table4),
        claims.sentence(claim, claims.judge(claim, table4.grid, table4.runs))
        + " Every run, what holds and what does not, and how many more runs would tell: "
        "[results/README.md](results/README.md). How much of each table is measured:",
        _pipes(lines),
        f"Beyond the paper, measured / wanted: {', '.join(others)}.",
    ]
    if any(len({e.cell.row for e in tables[name].entries if e.values}) > 1 for name in BATCH_SIZES):
        parts.append("![Test error against batch size](results/figures/batch-size.png)")
    return "\n\n".join(parts)


def _lower(title: str) -> str:
    return title[0].lower() + title[1:]


def _link(name: str) -> str:
    return f"[{_heading(name)}](results/tables/{name}.md)"


def _share(entries: list[Entry]) -> str:
    wanted = [e for e in entries if e.cell.overrides is not None or e.paper is not None]
    quoted = sum(e.cell.overrides is None for e in wanted)
    share = f"{sum(bool(e.values) for e in wanted)} / {len(wanted)}"
    return share + (f" ({quoted} only quoted there)" if quoted else "")


def _seeds(entries: list[Entry]) -> str:
    counts = sorted({len(e.values) for e in entries if e.values})
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


# The part of results/README.md.


def evidence_part(tables: dict[str, Measured], records: Records) -> str:
    """Every claim that a run says something of, and every run."""
    verdicts = [["", "claim", "", "here", "in the paper", "outcome", "seeds to decide"]]
    for name, measured in tables.items():
        for claim in measured.grid.claims:
            for v in claims.judge(claim, measured.grid, measured.runs):
                if v.interval.n:
                    needed = claims.seeds_to_decide(v.interval) if v.outcome == claims.OPEN else None
                    link = f"[{_heading(name)}](tables/{name}.md)"
                    printed = claims.printed(claim, measured.grid, v.place)
                    shown = "" if printed is None else f"{printed:+.2f}"
                    verdicts.append(
                        [link, claim["claim"], v.place, str(v.interval), shown, v.outcome, str(needed or "")]
                    )
    cells: dict[str, list[str]] = {}
    for name, measured in tables.items():
        for cell in measured.grid.cells:
            for one in measured.runs(cell).values():
                cells.setdefault(one["name"], []).append(f"{_heading(name)}: {_label(cell)}")
    lines = [["run", "is in", *BESIDE.values(), "iterations", "hours", "device", "mode", "commit", "date"]]
    for name, one in sorted(records.items()):
        threads = f", {one['threads']} thread{'s' * (one['threads'] != 1)}" if one["device"].startswith("cpu") else ""
        lines.append(
            [
                f"[{name}](records/{name}.json)",
                "; ".join(cells.get(name, ["no table"])),
                *("-" if one[field] is None else f"{one[field]:.2f}" for field in BESIDE),
                f"{one['iterations']:,}",
                f"{one['seconds'] / 3600:.2f}",
                one["device"] + threads,
                one["mode"],
                (one["commit"] or "unknown")[:7] + " and changes" * bool(one["dirty"]),
                one["date"][:10],
            ]
        )
    return "\n\n".join(
        [
            "### Claims that runs say something of",
            _pipes(verdicts) if len(verdicts) > 1 else "None yet.",
            "Here: mean difference over common seeds [95 % interval], in percent; negative where the claim says lower. "
            f"Seeds to decide: with which a difference of that size would be seen with {claims.POWER:.0%} power, at "
            f"the variance over these seeds pooled with that of {claims.ASSUMED_RUNS} published reruns of ResNet-56 at "
            f"batch 128 (standard deviation {claims.ASSUMED_SD} %).",
            "### Runs",
            _pipes(lines) if records else "None yet.",
            "Errors in percent; hours from the first iteration to the last, evaluation included.",
        ]
    )


def replace_part(page: str, part: str, name: str = "README.md") -> str:
    """A page with what is between its markers replaced. Errors: UserError without the two markers."""
    start, end = MARKERS
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise UserError(f"{name} must hold {start} and after it {end}, once each: put them back.")
    head, _, rest = page.partition(start)
    return f"{head}{start}\n{part}\n{end}{rest.partition(end)[2]}"


# All files.


def files(records: Records, names: list[str] | None = None, seeds: int = 5, scale: float = 1.0) -> dict[str, str]:
    """The content of each file of results/tables, by its name; cells.csv only with all tables (names is None)."""
    tables = measure(records, names, seeds, scale)
    content = {}
    for name, measured in tables.items():
        content[f"{file_name(name, scale)}.md"] = markdown(measured)
        content[f"{file_name(name, scale)}.tex"] = latex(measured)
    if names is None:
        content[f"{file_name('cells', scale)}.csv"] = cells_csv(list(tables.values()))
    return content


def measure(
    records: Records, names: list[str] | None = None, seeds: int = 5, scale: float = 1.0
) -> dict[str, Measured]:
    """Every table that is named, or all of them. Errors: UserError for a name that is none."""
    return {name: Measured(grid.read(name), records, seeds, scale) for name in names or grid.names()}
