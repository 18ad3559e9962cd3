"""What stands between the two pairs of markers of results/README.md: a pure function of the records."""

from mbn.launch.table_status import together
from mbn.tables import claims
from mbn.tables.cells import Entry, Records, Table, heading, label
from mbn.tables.over_seeds import ASSUMED_RUNS, ASSUMED_SD, POWER
from mbn.tables.page import BESIDE, link, missing, pipes
from mbn.tables.places import Place, places

OUTCOMES = {claims.HOLDS: "Holds", claims.FAILS: "Does not hold", claims.OPEN: "Not decided yet"}


def overview_part(tables: dict[str, Table]) -> str:
    """In short what holds, what does not, and what is missing; and the picture of all claims."""
    picture = [
        "![Every claim: the paper's difference, and ours with its 95 % interval](figures/claims.png)",
        "A line is a claim at one place. What several tables compare is drawn once. An arrow: beyond the axis.",
    ]
    return "\n\n".join(["\n".join(_in_short(places(tables), tables)), *(picture if _has_runs(tables) else [])])


def evidence_part(tables: dict[str, Table], records: Records) -> str:
    """All tables with a picture of what has run, all claims with runs, all runs."""
    verdicts = _verdicts(tables)
    picture = "![How many seeds of each cell have run](figures/status.png)"
    return "\n\n".join(
        [
            "### Tables",
            *([picture] if _has_runs(tables) else []),
            pipes(_tables(tables)),
            "Measured: numbers that have runs, of those that the paper prints (of all, where it prints none).",
            "### Claims with runs",
            pipes(verdicts) if len(verdicts) > 1 else "None yet.",
            "Here: mean over the seeds that all cells of the claim have [95 % interval], in percent. Seeds to decide: "
            f"with so many, a difference of this size would be seen with {POWER:.0%} power, at the variance over these "
            f"seeds pooled with that of {ASSUMED_RUNS} published reruns of ResNet-56 at batch 128 (standard deviation "
            f"{ASSUMED_SD} %).",
            "### Runs",
            pipes(_runs(tables, records)) if records else "None yet.",
            "Errors in percent; hours from the first iteration to the last, evaluation included.",
        ]
    )


def _has_runs(tables: dict[str, Table]) -> bool:
    return any(table.has_runs for table in tables.values())


def _in_short(every: list[Place], tables: dict[str, Table]) -> list[str]:
    """A bullet for each outcome, one for what cannot be compared yet, and one for what is missing."""
    bullets = []
    for outcome, name in OUTCOMES.items():
        found = [place for place in every if place.has_run and place.verdict.outcome == outcome]
        bullets.append(f"- **{name}**:" + (" nothing." if not found else ""))
        bullets += [f"  - {_in_a_line(place)}" for place in found]
    idle = sum(not place.has_run for place in every)
    bullets.append(f"- **Not compared yet**: {idle} of {len(every)} comparisons.")
    return [*bullets, "- " + missing(together(table.status.whole for table in tables.values()))]


def _in_a_line(place: Place) -> str:
    """+0.93 [-0.46, +2.31], n = 3: MBN - BN, batch 8, ResNet-56 on CIFAR-10 (Table 4, paper -4.27); 7 seeds would."""
    paper = "" if place.paper is None else f", paper {place.paper:+.2f}"
    needed = f"; {place.verdict.needed} seeds would decide" if place.verdict.needed else ""
    return f"{place.verdict.number}: {place.label_alone} ({link(place.table, '')}{paper}){needed}"


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
    share = f"{sum(bool(e.values) for e in wanted)} / {len(wanted)}"
    return share + (f" ({quoted} only quoted there)" if quoted else "")


def _seeds(entries: list[Entry]) -> str:
    counts = sorted({len(e.values) for e in entries if e.values})
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _verdicts(tables: dict[str, Table]) -> list[list[str]]:
    """Every claim for which there are runs."""
    verdicts = [["", "claim", "", "here", "in the paper", "outcome", "seeds to decide"]]
    for table in tables.values():
        for claim in table.grid.claims:
            for v in claims.judge(claim, table.runs):
                if v.number.n:
                    paper = claims.printed(claim, v.place)
                    shown = "" if paper is None else f"{paper:+.2f}"
                    here = f"{claim.number} = {v.number}"
                    verdicts.append([link(table, ""), claim.text, v.place, here, shown, v.outcome, str(v.needed or "")])
    return verdicts


def _runs(tables: dict[str, Table], records: Records) -> list[list[str]]:
    """Every run, and the cells that it is in."""
    cells: dict[str, list[str]] = {}
    for name, table in tables.items():
        for cell in table.grid.cells:
            for one in table.runs(cell).values():
                cells.setdefault(one["name"], []).append(f"{heading(name)}: {label(cell)}")
    runs = [["run", "is in", *BESIDE.values(), "iterations", "hours", "device", "mode", "commit", "date"]]
    for name, one in sorted(records.items()):
        threads = f", {one['threads']} thread{'s' * (one['threads'] != 1)}" if one["device"].startswith("cpu") else ""
        runs.append(
            [
                f"[{name}](records/{name}.json)",
                "; ".join(cells.get(name, ["no table"])),
                *("-" if one[field] is None else f"{one[field]:.2f}" for field in BESIDE),
                f"{one['iterations']:,}",
                f"{one['seconds'] / 3600:.2f}",
                one["device"] + threads,
                one["mode"],
                (one["commit"] or "unknown")[:7] + " and changes" * bool(one["dirty"]),
                one["date"][:10],
            ]
        )
    return runs
