"""What stands between the markers of README.md and of results/README.md: a pure function of the records."""

from mbn.system.errors import UserError
from mbn.tables import claims
from mbn.tables.cells import BATCH_SIZES, Entry, Records, Table, heading, label
from mbn.tables.over_seeds import ASSUMED_RUNS, ASSUMED_SD, POWER
from mbn.tables.page import BESIDE, main_table, pipes

START, END = "<!-- results -->", "<!-- /results -->"


def replace_part(page: str, part: str, name: str = "README.md") -> str:
    """The page with part between its markers. Errors: UserError without the two markers."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise UserError(f"{name} must hold {START} and after it {END}, once each: put them back.")
    head, _, rest = page.partition(START)
    return f"{head}{START}\n{part}\n{END}{rest.partition(END)[2]}"


def readme_part(tables: dict[str, Table]) -> str:
    """Table 4 and its claim, and how much of each table is measured."""
    rows = [["", "", "numbers measured / in the paper", "seeds"]]
    others = []
    for table in tables.values():
        if table.grid.paper:
            printed = [e for e in table.entries if e.paper is not None]
            rows.append([_link(table, "results/"), table.grid.title, _share(printed), _seeds(printed)])
        else:
            others.append(f"{_link(table, 'results/')}: {_share(table.entries)}")
    table4 = tables["table4"]
    title, claim = table4.grid.title, table4.grid.claims[0]
    parts = [
        f"{_link(table4, 'results/')}, {title[0].lower()}{title[1:]}: test error in percent after 78,200 iterations, "
        "mean ± standard deviation (seeds), beside the paper's.",
        main_table(table4),
        claims.listed(claim, claims.judge(claim, table4.runs)),
        "Every run, what holds and what does not, and how many more runs would tell: "
        "[results/README.md](results/README.md). How much of each table is measured:",
        pipes(rows),
        f"Beyond the paper, measured / wanted: {'; '.join(others)}.",
    ]
    if any(len({e.cell.row for e in tables[name].entries if e.values}) > 1 for name in BATCH_SIZES):
        parts.append("![Test error against batch size](results/figures/batch-size.png)")
    return "\n\n".join(parts)


def _link(table: Table, to_results: str) -> str:
    """A link to the page of a table, which has one once it has runs."""
    name = heading(table.grid.name)
    return f"[{name}]({to_results}tables/{table.grid.name}.md)" if table.has_runs else name


def _share(entries: list[Entry]) -> str:
    wanted = [e for e in entries if e.cell.overrides is not None or e.paper is not None]
    quoted = sum(e.cell.overrides is None for e in wanted)
    share = f"{sum(bool(e.values) for e in wanted)} / {len(wanted)}"
    return share + (f" ({quoted} only quoted there)" if quoted else "")


def _seeds(entries: list[Entry]) -> str:
    counts = sorted({len(e.values) for e in entries if e.values})
    return "-" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def evidence_part(tables: dict[str, Table], records: Records) -> str:
    """Every claim for which there are runs, and every run."""
    verdicts = [["", "claim", "", "here", "in the paper", "outcome", "seeds to decide"]]
    for table in tables.values():
        for claim in table.grid.claims:
            for v in claims.judge(claim, table.runs):
                if v.number.n:
                    paper = claims.printed(claim, v.place)
                    shown = "" if paper is None else f"{paper:+.2f}"
                    here = f"{claim.number} = {v.number}"
                    verdicts.append(
                        [_link(table, ""), claim.text, v.place, here, shown, v.outcome, str(v.needed or "")]
                    )
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
    return "\n\n".join(
        [
            "### Claims that runs say something of",
            pipes(verdicts) if len(verdicts) > 1 else "None yet.",
            "Here: mean over the seeds that all cells of the claim have [95 % interval], in percent. Seeds to decide: "
            f"with so many, a difference of this size would be seen with {POWER:.0%} power, at the variance over these "
            f"seeds pooled with that of {ASSUMED_RUNS} published reruns of ResNet-56 at batch 128 (standard deviation "
            f"{ASSUMED_SD} %).",
            "### Runs",
            pipes(runs) if records else "None yet.",
            "Errors in percent; hours from the first iteration to the last, evaluation included.",
        ]
    )
