"""The test error of every seed, by network, batch size and method: a pure function of the records."""

from mbn.methods import METHODS
from mbn.tables.measures import TEST_ERROR
from mbn.tables.run_cells import RunCell

DIVERGED = "x"
OF_SEEDS = (
    "Test error in percent. The number after a method counts its forwards (MBN-2: with double forward); batch: MBN "
    "with our own gradient, `norm.gradient=batch`; other settings are named. Rows with a setting are not in any "
    "table, if it is not in brackets. "
    f"`{DIVERGED}`: diverged."
)


def by_seed(cells: list[RunCell]) -> list[list[str]]:
    """A row for each network, batch size and seed that have a run, a column for each method, below a head.

    Rows without a number, because every run of them diverged, are the last.
    """
    columns: dict[str, None] = {}
    errors: dict[tuple[str, int], dict[str, str]] = {}
    for cell in cells:
        for seed, one in cell.runs.items():
            columns[cell.method] = None
            error = TEST_ERROR(one)
            errors.setdefault((cell.place, seed), {})[cell.method] = DIVERGED if error is None else f"{error:.2f}"
    order, named = list(dict.fromkeys(cell.place for cell in cells)), sorted(columns, key=_order)

    def key(row: tuple[str, int]) -> tuple[bool, int, int]:
        place, seed = row
        return set(errors[row].values()) == {DIVERGED}, order.index(place), seed

    rows = [
        [f"{place}, seed {seed}", *(errors[place, seed].get(method, "-") for method in named)]
        for place, seed in sorted(errors, key=key)
    ]
    return [["", *named], *rows]


def _order(method: str) -> tuple[int, str]:
    """BN first, and so on as in METHODS."""
    labels = [one.label for one in METHODS.values()]
    own = max((label for label in labels if method.startswith(label)), key=len)
    return labels.index(own), method
