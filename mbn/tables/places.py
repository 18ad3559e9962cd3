"""The claims of all tables place by place, for the overview: what the paper prints, and what the runs say."""

from dataclasses import dataclass

from mbn.grid import METRICS, Cell, Claim
from mbn.tables.cells import Table
from mbn.tables.claims import Verdict, judge, printed


@dataclass(frozen=True)
class Place:
    """One place of a claim, such as batch size 8 of Table 4's. paper: the paper's own number, where it prints one."""

    table: Table
    claim: Claim
    verdict: Verdict
    paper: float | None

    @property
    def has_run(self) -> bool:
        return bool(self.verdict.number.n)

    @property
    def number(self) -> str:
        """Examples: MBN - BN; MBN - BN, training error; drop of MBN at 60 %."""
        at = f" at {float(self.claim.at):.0%}".replace("%", " %") if self.claim.at else ""
        metric = METRICS[self.claim.metric]
        return self.claim.number + at + (f", {metric}" if metric != METRICS["test_error"] and not at else "")

    @property
    def where(self) -> str:
        """Examples: batch 8; ResNet-20; nothing for a claim that has one place."""
        cell, *_ = self.claim.cells[self.verdict.place]
        is_batch = self.verdict.place == str(cell.config(0).batch_size)
        return f"batch {self.verdict.place}" if is_batch else self.verdict.place

    @property
    def label(self) -> str:
        return f"{self.number}, {self.where}" if self.where else self.number

    @property
    def label_alone(self) -> str:
        """Where no heading names the network: MBN - BN, batch 8, ResNet-56 on CIFAR-10."""
        _, comma, network = self.table.grid.title.rpartition(", ")
        where = self.where if not comma or not network.startswith(self.where) else ""
        return ", ".join(part for part in (self.number, where, network if comma else "") if part)


def places(tables: dict[str, Table]) -> list[Place]:
    """Every place of every claim. The same comparison of the same runs stands once, in the first table that has it.

    It stands a second time where the paper prints its numbers in two tables.
    """
    found, seen = [], set()
    for table in tables.values():
        for claim in table.grid.claims:
            for verdict in judge(claim, table.runs):
                place = Place(table, claim, verdict, printed(claim, verdict.place))
                runs = tuple(_run(cell) for cell in claim.cells[verdict.place])
                key = (type(claim), claim.metric, claim.at, claim.bounds, runs)
                if key not in seen or place.paper is not None:
                    found.append(place)
                seen.add(key)
    return found


def in_short(every: list[Place]) -> list[Place]:
    """Those that have run, and all of the paper's Table 4."""
    return [place for place in every if place.has_run or place.table.grid.name == "table4"]


def _run(cell: Cell) -> str:
    return cell.name(0)
