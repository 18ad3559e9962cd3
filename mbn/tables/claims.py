"""What the runs say about the claims of a table: each holds, does not hold, or is undecided."""

from collections.abc import Sequence
from dataclasses import dataclass

from mbn.grid import Claim, Drop, Equal, Gain, Rise
from mbn.tables.cells import AllRuns
from mbn.tables.measures import Measure
from mbn.tables.over_seeds import EQUIVALENCE, Contrast, OneMore, contrast, p_text, weighted_mean

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
# The place of a claim's number over all places that have runs.
TOGETHER = "together"
DIVERGES = "not compared, because training diverges"


@dataclass(frozen=True)
class Verdict:
    """What the numbers say at one place of a claim.

    paper: the paper's own number, where it prints one. diverges: whether every run so far of one of its cells diverged.
    """

    place: str
    number: Contrast
    outcome: str
    paper: float | None
    diverges: bool = False

    @property
    def has_run(self) -> bool:
        return self.number.mean is not None

    @property
    def said(self) -> str:
        """The outcome, as pages print it."""
        without = self.has_run and self.number.interval() is None
        return f"{self.outcome} (no interval: too few runs)" if without else self.outcome

    @property
    def one_more(self) -> OneMore | None:
        """The paper's number, taken for that of one more run of each cell; None where it or ours is not known."""
        return self.number.one_more(self.paper)

    @property
    def excluded(self) -> bool:
        """Whether one more run of each cell would hardly give the paper's number."""
        return self.one_more is not None and self.one_more.excluded

    @property
    def against_paper(self) -> str:
        """Example: the paper's -4.27 is excluded (p < 0.001)."""
        if (one_more := self.one_more) is None:
            return ""
        return f"the paper's {self.paper:+.2f} is {'' if one_more.excluded else 'not '}excluded ({p_text(one_more.p)})"


def judge(claim: Claim, all_runs: AllRuns) -> list[Verdict]:
    """Decide a claim at each place. A place without a run of each of its cells has a number without a mean."""
    verdicts, measure = [], measured(claim)
    for place, cells in claim.cells.items():
        samples = [all_runs.sample(cell, measure) for cell in cells]
        known = [sample for sample in samples if sample is not None]
        number = contrast(known, _weights(claim, len(cells))) if len(known) == len(cells) else Contrast()
        diverges = any(map(all_runs.diverge, cells))
        verdicts.append(Verdict(place, number, outcome(claim, number), printed(claim, place), diverges))
    return verdicts


def joint(claim: Claim, verdicts: Sequence[Verdict], several: int = 2) -> Verdict | None:
    """The verdicts of a claim together: their numbers' mean, weighted by precision. The paper's number has the same
    weights, and is None where one place lacks it.

    None where fewer than `several` places have an interval, and for an equality, where differences could cancel out.
    """
    known = [verdict for verdict in verdicts if verdict.number.precision is not None]
    if len(known) < several or isinstance(claim, Equal):
        return None
    number, weights = weighted_mean([verdict.number for verdict in known])
    papers = [verdict.paper for verdict in known]
    terms = [weight * paper for weight, paper in zip(weights, papers, strict=True) if paper is not None]
    paper = sum(terms) if len(terms) == len(known) else None
    return Verdict(TOGETHER, number, outcome(claim, number), paper)


def measured(claim: Claim) -> Measure:
    """The number of a record that a claim compares."""
    form = {Drop: "drop", Rise: "rise"}.get(type(claim), "")
    return Measure(claim.metric, form, claim.at)


def _weights(claim: Claim, cells: int) -> tuple[int, ...]:
    """How a claim's number is made from the means of its cells."""
    if isinstance(claim, Gain):  # (X at the start - X at the end) - (Y at the start - Y at the end)
        return 1, -1, -1, 1
    return (1, -1)[:cells]


def outcome(claim: Claim, number: Contrast) -> str:
    """By the interval: the claim holds where all of it is within the bounds, and not where all of it is outside.

    That is the 95 % interval; an equality holds by two one-sided tests at 5 %, whose interval is that of 90 %.
    """
    inside = number.interval(EQUIVALENCE) if isinstance(claim, Equal) else number.interval()
    whole, (least, most) = number.interval(), claim.bounds
    if inside is None or whole is None:
        return OPEN
    if least < inside[0] and inside[1] < most:
        return HOLDS
    return FAILS if whole[0] > most or whole[1] < least else OPEN


def printed(claim: Claim, place: str) -> float | None:
    """A claim's number from what the paper prints, at a place; None where it prints too little, and for curves."""
    if claim.paper is not None:
        return claim.paper
    texts = [cell.paper.get(claim.metric) for cell in claim.cells[place]]
    if isinstance(claim, Drop | Rise) or None in texts:
        return None
    weights = _weights(claim, len(texts))
    return sum(weight * float(text) for weight, text in zip(weights, texts, strict=True) if text is not None)


def listed(claim: Claim, verdicts: Sequence[Verdict]) -> str:
    """A claim and its verdicts as a list in markdown; places without a number share a line.

    Example of a line: - 8: MBN - BN = -0.48 [-0.71, -0.25], n = 5+5, p = 0.004: holds; the paper's -4.27 is excluded
    (p < 0.001)
    """
    kind = f"part of the primary claim {claim.primary}" if claim.primary else "exploratory"
    text = f"- {claim.text[0].upper()}{claim.text[1:]} ({kind})"
    empty: dict[str, list[str]] = {}
    for one in (verdict for verdict in verdicts if not verdict.has_run):
        empty.setdefault(DIVERGES if one.diverges else "not measured yet", []).append(one.place)
    for why, of in empty.items():
        if len(of) == len(verdicts):
            return f"{text}: {why}"
    lines = [text]
    for v in filter(None, (*verdicts, joint(claim, verdicts))):
        if v.has_run:
            said = "; ".join(filter(None, [v.said, v.against_paper]))
            lines.append(f"  - {v.place + ': ' * bool(v.place)}{claim.number} = {v.number}{_tested(claim, v)}: {said}")
    return "\n".join([*lines, *(f"  - {'; '.join(of)}: {why}" for why, of in empty.items())])


def _tested(claim: Claim, verdict: Verdict) -> str:
    """What an outcome rests on: p against zero, or the margin and the 90 % interval."""
    if isinstance(claim, Equal):
        inside = verdict.number.brackets(EQUIVALENCE)
        interval = f", 90 % {inside}" if inside else ""
        return f"{interval}, margin {claim.bounds[1]:g}"
    p = verdict.number.p()
    return "" if p is None else f", {p_text(p)}{' (uncorrected)' * bool(claim.primary)}"
