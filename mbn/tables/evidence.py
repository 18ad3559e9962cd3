"""What stands between the pairs of markers of results/README.md: a pure function of the records."""

from mbn.grid import Equal
from mbn.launch.table_status import union
from mbn.records.provenance import described
from mbn.records.record import diverged
from mbn.tables.by_seed import OF_SEEDS, by_seed
from mbn.tables.cells import POOLED_APART, Entry, Records, Table, cells_of_runs
from mbn.tables.export import pages_of_cells
from mbn.tables.measures import BESIDE, Record, Taken
from mbn.tables.over_seeds import EQUIVALENCE
from mbn.tables.page import LEVELS, OF_LEVELS, detectable_sentence, level_rows, link, missing, p_cell, pipes
from mbn.tables.places import Place, places, primary
from mbn.tables.rules import bn_and_mbn, measured_by_rules
from mbn.tables.run_cells import run_cells, unplanned


def evidence_parts(tables: dict[str, Table], records: Records) -> dict[str, str]:
    """The parts of all tables, by marker."""
    return {
        "overview": overview_part(tables),
        "bn-and-mbn": bn_and_mbn(run_cells(tables), tables["table4"]),
        "results": evidence_part(tables, records),
    }


def overview_part(tables: dict[str, Table]) -> str:
    """The claims that have runs, the picture of all claims, the paper's numbers against ours, and what is missing."""
    every = places(tables)
    parts = [pipes(_claims(primary(tables), every)), OF_CLAIMS]
    if power := detectable_sentence(list(tables.values())):
        parts.append(power)
    if _has_runs(tables):
        parts += [
            "![Claims: the paper's difference, and ours with its 95 % interval](figures/claims-short.png)",
            "Claims that have runs, and the rest of Table 4; [all claims](figures/claims.png). A line is a claim at "
            "one place, or at all places together (diamond). What several tables compare is drawn once. A cross: the "
            "paper's number is excluded, by the interval for one more run, which is wider than the bar. An arrow: "
            "beyond the axis.",
        ]
    if levels := level_rows(tables.values(), of_table=True):
        parts += ["The paper's numbers against ours, test errors in percent:", pipes([LEVELS, *levels]), OF_LEVELS]
    return "\n\n".join([*parts, _not_measured(every, tables)])


def _not_measured(every: list[Place], tables: dict[str, Table]) -> str:
    compared = {place.compared: place.verdict for place in every if not place.joint}  # what two tables print is one
    empty = [verdict.diverges for verdict in compared.values() if not verdict.has_run]
    diverge = f"; for {empty.count(True)} more, training diverges" if any(empty) else ""
    runs = union(table.status.whole for table in tables.values())
    return f"Not measured: {empty.count(False)} of {len(compared)} comparisons{diverge}. {missing(runs)}"


OF_CLAIMS = (
    "Differences of test errors in percentage points, unless another number is named. They are unpaired, and the "
    f"variance is pooled over all cells of our tables that have the same network and data set ({POOLED_APART}); a cell "
    "with one seed borrows it from the others. n: seeds of each cell. Together: the mean over all "
    "places that have runs, weighted by precision, and the paper's with the same weights (over several networks with "
    "Satterthwaite's degrees of freedom). The **primary claims** are judged by p after Holm's correction for the three "
    "of them (one that is not measured counts as p = 1); their intervals are not corrected. All others are "
    "exploratory, and their p is not corrected. That two cells are equal holds where the 90 % interval lies inside the "
    "margin, and does not hold where the 95 % interval lies outside. A number of the paper, which names no seeds, is "
    "taken for that of one more run of each cell, and excluded where it lies outside the 95 % interval for that."
)


def evidence_part(tables: dict[str, Table], records: Records) -> str:
    """The errors seed by seed, all tables with a picture of what has run, and all runs."""
    picture = "![How many seeds of each cell have run](figures/status.png)"
    cells = run_cells(tables)
    seeds, count = by_seed(cells), sum(len(runs) for _, runs in measured_by_rules(cells))
    more = {
        "rules": f"[Other rules at test time](tables/rules.md): test errors of {count} run{'s' * (count != 1)}.",
        "controls": "[Controls](tables/controls.md): what was measured beside the test error.",
        "robustness": "[Robustness](tables/robustness.md): the same differences under other assumptions.",
    }
    return "\n\n".join(
        [
            "### Seed by seed",
            *([pipes(seeds), OF_SEEDS] if len(seeds) > 1 else ["None yet."]),
            *(more[name] for name in pages_of_cells(tables)),
            "### Tables",
            *([picture] if _has_runs(tables) else []),
            pipes(_tables(tables)),
            "Measured: numbers of ours, of those that the paper prints (of all, where it prints none). Seeds and runs "
            "count those that diverged, too.",
            "### Runs",
            pipes(_runs(tables, records)) if records else "None yet.",
            "Errors in percent; hours from the first iteration to the last, evaluation included.",
        ]
    )


def _has_runs(tables: dict[str, Table]) -> bool:
    return any(table.has_runs for table in tables.values())


def _claims(of_paper: list[Place], every: list[Place]) -> list[list[str]]:
    """The primary claims, and after them the others that have runs: what the paper prints, and what the runs say.

    Where only one place of a primary claim has an interval, the claim's row shows it, and it has no row of its own.
    """
    rows = [["claim", "paper", "ours [95 %]", "n", "p", "verdict"]]
    stated = set()
    for place in of_paper:
        ends = sorted({f"{paper:+.2f}" for paper in place.papers}, key=float)
        span = f"{ends[0]} to {ends[-1]}" if len(ends) > 1 else "".join(ends)
        of = f", {len(place.measured)} of {place.places} places" if place.places > 1 else ""
        if len(place.measured) == 1:
            (one,) = place.measured
            stated.add(one.compared)
            of += f": {one.alone('')}, {link(one.table, '')}"
            of += "; the paper prints no number there" * (one.paper is None)
        p = f"{p_cell(place.holm)} (Holm)" if place.has_run else "-"
        rows.append([f"**{place.name}** (primary{of})", span or "-", *_ours(place), p, _verdict(place)])
    for place in every:
        if place.has_run and place.compared not in stated:
            name = f"{place.alone(place.statement)} ({link(place.table, '')})"
            paper = "-" if place.paper is None else f"{place.paper:+.2f}"
            p = "-" if isinstance(place.claim, Equal) else p_cell(place.verdict.number.p())
            rows.append([name, paper, *_ours(place), p, _verdict(place)])
    return rows


def _ours(place: Place) -> list[str]:
    """The number with its interval, and n. An equality has the interval by which it can hold."""
    number = place.verdict.number
    if number.mean is None:
        return ["-", "-"]
    if isinstance(place.claim, Equal) and (inside := number.brackets(EQUIVALENCE)):
        return [f"{number.mean:+.2f}, 90 % {inside}", number.n]
    return [number.without_n, number.n]


def _verdict(place: Place) -> str:
    """Example: does not hold; the paper's -4.27 is excluded (p < 0.001)."""
    if not place.has_run:
        return "no interval yet" if place.begun else "not measured"
    return "; ".join(filter(None, [place.verdict.said, place.verdict.against_paper]))


def _tables(tables: dict[str, Table]) -> list[list[str]]:
    rows = [["", "", "measured", "seeds", "runs", "time left"]]
    for table in tables.values():
        shown = [e for e in table.entries if e.paper is not None or not table.grid.paper]
        runs = table.status.whole
        done = f"{runs.done} / {len(runs.wanted)}"
        rows.append([link(table, ""), table.grid.title, _share(shown), _seeds(shown), done, runs.left()])
    return rows


def _share(entries: list[Entry]) -> str:
    wanted = [e for e in entries if e.cell.overrides is not None or e.paper is not None]
    quoted = sum(e.cell.overrides is None for e in wanted)
    diverge = sum(e.has_run and not e.values for e in wanted)
    notes = [f"{diverge} diverge{'s' * (diverge == 1)}" * bool(diverge), f"{quoted} only quoted there" * bool(quoted)]
    share = f"{sum(bool(e.values) for e in wanted)} / {len(wanted)}"
    return share + (f" ({', '.join(filter(None, notes))})" if any(notes) else "")


def _seeds(entries: list[Entry]) -> str:
    counts = sorted({len(e.values) + e.diverged for e in entries if e.has_run})
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _runs(tables: dict[str, Table], records: Records) -> list[list[str]]:
    """Every run, and the cells that it is in."""
    cells = cells_of_runs(tables)
    if tables:
        for run in unplanned(next(iter(tables.values())).all_runs):
            cells[run.record["name"]] = [f"no table: {', '.join(run.other)}"]
    shown = {
        name: measure for name, measure in BESIDE.items() if any(measure(one) is not None for one in records.values())
    }
    runs = [["run", "is in", *shown, "iterations", "hours", "device", "mode", "commit", "date"]]
    for name, one in sorted(records.items()):
        threads = f", {one['threads']} thread{'s' * (one['threads'] != 1)}" if one["device"].startswith("cpu") else ""
        runs.append(
            [
                f"[{name}](records/{name}.json)",
                "; ".join(cells.get(name, ["no table"])),
                *_errors(one, shown),
                (f"{one['diverged_at']:,} of " if diverged(one) else "") + f"{one['iterations']:,}",
                f"{one['seconds'] / 3600:.2f}",
                one["device"] + threads,
                one["mode"],
                described(one),
                one["date"][:10],
            ]
        )
    return runs


def _errors(one: Record, shown: dict[str, Taken]) -> list[str]:
    """The numbers of a run, or where it diverged."""
    if diverged(one):
        return [f"diverges at iteration {one['diverged_at']:,}", *["-"] * (len(shown) - 1)]
    return ["-" if number is None else f"{number:.2f}" for number in (measure(one) for measure in shown.values())]
