"""The page of what runs measured beside the test error, by cell and against BN: a pure function of the records."""

import statistics

from mbn.records.record import diverged
from mbn.tables.measures import TEST_ERROR, Record, Taken, control, precise, train_error_in_evaluation
from mbn.tables.page import pipes
from mbn.tables.run_cells import RunCell


def _distance(of: str) -> Taken:
    return lambda record: (control(record, "population_gap") or {}).get(of)


def _layers_lost(record: Record) -> float | None:
    """At the end of training; None in records of runs that did not count them, or did not end."""
    if diverged(record):
        return None
    counts: list[float | None] = record["curves"].get("dead_layers") or [None]
    return counts[-1]


MEASURES = (train_error_in_evaluation, precise)
DISTANCES = (_distance("mean"), _distance("std"))
NONE = "-"
ABOUT = (
    "Measured with the final weights, errors in percent. A mean is over the n runs that have the number; the test "
    "error before it is over the same runs."
)
OF_CELLS = (
    "Training: the error on augmented training images in evaluation mode. Precise: the test error with statistics "
    "measured over an epoch of training images. Distance: of the statistics at test time from these "
    "(`controls.population_gap`), of means in standard deviations and of log standard deviations; the mean over "
    "layers, least to largest over runs. Layers lost (seed: how many; of the runs that counted them): those whose "
    "inputs no longer vary in training, because all ReLUs before them emit zero."
)
OF_BN = (
    "Differences to BN with one forward at the same place, over the n seeds of which both have the number; the "
    "difference of test errors before it is over the same seeds."
)


def controls_page(cells: list[RunCell]) -> str:
    """Nothing where no run of these cells has any."""
    rows = [[cell.label, *texts] for cell in cells if set((texts := _of(cell))[:-1]) != {NONE}]
    if not rows:
        return ""
    head = ["", "test", "training (n)", "test", "precise (n)"]
    more = ["distance of means", "of log standard deviations", "layers lost"]
    parts = ["# Controls", ABOUT, "## By cell", pipes([[*head, *more], *rows]), OF_CELLS]
    by_name = {cell.cell.name(0): cell for cell in cells}
    bn = [by_name.get(cell.bn.name(0), cell) for cell in cells]
    against = [[one.label, *_against(one, of)] for one, of in zip(cells, bn, strict=True) if of is not one]
    if against := [row for row in against if {*row[1:]} != {NONE}]:
        parts += ["## Against BN", pipes([head, *against]), OF_BN]
    return "\n\n".join(parts) + "\n"


def _of(cell: RunCell) -> list[str]:
    """The texts of a cell's row; the last is of layers lost."""
    runs = [one for _, one in sorted(cell.runs.items())]
    texts = []
    for measure in MEASURES:
        having = [one for one in runs if measure(one) is not None]
        texts += _two(_mean(having, TEST_ERROR), _mean(having, measure), len(having), "") if having else [NONE, NONE]
    for distance in DISTANCES:
        known = [number for number in map(distance, runs) if number is not None]
        ends = [f"{number:.4f}" for number in (min(known), max(known))] if known else [NONE]
        texts.append(" to ".join(dict.fromkeys(ends)))
    lost = [f"{seed}: {n:g}" for seed, one in sorted(cell.runs.items()) if (n := _layers_lost(one)) is not None]
    return [*texts, ", ".join(lost) or NONE]


def _against(cell: RunCell, bn: RunCell) -> list[str]:
    texts = []
    for measure in MEASURES:
        pairs = [(cell.runs[seed], bn.runs[seed]) for seed in cell.runs.keys() & bn.runs.keys()]
        both = [pair for pair in pairs if None not in map(measure, pair)]
        ours, theirs = [one for one, _ in both], [one for _, one in both]
        test, number = (_mean(ours, of) - _mean(theirs, of) if both else 0.0 for of in (TEST_ERROR, measure))
        texts += _two(test, number, len(both), "+") if both else [NONE, NONE]
    return texts


def _two(test: float, number: float, n: int, sign: str) -> list[str]:
    return [f"{test:{sign}.2f}", f"{number:{sign}.2f} ({n})"]


def _mean(runs: list[Record], measure: Taken) -> float:
    """Over runs that have the number."""
    return statistics.fmean(number for number in map(measure, runs) if number is not None)
