"""The runs that were also tested under other rules: a page of all, and BN beside MBN. Pure functions of the records."""

import statistics
from collections.abc import Iterable

from mbn.grid import Cell
from mbn.tables.cells import Table
from mbn.tables.measures import Record, control
from mbn.tables.page import pipes
from mbn.tables.run_cells import RunCell

ABOUT = (
    "Test error in percent of the same final weights. First as every table has it: BN and BRN with their moving "
    "averages, MBN with its memory's pool. Then under other rules."
)
OF_RULES = (
    "- batches of N: training mode (dropout off) with test batches of N images, or of as many as in training. BN "
    "normalises a batch by its own statistics, BRN and MBN by these and their averages or memory, which stay as "
    "training left them (held) or take in each test batch (rolling). With BN both are the same number.\n"
    "- averages with momentum m: BN's moving averages, made again from the last 100 batches of training with m as the "
    "weight of the new batch (the tables' is 0.1).\n"
    "- newest entry as the batch: MBN's newest entry has the weight 1 of a current batch, the older ones lambda "
    "eta^(a-1).\n"
    "- `-`: the method has no such rule, or it was not measured."
)
# The columns, and by which names records have them, {batch} for the batch size of training; '' is a table's own number.
AS_IN_THE_TABLES = "as in the tables"
BATCHES = {
    f"batches {of}, {memory}": (f"test batch of {n}, {memory}", f"test batch of {n}")
    for of, n in (("as in training", "{batch}"), ("of 8", "8"), ("of 128", "128"))
    for memory in ("held", "rolling")
}
AVERAGES = {name: (name,) for name in ("averages with momentum 0.9", "averages with momentum 1.0")}
COLUMNS = {AS_IN_THE_TABLES: ("",), **BATCHES, **AVERAGES, "newest entry as the batch": ("newest entry as the batch",)}


def measured_by_rules(cells: list[RunCell]) -> list[tuple[RunCell, list[Record]]]:
    """The cells with runs that have such errors, and these runs, by seed."""
    found = [(cell, [one for _, one in sorted(cell.runs.items()) if control(one, "rules")]) for cell in cells]
    return [(cell, runs) for cell, runs in found if runs]


def rules_page(cells: list[RunCell]) -> str:
    """Means by cell, and every run; nothing where no run has such errors."""
    found = measured_by_rules(cells)
    if not found:
        return ""
    head = [name for name in COLUMNS if any(_error(one, name) is not None for _, runs in found for one in runs)]
    means = [[cell.label, str(len(runs)), *(_mean(runs, name) for name in head)] for cell, runs in found]
    each = [
        [
            f"[{cell.label}](../records/{one['name']}.json), seed {one['config']['seed']}",
            *(_mean([one], name) for name in head),
        ]
        for cell, runs in found
        for one in runs
    ]
    parts = ["# Other rules at test time", ABOUT, OF_RULES, "## Means", pipes([["", "runs", *head], *means])]
    return "\n\n".join([*parts, "## Runs", pipes([["", *head], *each])]) + "\n"


def _error(one: Record, column: str) -> float | None:
    """A run's test error in percent under the rule of a column; None where it has none."""
    of_rules = {**control(one, "rules"), "": one["test_error"]}
    names = [name.format(batch=one["config"]["batch_size"]) for name in COLUMNS[column]]
    return next((of_rules[name] for name in names if name in of_rules), None)


def _mean(runs: list[Record], column: str) -> str:
    """The mean test error under the rule of a column, with n where fewer runs have it."""
    known = [error for error in (_error(one, column) for one in runs) if error is not None]
    if not known:
        return "-"
    return f"{statistics.fmean(known):.2f}" + (f" (n = {len(known)})" if len(known) < len(runs) else "")


# The methods and the columns of the table of BN beside MBN.
BN_AND_MBN = ("BN-1", "MBN-2")
OF_PAIR = (AS_IN_THE_TABLES, *(name for name in BATCHES if not name.startswith("batches of 8,")), *AVERAGES)
OF_BN_AND_MBN = (
    "Means over equal seeds of BN / MBN, in brackets. *Batches*: training mode, with the memory held or rolling; BN "
    "has no memory, and both times the same number. *Averages*: evaluation mode, BN's averages with another momentum; "
    "MBN has none. What the rules are: [other rules](tables/rules.md)."
)


def bn_and_mbn(cells: list[RunCell], table4: Table) -> str:
    """A row for each place where runs of BN with one forward or of MBN with two and the paper's gradient have such
    errors, over the seeds that both have, and Table 4's numbers of the paper."""
    runs: dict[str, dict[str, list[Record]]] = {}
    bn: dict[str, Cell] = {}
    for cell, found in measured_by_rules(cells):
        if cell.method in BN_AND_MBN:
            runs.setdefault(cell.place, {method: [] for method in BN_AND_MBN})[cell.method] = found
            bn[cell.place] = cell.bn
    if not runs:
        return "None yet."
    printed = [table4.grid.row(row) for row in table4.grid.rows]
    paper = {of_bn.name(0): _pair(cell.paper["test_error"] or "-" for cell in (of_bn, mbn)) for of_bn, mbn in printed}
    rows = [["BN / MBN", *OF_PAIR, "the paper"]]
    for place, of in runs.items():
        if equal := set.intersection(*({_seed(one) for one in some} for some in of.values())):
            of |= {method: [one for one in some if _seed(one) in equal] for method, some in of.items()}
        row = [f"{place} ({_seeds(of)})"]
        for name in OF_PAIR:
            names = (name, AS_IN_THE_TABLES if name in AVERAGES else name)
            row.append(_pair(_mean(of[method], one) for method, one in zip(BN_AND_MBN, names, strict=True)))
        rows.append([*row, paper.get(bn[place].name(0), "-")])
    return f"{pipes(rows)}\n\n{OF_BN_AND_MBN}"


def _seed(record: Record) -> int:
    seed: int = record["config"]["seed"]
    return seed


def _seeds(of: dict[str, list[Record]]) -> str:
    """Examples: seed 0; seeds 2, 3; seeds 2, 3, 4 / -."""
    lists = [", ".join(str(_seed(one)) for one in some) or "-" for some in of.values()]
    texts = list(dict.fromkeys(lists))
    return f"seed{'s' * (texts != [texts[0]] or ',' in texts[0])} {_pair(texts)}"


def _pair(texts: Iterable[str]) -> str:
    return " / ".join(texts)
