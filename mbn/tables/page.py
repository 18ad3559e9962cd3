"""The page of a table in markdown: a pure function of the records."""

import shlex
import statistics

from mbn.grid import METRICS, Cell
from mbn.launch.table_status import Runs, roughly
from mbn.tables import claims
from mbn.tables.cells import Table, heading, heads, label, lines
from mbn.tables.over_seeds import Values

# The fields of a record that help to explain its test error, and what a page calls them.
BESIDE = {
    "test_error": "test error",
    "test_error_precise": "with precise statistics",
    "test_error_best": "best epoch",
    "train_error": "training error",
}


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
        "nothing. Bold: the 95 % interval of the difference to BN lies below zero."
    )
    if g.notes:
        parts.append("\n".join(f"- {note}" for note in g.notes))
    parts += ["## Difference to BN", _difference_table(table)]
    if g.claims:
        parts += ["## Claims", "\n".join(claims.listed(c, claims.judge(c, table.runs)) for c in g.claims)]
        parts.append(
            "Mean over the seeds that all cells of a claim have [95 % interval]. A claim holds where the whole "
            "interval agrees with it, and does not hold where the whole interval contradicts it. Otherwise it is not "
            "decided yet: so many seeds would decide it if the mean stayed as it is."
        )
    parts += ["## Beside the test error", _beside_table(table)]
    parts += ["## Cost", _cost(table), missing(table.status.whole), "## Commands", _commands(table)]
    return "\n\n".join(parts) + "\n"


def main_table(table: Table) -> str:
    return pipes([["", *heads(table)], *lines(table, "±", "**%s**")])


def _difference_table(table: Table) -> str:
    several = len(table.grid.metrics) > 1
    rows = [["", *(["of"] if several else []), "seeds", "difference", "95 % interval", "p", "p (Welch)"]]
    for e in table.entries:
        d = e.to_bn
        if d is not None and d.mean is not None:
            interval = "-" if d.low is None else f"{d.low:+.2f} to {d.high:+.2f}"
            of = [METRICS[e.metric]] if several else []
            rows.append([label(e.cell), *of, str(d.n), f"{d.mean:+.2f}", interval, _p(d.p), _p(e.welch)])
    if len(rows) == 1:
        return "No run can be compared yet: BN has not run at its seed."
    return pipes(rows) + (
        "\n\nBN: one forward, on the same network, data and schedule. Paired over the seeds that both have (equal data "
        "order); Welch's test does not pair them. No p is corrected for the number of comparisons."
    )


def _beside_table(table: Table) -> str:
    rows = [["", "seeds", *BESIDE.values()]]
    for cell in table.grid.cells:
        n = len(table.runs(cell))
        if n:
            rows.append([label(cell), str(n), *(_mean_of(table.values(cell, field), n) for field in BESIDE)])
    return pipes(rows) + (
        "\n\nMeans over the seeds, in percent. Precise statistics are measured again over an epoch of training with "
        "the final weights. A difference that remains with them comes from training; the rest of it comes from the "
        "statistics at test time. The training error is that of augmented images in training, over the last epoch."
    )


def _mean_of(values: Values, n: int) -> str:
    """Example: 6.41, or 6.41 (n = 2) if only two of the n runs have such a number."""
    if not values:
        return "-"
    return f"{statistics.fmean(values.values()):.2f}" + (f" (n = {len(values)})" if len(values) < n else "")


def _p(p: float | None) -> str:
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
    several = sum(r["seconds"] for r in runs.values() if ", then " in r["device"])
    alone = [r for r in runs.values() if ", then " not in r["device"]]
    gpu = sum(r["seconds"] for r in alone if not r["device"].startswith("cpu"))
    cpu = sum(r["seconds"] * (r["threads"] or 1) for r in alone if r["device"].startswith("cpu"))
    kinds = ((gpu, "GPU hours"), (cpu, "CPU hours (time x threads)"), (several, "hours on several devices in turn"))
    hours = [f"{s / 3600:.1f} {kind}" for s, kind in kinds if s]
    devices = sorted({r["device"] for r in runs.values()})
    commits = sorted({(r["commit"] or "unknown")[:7] for r in runs.values()})
    dirty = sum(bool(r["dirty"]) for r in runs.values())
    text = f"{len(runs)} run{'s' * (len(runs) > 1)}, {' and '.join(hours) or 'no time'}, on {'; '.join(devices)}."
    text += f" Commits: {', '.join(commits)}"
    return text + (f"; {dirty} with uncommitted changes." if dirty else ".")


def missing(runs: Runs) -> str:
    """Example: Missing: 33 of 50 runs, about 154 h (one at a time, at the speed of the records)."""
    if not runs.missing:
        return "Nothing is missing."
    text = f"Missing: {len(runs.missing)} of {len(runs.wanted)} run{'s' * (len(runs.wanted) > 1)}"
    known = len(runs.missing) - runs.unknown
    if known:
        of_them = f"; {known} of them take" if runs.unknown else ","
        text += f"{of_them} about {roughly(runs.seconds)} (one at a time, at the speed of the records)"
    if runs.unknown:
        text += f"{';' if known else ','} the time of {runs.unknown} is unknown (no record has such a network)"
    return f"{text}."


def _commands(table: Table) -> str:
    run = [cell for cell in table.grid.cells if cell.overrides is not None]
    shown = "\n".join(f"{command(cell, table.scale)}   # {label(cell)}" for cell in run)
    return f"```bash\n{shown}\n```\n\nEach with `seed=0` to `seed={table.seeds - 1}`."


def command(cell: Cell, scale: float) -> str:
    return shlex.join(["python", "train.py", *cell.command(0, scale)])
