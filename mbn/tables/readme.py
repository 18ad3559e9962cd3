"""What stands between the markers of README.md, a pure function of the records; and how it gets there."""

import statistics

from mbn.system.errors import UserError
from mbn.tables import claims
from mbn.tables.cells import Entry, Table
from mbn.tables.claims import Verdict
from mbn.tables.over_seeds import p_text
from mbn.tables.page import link, pipes
from mbn.tables.places import Place, primary


def replace_part(page: str, part: str, mark: str = "results", name: str = "README.md") -> str:
    """The page with part between <!-- mark --> and <!-- /mark -->. Errors: UserError without these two."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise UserError(f"{name} must hold {start} and after it {end}, once each: put them back.")
    head, _, rest = page.partition(start)
    return f"{head}{start}\n{part}\n{end}{rest.partition(end)[2]}"


def readme_part(tables: dict[str, Table]) -> str:
    """The finding, a picture of the claims, Table 4's cells that have run, and where to read more."""
    table4 = tables["table4"]
    printed = [e for table in tables.values() for e in table.entries if e.paper is not None and e.cell.overrides]
    whole = next((place for place in primary(tables) if place.name == table4.grid.claims[0].primary), None)
    decided = whole is None or whole.verdict.outcome != claims.OPEN
    found = [finding(table4, decided), overall(whole), elsewhere(tables.get("table4-resnet20"))]
    parts = [" ".join(filter(None, found))]
    if any(table.has_runs for table in tables.values()):
        parts.append(
            "![Claims: the paper's difference, and ours with its 95 % interval](results/figures/claims-short.png)"
        )
        parts.append(
            "A number after a method counts its forward passes (MBN-2: with double forward). MBN-2 batch is MBN with "
            "our own gradient, [`norm.gradient=batch`](mbn/norm/README.md)."
        )
    measured = [[f"{e.cell.column}, batch {e.cell.row}", e.text(), e.paper or "-"] for e in table4.entries if e.has_run]
    if measured:
        head = [
            f"{link(table4, 'results/')}: test error in percent",
            "here: mean ± standard deviation (seeds)",
            "paper",
        ]
        parts.append(pipes([head, *measured]))
    diverge = sum(e.has_run and not e.values for e in printed)
    parts.append(
        f"{sum(bool(e.values) for e in printed)} of the {len(printed)} numbers of the paper's tables and Figure 1 that "
        f"are to be repeated are measured{f'; for {diverge} more, training diverges' if diverge else ''}. All claims, "
        "all runs and what is missing: [results/README.md](results/README.md)."
    )
    return "\n\n".join(parts)


def finding(table: Table, decided: bool = True) -> str:
    """What Table 4's runs say, in words: the outcome at each batch size that has run, with its numbers; of several
    batch sizes with the differences alone.

    decided: whether its claim, a primary one, is decided after the correction for several; else no place is.
    """
    claim = table.grid.claims[0]
    verdicts = claims.judge(claim, table.all_runs)
    compared = [v for v in verdicts if v.has_run]
    said: dict[str, list[str]] = {}
    for v in compared:
        said.setdefault(_outcome(v, decided), []).append(v.place)
    outcomes = [f"batch {_listed(places)} {outcome}" for outcome, places in said.items()]
    parts = [f"**At {'; at '.join(outcomes)}.**"] if said else []
    network = table.grid.title.rpartition(", ")[2]
    if len(compared) > 1:
        differences = (f"{v.number.without_n} at batch {v.place} ({_printed(v)})" for v in compared)
        parts.append(f"MBN - BN in test error, {network}: {', '.join(differences)}.")
    for v in compared if len(compared) == 1 else []:
        levels = _numbers(v, [table.entry(cell, claim.metric) for cell in claim.cells[v.place]])
        parts.append(f"Test error of {network}: {levels}")
    return " ".join([*parts, *_rest(table, [v.place for v in verdicts if v not in compared], bool(compared))])


def overall(place: Place | None) -> str:
    """What the primary claim says over several batch sizes: one sentence.

    Example: Over all batch sizes that have run it is +0.73 [+0.08, +1.38], p = 0.098 after Holm's correction:
    undecided.
    """
    if place is None or len(place.measured) < 2:
        return ""
    number = f"{place.verdict.number.without_n}, {p_text(place.holm)} after Holm's correction"
    return f"Over all batch sizes that have run it is {number}: {place.verdict.outcome}."


def elsewhere(table: Table | None) -> str:
    """What the same claim says on the network of another table, of which the paper prints nothing: one sentence.

    Example: On ResNet-20 MBN - BN is +1.32 [+0.72, +1.93] (batch 8 and 16 together).
    """
    if table is None:
        return ""
    claim = table.grid.claims[0]
    verdicts = claims.judge(claim, table.all_runs)
    together = claims.joint(claim, verdicts, several=1)
    if together is None:
        return ""
    network = table.grid.title.rpartition(", ")[2].partition(" on ")[0]
    known = [v.place for v in verdicts if v.number.precision is not None]
    places = f"batch {_listed(known)}{' together' * (len(known) > 1)}"
    return f"On {network} MBN - BN is {together.number.without_n} ({places})."


def _outcome(verdict: Verdict, decided: bool) -> str:
    """The end of a sentence that begins with the batch size."""
    match verdict.outcome if decided else claims.OPEN:
        case claims.HOLDS:
            return "MBN has a lower test error than BN, as in the paper"
        case claims.FAILS:
            return "MBN's advantage in the paper does not hold: BN has the lower test error"
    mean, paper = verdict.number.mean, verdict.paper
    if verdict.excluded and mean is not None and paper is not None and mean > paper:
        return "an advantage of MBN over BN as large as the paper's was not found"
    if mean:
        lower, higher = ("MBN", "BN") if mean < 0 else ("BN", "MBN")
        return f"{lower} has a lower test error than {higher} so far, but too few seeds have run to be sure"
    return "nothing is decided"


def _numbers(verdict: Verdict, entries: list[Entry]) -> str:
    """Example: MBN 16.31 % (4 seeds), BN 15.38 % (4 seeds), difference +0.93 [+0.20, +1.66]; the paper: 15.37 % and
    19.64 %, a difference of -4.27, outside the 95 % interval for one more run of each, p < 0.001.
    """
    here = ", ".join(f"{e.cell.column} {_level(e)}" for e in entries)
    if verdict.number.interval():
        here += f", difference {verdict.number.without_n}"
    paper = " and ".join(f"{e.paper} %" for e in entries)
    excluded = f", a difference of {verdict.paper:+.2f}{outside}" if (outside := _outside(verdict)) else ""
    return f"{here}; the paper: {paper}{excluded}."


def _printed(verdict: Verdict) -> str:
    """Example: the paper: -4.27, outside the 95 % interval for one more run of each, p < 0.001."""
    return f"the paper: {verdict.paper:+.2f}{_outside(verdict)}"


def _outside(verdict: Verdict) -> str:
    one_more = verdict.one_more
    if one_more is None or not one_more.excluded:
        return ""
    return f", outside the 95 % interval for one more run of each, {p_text(one_more.p)}"


def _level(entry: Entry) -> str:
    n = len(entry.values)
    return f"{statistics.fmean(entry.values.values()):.2f} % ({n} seed{'s' * (n > 1)})"


def _rest(table: Table, places: list[str], others: bool) -> list[str]:
    """A sentence on the batch sizes that cannot be compared yet. others: whether some can."""
    if not places:
        return []
    if any(table.runs(cell) for place in places for cell in table.grid.row(place)):
        return [f"Not compared there yet: batch {_listed(places)}."]
    return [
        "The paper's other batch sizes have not run." if others else f"No run of {link(table, '')} has a record yet."
    ]


def _listed(places: list[str]) -> str:
    """8, 16 and 32."""
    *first, last = places
    return f"{', '.join(first)} and {last}" if first else last
