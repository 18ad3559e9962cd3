"""The page of the runs that were also tested under other rules: a pure function of the records."""

import statistics

from mbn.tables.cells import Table, cells_of_runs
from mbn.tables.measures import Record, control
from mbn.tables.page import pipes

ABOUT = (
    "Test error in percent of the same final weights. First as every table has it: BN and BRN with their moving "
    "averages, MBN with its memory's pool. Then under other rules, which a run has if its method has them."
)


def measured_by_rules(tables: dict[str, Table]) -> list[Record]:
    """The records that have such errors, by name."""
    records = next(iter(tables.values())).records if tables else {}
    return [one for _, one in sorted(records.items()) if control(one, "rules")]


def rules_page(tables: dict[str, Table]) -> str:
    """Means by cell, and every run; nothing where no run has such errors."""
    found = measured_by_rules(tables)
    if not found:
        return ""
    labels = cells_of_runs(tables)
    rules = list(dict.fromkeys(rule for one in found for rule in control(one, "rules")))
    cells: dict[str, list[Record]] = {}  # a run that no table has is by itself
    for one in found:
        name = str(one["name"])
        cells.setdefault(labels.get(name, [name])[0], []).append(one)
    head = ["as in the tables", *rules]
    means = [[name, str(len(runs)), *_means(runs, rules)] for name, runs in cells.items()]
    runs = [
        [f"[{name}](../records/{one['name']}.json), seed {one['config']['seed']}", *_means([one], rules)]
        for name, of_cell in cells.items()
        for one in of_cell
    ]
    parts = ["# Other rules at test time", ABOUT, "## Means", pipes([["", "runs", *head], *means])]
    return "\n\n".join([*parts, "## Runs", pipes([["", *head], *runs])]) + "\n"


def _means(runs: list[Record], rules: list[str]) -> list[str]:
    """The test error, and that under each rule, over the runs that have it."""
    numbers = [[one["test_error"] for one in runs]]
    numbers += [[control(one, "rules")[rule] for one in runs if rule in control(one, "rules")] for rule in rules]
    return [f"{statistics.fmean(some):.2f}" if some else "-" for some in numbers]
