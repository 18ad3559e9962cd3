"""The claims of all tables place by place, for the overview: what the paper prints, and what the runs say."""

from collections.abc import Sequence
from dataclasses import dataclass

from mbn.grid import METRICS, PRIMARY, Cell, Claim, Equal
from mbn.tables.cells import Table
from mbn.tables.claims import FAILS, HOLDS, OPEN, TOGETHER, Verdict, joint, judge
from mbn.tables.over_seeds import CONFIDENCE, Contrast, holm


@dataclass(frozen=True)
class Place:
    """One place of a claim, such as batch size 8 of Table 4's, or all its places together.

    For a primary claim `name` is set, `parts` are its places in all tables, and `holm` is p after Holm's correction.
    """

    table: Table
    claim: Claim
    verdict: Verdict
    name: str = ""
    holm: float = 1.0
    parts: tuple["Place", ...] = ()

    @property
    def places(self) -> int:
        return len(self.parts)

    @property
    def measured(self) -> tuple["Place", ...]:
        """The parts that have a number with an interval."""
        return tuple(part for part in self.parts if part.verdict.number.precision is not None)

    @property
    def papers(self) -> tuple[float, ...]:
        """The paper's numbers at the measured parts; at all parts, where none is measured."""
        return tuple(part.paper for part in self.measured or self.parts if part.paper is not None)

    @property
    def begun(self) -> bool:
        """Whether parts have runs, but none has an interval yet."""
        return not self.measured and any(part.has_run for part in self.parts)

    @property
    def has_run(self) -> bool:
        return self.verdict.has_run

    @property
    def paper(self) -> float | None:
        return self.verdict.paper

    @property
    def joint(self) -> bool:
        return self.verdict.place == TOGETHER

    @property
    def number(self) -> str:
        """Examples: MBN - BN; MBN - BN, training error; drop of MBN at 60 %."""
        return self.claim.number + self._details

    @property
    def _details(self) -> str:
        at = f" at {float(self.claim.at):.0%}".replace("%", " %") if self.claim.at else ""
        metric = METRICS[self.claim.metric]
        return at + (f", {metric}" if metric != METRICS["test_error"] and not at else "")

    @property
    def statement(self) -> str:
        """The number as it is claimed to be. Examples: MBN < BN; drop of MBN at 60 % > 0; 10 = 20 within 0.25."""
        first, minus, second = self.claim.number.partition(" - ")
        sign, margin = (">", "") if self.claim.bounds[0] == 0 else ("<", "")
        if isinstance(self.claim, Equal):
            sign, margin = "=", f" within {self.claim.bounds[1]:g}"
        return f"{first} {sign} {second}{margin}{self._details}" if minus else f"{self.number} {sign} 0"

    @property
    def where(self) -> str:
        """Examples: batch 8; ResNet-20; together; nothing for a claim that has one place."""
        if self.joint:
            return TOGETHER
        cell, *_ = self.claim.cells[self.verdict.place]
        is_batch = self.verdict.place == str(cell.config(0).batch_size)
        return f"batch {self.verdict.place}" if is_batch else self.verdict.place

    @property
    def label(self) -> str:
        return self.name or (f"{self.number}, {self.where}" if self.where else self.number)

    @property
    def compared(self) -> tuple[object, ...] | None:
        """What this place compares, and how; None for several places."""
        return None if self.joint else _compared(self.claim, [], self.verdict)

    def alone(self, text: str) -> str:
        """The text where no heading names the network: MBN - BN, batch 8, ResNet-56 on CIFAR-10."""
        _, comma, network = self.table.grid.title.rpartition(", ")
        where = self.where if not comma or not network.startswith(self.where) else ""
        return ", ".join(part for part in (text, where, network if comma else "") if part)


def places(tables: dict[str, Table]) -> list[Place]:
    """Every place of every claim, and after them the claim's joint number, if it has one and is not that of a primary
    claim, which is judged by another p.

    The same comparison of the same runs stands once, in the first table that has it; a second time where the paper
    prints its numbers in two tables.
    """
    found, seen = [], set()
    judged = [place.verdict.number for place in primary(tables)]
    for table in tables.values():
        for claim in table.grid.claims:
            verdicts = judge(claim, table.all_runs)
            for verdict in (*verdicts, joint(claim, verdicts)):
                if verdict is None or (verdict.place == TOGETHER and verdict.number in judged):
                    continue
                key = _compared(claim, verdicts, verdict)
                if key not in seen or verdict.paper is not None:
                    found.append(Place(table, claim, verdict))
                seen.add(key)
    return found


def _compared(claim: Claim, verdicts: Sequence[Verdict], verdict: Verdict) -> tuple[object, ...]:
    """The runs that a verdict compares, and how."""
    joined = [v.place for v in verdicts if v.number.precision is not None]
    runs = frozenset(_runs(claim.cells[place]) for place in (joined if verdict.place == TOGETHER else [verdict.place]))
    return type(claim), claim.metric, claim.at, claim.bounds, runs


def primary(tables: dict[str, Table]) -> list[Place]:
    """The primary claims of these tables, each over all its places, the same runs once; judged by Holm's p."""
    parts = {name: _parts(tables, name) for name in PRIMARY}
    joints = {name: joint(of[0][1], [v for *_, v in of], several=1) if of else None for name, of in parts.items()}
    corrected = holm([None if found is None else found.number.p() for found in joints.values()])
    result = []
    for (name, of), found, p in zip(parts.items(), joints.values(), corrected, strict=True):
        if of:
            table, claim, _ = of[0]
            number, paper = (found.number, found.paper) if found else (Contrast(), None)
            verdict = Verdict(TOGETHER, number, _outcome(number, p), paper)
            result.append(Place(table, claim, verdict, name, p, tuple(Place(*one) for one in of)))
    return result


def _parts(tables: dict[str, Table], name: str) -> list[tuple[Table, Claim, Verdict]]:
    """Every place of a primary claim, the same runs once: in the first table where the paper prints its numbers."""
    claims = [(table, claim) for table in tables.values() for claim in table.grid.claims if claim.primary == name]
    every = [(table, claim, v) for table, claim in claims for v in judge(claim, table.all_runs)]
    found: dict[tuple[str, ...], tuple[Table, Claim, Verdict]] = {}
    for table, claim, v in sorted(every, key=lambda one: one[2].paper is None):
        found.setdefault(_runs(claim.cells[v.place]), (table, claim, v))
    return list(found.values())


def _outcome(number: Contrast, p: float) -> str:
    """Of a primary claim: all say that a difference is below 0."""
    if number.mean is None or p >= 1 - CONFIDENCE:
        return OPEN
    return HOLDS if number.mean < 0 else FAILS


def in_short(every: list[Place]) -> list[Place]:
    """Those that have run, and all of the paper's Table 4."""
    return [place for place in every if place.has_run or place.table.grid.name == "table4"]


def _runs(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(cell.name(0) for cell in cells)
