"""The test error of every seed, by network, batch size and method: a pure function of the records."""

from mbn.grid import Cell
from mbn.methods import METHODS
from mbn.tables.cells import Table, heading, network
from mbn.tables.measures import Measure

DIVERGED = "x"
OF_SEEDS = (
    "Test error in percent. The number after a method counts its forwards (MBN-2: with double forward); batch: MBN "
    f"with our own gradient, `norm.gradient=batch`; other settings are named. `{DIVERGED}`: diverged."
)


def by_seed(tables: dict[str, Table]) -> list[list[str]]:
    """A row for each network, batch size and seed that have a run, a column for each method, below a head.

    Rows without a number, because every run of them diverged, are the last.
    """
    places: dict[str, str] = {}  # names of rows by BN's run there: the same network, data and schedule
    columns: dict[str, None] = {}
    errors: dict[tuple[str, int], dict[str, str]] = {}
    for cell, table in _cells(tables):
        of, method = cell.baseline().name(0), _method(cell)
        for seed, one in table.runs(cell).items():
            places.setdefault(of, _place(cell, table, taken=list(places.values())))
            columns[method] = None
            error = Measure("test_error")(one)
            errors.setdefault((of, seed), {})[method] = DIVERGED if error is None else f"{error:.2f}"
    order, named = list(places), sorted(columns, key=_order)

    def key(row: tuple[str, int]) -> tuple[bool, int, int]:
        of, seed = row
        return set(errors[row].values()) == {DIVERGED}, order.index(of), seed

    rows = [
        [f"{places[of]}, seed {seed}", *(errors[of, seed].get(method, "-") for method in named)]
        for of, seed in sorted(errors, key=key)
    ]
    return [["", *named], *rows]


def _cells(tables: dict[str, Table]) -> list[tuple[Cell, Table]]:
    """Every cell that is run, of every table."""
    return [(cell, table) for table in tables.values() for cell in table.grid.cells if cell.overrides is not None]


def _place(cell: Cell, table: Table, taken: list[str]) -> str:
    """Example: ResNet-56 on CIFAR-10, batch 8; with the table where another schedule has that name."""
    name = f"{network(cell)}, batch {cell.config(0).batch_size}"
    return f"{name} ({heading(table.grid.name)})" if name in taken else name


def _method(cell: Cell) -> str:
    """Examples: BN-1; MBN-2 batch; MBN-2 memory=10."""
    assert cell.overrides is not None
    config = cell.config(0)
    method = METHODS[config.norm.name]
    name = f"{method.label}-{config.forwards}" if method.statistics else method.label
    settings = [o.removeprefix("norm.") for o in cell.overrides if o.startswith("norm.")]
    usual = ("gradient=paper", "memory=20")
    return " ".join([name, *(setting.removeprefix("gradient=") for setting in settings if setting not in usual)])


def _order(method: str) -> tuple[int, str]:
    """BN first, and so on as in METHODS."""
    labels = [one.label for one in METHODS.values()]
    return labels.index(method.partition(" ")[0].partition("-")[0]), method
