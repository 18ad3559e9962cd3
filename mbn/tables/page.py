"""The page of a table in markdown: a pure function of the records."""

import shlex
import statistics
from collections.abc import Iterable

from mbn.grid import METRICS, Cell
from mbn.launch.table_status import RunCounts, roughly
from mbn.tables import claims
from mbn.tables.cells import POOLED_APART, Table, heading, heads, label, lines, pooled_with
from mbn.tables.measures import BESIDE, TEST_ERROR, Record
from mbn.tables.over_seeds import SEEDS, Values, detectable


def markdown(table: Table) -> str:
    """The whole page of a table that has runs."""
    g, scale = table.grid, table.scale
    parts = [f"# {heading(g.name)}: {g.title}"]
    if scale != 1:
        parts.append(
            f"**Not the paper's protocol: every run has {scale:g} of its length.** The paper's numbers, at full "
            "length, stand beside them only as a reminder."
        )
    parts += [g.about, main_table(table)]
    parts.append(
        f"Mean ± standard deviation (n seeds, of {table.seeds} wanted); `-`: nothing has run, or the paper prints "
        "nothing. The 95 % interval of the difference to BN lies below zero where a number is **bold**, and above it "
        "at `↑`."
    )
    if g.notes:
        parts.append("\n".join(f"- {note}" for note in g.notes))
    parts += ["## Difference to BN", _difference_table(table)]
    if levels := level_rows([table]):
        parts += ["## Against the paper's numbers", pipes([LEVELS, *levels]), OF_LEVELS]
    if g.claims:
        listed = (claims.listed(claim, claims.judge(claim, table.all_runs)) for claim in g.claims)
        parts += ["## Claims", "\n".join(listed), OF_CLAIMS]
    if power := detectable_sentence([table]):
        parts.append(power)
    if any(e.values for e in table.entries):
        parts += ["## Beside the test error", _beside_table(table)]
    parts += ["## Cost", _cost(table), missing(table.status.whole), "## Commands", _commands(table)]
    return "\n\n".join(parts) + "\n"


def main_table(table: Table) -> str:
    return pipes([["", *heads(table)], *lines(table, "±", "**%s**", "%s ↑")])


OF_CLAIMS = (
    "Means over the seeds of each cell, unpaired [95 % interval]; the variance is pooled over all cells of a network "
    f"and data set ({POOLED_APART}). A claim holds where the whole interval agrees with it, and does not hold where "
    "the whole interval contradicts it; otherwise it is undecided. A number of the paper is taken for that of one more "
    "run of each cell, and excluded where it lies outside the 95 % interval for that. "
    "That two cells are equal holds where the 90 % interval lies inside the margin (two one-sided tests at 5 %). "
    "Together: the mean over the places that have runs, weighted by precision. The primary claims are decided with "
    "corrected p in the [results](../README.md), over all their places; here no p is corrected."
)
LEVELS = ["", "here (n)", "95 % interval for one more run", "paper", "p", ""]
OF_LEVELS = (
    "The paper's number is taken for that of one more run: mean ± t sd sqrt(1 + 1/n), with the pooled standard "
    "deviation. No p is corrected."
)


def level_rows(tables: Iterable[Table], of_table: bool = False) -> list[list[str]]:
    """The paper's numbers against ours, below LEVELS. of_table: with the table in the first column, each run once."""
    rows, seen = [], set()
    for table in tables:
        several = len(table.grid.metrics) > 1
        for e in table.entries:
            key = (e.sample and e.sample.name, e.metric, e.paper)
            if e.one_more is None or e.sample is None or e.paper is None or key in seen:
                continue
            seen.add(key)
            name = label(e.cell) + (f", {METRICS[e.metric]}" if several else "")
            inside = "outside" if e.one_more.excluded else "inside"
            interval = f"{e.one_more.low:.2f} to {e.one_more.high:.2f}"
            name = f"{link(table, '')}: {name}" if of_table else name
            rows.append([name, f"{e.sample.mean:.2f} ({e.sample.n})", interval, e.paper, p_cell(e.one_more.p), inside])
    return rows


def _difference_table(table: Table) -> str:
    several = len(table.grid.metrics) > 1
    paper = ["paper's difference", "p against it"] if table.grid.paper else []
    rows = [["", *(["of"] if several else []), "n", "difference", "95 % interval", "p", *paper]]
    for e in table.entries:
        d = e.to_bn
        if d is not None and d.mean is not None:
            interval = d.interval()
            shown = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "-"
            of = [METRICS[e.metric]] if several else []
            printed, one_more = e.paper_to_bn, d.one_more(e.paper_to_bn)
            theirs = ["-" if printed is None else f"{printed:+.2f}", p_cell(one_more.p if one_more else None)]
            row = [label(e.cell), *of, d.n, f"{d.mean:+.2f}", shown, p_cell(d.p())]
            rows.append([*row, *(theirs if paper else [])])
    if len(rows) == 1:
        bn_has_run = any(e.to_bn is None and e.sample for e in table.entries)
        return f"No run can be compared yet: {'only BN has a number' if bn_has_run else 'BN has not run'}."
    text = (
        "BN: one forward, on the same network, data and schedule. n: seeds of the cell + seeds of BN, unpaired. "
        f"The variance is pooled over all cells of a network and data set ({POOLED_APART}). No p is corrected."
    )
    if paper:
        text += " In the last column the paper's difference is taken for that of one more run of each cell."
    return f"{pipes(rows)}\n\n{text}"


def detectable_sentence(tables: list[Table]) -> str:
    """The standard deviation of test errors of each group of cells that pool it, and what the planned seeds would show;
    or nothing, where another number is asked for."""
    if tables[0].seeds != SEEDS:
        return ""
    cells = [cell for table in tables for cell in table.grid.cells if cell.overrides is not None]
    said = []
    for name in dict.fromkeys(map(pooled_with, cells)):
        spread = tables[0].all_runs.spread(name, TEST_ERROR)
        if spread.sd is not None:
            of = f"standard deviation {spread.sd:.2f}, known with {spread.freedom} degrees of freedom"
            said.append(f"{detectable(spread.sd):.2f} on {name} ({of})")
    if not said:
        return ""
    return (
        f"{SEEDS} seeds of each cell are planned, whatever they show. In a t test of two cells alone they would show a "
        f"difference of test errors of {', '.join(said)} with 80 % power."
    )


def _beside_table(table: Table) -> str:
    run = {cell: runs for cell in table.grid.cells if (runs := table.runs(cell)) and not table.all_runs.diverge(cell)}
    found = {name: {cell: table.all_runs.values(cell, measure) for cell in run} for name, measure in BESIDE.items()}
    shown = {name: values for name, values in found.items() if any(values.values())}
    rows = [["", "seeds", *shown]]
    for cell, runs in run.items():
        tests = table.all_runs.values(cell, TEST_ERROR)
        rows.append(
            [label(cell), str(len(runs)), *(_mean_of(values[cell], tests, len(runs)) for values in shown.values())]
        )
    return pipes(rows) + (
        "\n\nMeans over the seeds, in percent; in brackets, where not all have the number, how many do, and their mean "
        "test error. Precise statistics are measured again over an epoch of training with "
        "the final weights. A difference that remains with them comes from training; the rest of it comes from the "
        "statistics at test time. The training error is that of augmented images in training, over the last epoch; in "
        "evaluation: of augmented images too, with the final weights and as at test time. Memory held: an older way of "
        "measuring, which kept BRN's and MBN's memory fixed meanwhile."
    )


def _mean_of(values: Values, tests: Values, n: int) -> str:
    """Examples: 6.41; 6.41 (n = 2) if only two of the n runs have such a number; 6.41 (n = 2: 6.50) if more of them
    have a test error, of which 6.50 is the mean of these two."""
    if not values:
        return "-"
    own = f": {statistics.fmean(tests[seed] for seed in values):.2f}" if len(values) < len(tests) else ""
    return f"{statistics.fmean(values.values()):.2f}" + (f" (n = {len(values)}{own})" if len(values) < n else "")


def p_cell(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def link(table: Table, to_results: str) -> str:
    """A link to the page of a table, which has one once it has runs. to_results: the folder of results, from there."""
    name = heading(table.grid.name)
    return f"[{name}]({to_results}tables/{table.grid.name}.md)" if table.has_runs else name


def pipes(rows: list[list[str]]) -> str:
    """A table in markdown; the first row is its head."""
    shown = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([shown[0], "|" + "---|" * len(rows[0]), *shown[1:]])


def _cost(table: Table) -> str:
    """Hours by kind of device and the devices, over the runs of the table, each counted once."""
    runs = {r["name"]: r for cell in table.grid.cells for r in table.runs(cell).values()}
    spent = {name: r["seconds"] * _processes(r) for name, r in runs.items()}
    several = sum(spent[name] for name, r in runs.items() if ", then " in r["device"])
    alone = {name: r for name, r in runs.items() if ", then " not in r["device"]}
    gpu = sum(spent[name] for name, r in alone.items() if not r["device"].startswith("cpu"))
    cpu = sum(spent[name] * (r["threads"] or 1) for name, r in alone.items() if r["device"].startswith("cpu"))
    kinds = (
        (gpu, "GPU hours (each run's, alone or beside others)"),
        (cpu, "CPU hours (time x threads)"),
        (several, "hours on several devices in turn"),
    )
    hours = [f"{s / 3600:.1f} {kind}" for s, kind in kinds if s]
    devices = sorted({r["device"] for r in runs.values()})
    commits = sorted({(r["commit"] or "unknown")[:7] for r in runs.values()})
    dirty = sum(bool(r["dirty"]) for r in runs.values())
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {' and '.join(hours) or 'no time'}, on {'; '.join(devices)}."
    text += f" Commits: {', '.join(commits)}"
    return text + (f"; {dirty} with uncommitted changes." if dirty else ".")


def _processes(record: Record) -> float:
    """How many processes trained a run, over its parts by their iterations."""
    parts = record.get("parts") or [{"from": 0}]
    ends = [*(part["from"] for part in parts[1:]), record["iterations"]]
    numbers = [(end - part["from"], part.get("processes", 1)) for part, end in zip(parts, ends, strict=True)]
    length = sum(n for n, _ in numbers)
    return sum(n * processes for n, processes in numbers) / length if length else 1.0


def missing(runs: RunCounts) -> str:
    """Example: Missing: 33 of 50 runs, about 154 h (one at a time, at the speed of the records)."""
    if not runs.missing:
        return "Nothing is missing."
    text = f"Missing: {len(runs.missing)} of {len(runs.wanted)} run{'s' * (len(runs.wanted) > 1)}"
    known = len(runs.missing) - runs.unknown
    if known:
        of_them = f"; {known} of them take" if runs.unknown else ","
        text += f"{of_them} about {roughly(runs.seconds)} (one at a time, at the speed of the records)"
    if runs.unknown:
        text += f"{';' if known else ','} the time of {runs.unknown} is unknown (no finished run has such a network)"
    return f"{text}."


def _commands(table: Table) -> str:
    run = [cell for cell in table.grid.cells if cell.overrides is not None]
    shown = "\n".join(f"{command(cell, table.scale)}   # {label(cell)}" for cell in run)
    return f"```bash\n{shown}\n```\n\nEach with `seed=0` to `seed={table.seeds - 1}`."


def command(cell: Cell, scale: float) -> str:
    return shlex.join(["python", "train.py", *cell.command(0, scale)])
