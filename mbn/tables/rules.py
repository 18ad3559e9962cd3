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
    "- test batch of N: training mode (dropout off) with test batches of N images: 8, 128, and as many as in training. "
    "BN normalises a batch by its own statistics, BRN and MBN by these and their averages or memory, which stay as "
    "training left them (held) or take in each test batch (rolling).\n"
    "- averages with momentum m: BN's moving averages, taken anew over the last 100 batches of training with m as the "
    "weight of the new batch (the tables' is 0.1).\n"
    "- newest entry as the batch: MBN's newest entry has the weight 1 of a current batch, the older ones lambda "
    "eta^(a-1).\n"
    "- `-`: the method has no such rule, or it was not measured."
)


def measured_by_rules(cells: list[RunCell]) -> list[tuple[RunCell, list[Record]]]:
    """The cells with runs that have such errors, and these runs, by seed."""
    found = [(cell, [one for _, one in sorted(cell.runs.items()) if control(one, "rules")]) for cell in cells]
    return [(cell, runs) for cell, runs in found if runs]


def rules_page(cells: list[RunCell]) -> str:
    """Means by cell, and every run; nothing where no run has such errors."""
    found = measured_by_rules(cells)
    if not found:
        return ""
    rules = list(dict.fromkeys(rule for _, runs in found for one in runs for rule in control(one, "rules")))
    head = ["as in the tables", *rules]
    means = [[cell.label, str(len(runs)), *_texts(runs, rules)] for cell, runs in found]
    each = [
        [f"[{cell.label}](../records/{one['name']}.json), seed {one['config']['seed']}", *_texts([one], rules)]
        for cell, runs in found
        for one in runs
    ]
    parts = ["# Other rules at test time", ABOUT, OF_RULES, "## Means", pipes([["", "runs", *head], *means])]
    return "\n\n".join([*parts, "## Runs", pipes([["", *head], *each])]) + "\n"


def _texts(runs: list[Record], rules: list[str]) -> list[str]:
    return [_mean(runs, rule) for rule in ("", *rules)]


def _mean(runs: list[Record], rule: str) -> str:
    """The mean test error under a rule ('' is that of the tables), with n where fewer runs have it."""
    numbers = [one["test_error"] if not rule else control(one, "rules").get(rule) for one in runs]
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    return f"{statistics.fmean(known):.2f}" + (f" (n = {len(known)})" if len(known) < len(runs) else "")


# The rows of the table of BN beside MBN: their rules, {batch} for the batch size of training; '' as in the tables.
PAIR = ("BN-1", "MBN-2")
AS_TRAINED, OF_128 = "test batch of {batch}", "test batch of 128"
ROWS = {
    "as in the tables": ("", ""),
    "training mode, test batches as in training, memory held": (AS_TRAINED, AS_TRAINED + ", held"),
    "the same, memory rolling": (AS_TRAINED, AS_TRAINED + ", rolling"),
    "training mode, test batches of 128, memory held": (OF_128, OF_128 + ", held"),
    "the same, rolling": (OF_128, OF_128 + ", rolling"),
    "evaluation mode, BN's momentum 0.9": ("averages with momentum 0.9", ""),
    "evaluation mode, BN's momentum 1": ("averages with momentum 1.0", ""),
}
OF_BN_AND_MBN = (
    "Means over equal seeds of BN / MBN, in brackets. BN has no memory: where it is held and where it rolls, its "
    "number is the same. MBN has no averages. What the rules are: [other rules](tables/rules.md)."
)


def bn_and_mbn(cells: list[RunCell], table4: Table) -> str:
    """A column for each place where runs of BN with one forward or of MBN with two and the paper's gradient have such
    errors, over the seeds that both have, and Table 4's numbers of the paper."""
    runs: dict[str, dict[str, list[Record]]] = {}
    bn: dict[str, Cell] = {}
    for cell, found in measured_by_rules(cells):
        if cell.method in PAIR:
            runs.setdefault(cell.place, {method: [] for method in PAIR})[cell.method] = found
            bn[cell.place] = cell.bn
    if not runs:
        return "None yet."
    for of in runs.values():
        if equal := set.intersection(*({_seed(one) for one in some} for some in of.values())):
            of |= {method: [one for one in some if _seed(one) in equal] for method, some in of.items()}
    rows = [["BN / MBN", *(f"{place} ({_seeds(of)})" for place, of in runs.items())]]
    for name, rules in ROWS.items():
        rows.append([name])
        for place, of in runs.items():
            named = [rule.format(batch=bn[place].config(0).batch_size) for rule in rules]
            rows[-1].append(_pair(_mean(of[method], rule) for method, rule in zip(PAIR, named, strict=True)))
    printed = [table4.grid.row(row) for row in table4.grid.rows]
    paper = {of_bn.name(0): _pair(cell.paper["test_error"] or "-" for cell in (of_bn, mbn)) for of_bn, mbn in printed}
    rows.append(["the paper", *(paper.get(bn[place].name(0), "-") for place in runs)])
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
