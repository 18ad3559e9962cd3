#!/usr/bin/env python
"""Write the tables from the records: results/tables/*.md, *.tex and cells.csv, and parts of the two READMEs.

A table of which nothing has run is not written.

python scripts/tables.py
python scripts/tables.py table4 table6 --seeds 3
python scripts/tables.py --scale 0.1 machine.results=/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

from mbn import grid
from mbn.config import REPOSITORY
from mbn.config.folders import results_to_read
from mbn.system.command_line import Parser, add_which_runs, entry_point
from mbn.tables.cells import file_name, read_records, read_tables
from mbn.tables.evidence import evidence_parts
from mbn.tables.export import contents, say_not_made, update
from mbn.tables.over_seeds import SEEDS
from mbn.tables.readme import readme_part, replace_part

RESULTS = REPOSITORY / "results"
README = REPOSITORY / "README.md"
EVIDENCE = RESULTS / "README.md"


@entry_point
def main(arguments: list[str]) -> None:
    parser = Parser(
        description="Write results/tables from results/records: markdown, LaTeX (booktabs) and one CSV of all cells; "
        "with all tables and the default results also what is between the markers of README.md and results/README.md."
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="table | machine.results=DIR",
        help="table1, table4-methods, ...; all by default; the folder that holds records/",
    )
    add_which_runs(parser, SEEDS)
    options = parser.parse_intermixed_args(arguments)
    results = results_to_read([item for item in options.items if "=" in item])
    names = [item for item in options.items if "=" not in item]
    records = read_records(results)
    every = not names or "all" in names
    for name in names if every else ():
        if name != "all":
            grid.read(name)  # an unknown one is refused beside `all`, too
    chosen = read_tables(records, None if every else names, options.seeds, options.scale)
    content = contents(chosen, every)
    files = {results / "tables" / name: text.encode() for name, text in content.items()}
    if every and next(iter(chosen.values())).usual and results.resolve() == RESULTS.resolve():
        evidence = EVIDENCE.read_text(encoding="utf-8")
        for mark, part in evidence_parts(chosen, records).items():
            evidence = replace_part(evidence, part, mark, str(EVIDENCE))
        files[EVIDENCE] = evidence.encode()
        files[README] = replace_part(README.read_text(encoding="utf-8"), readme_part(chosen), name=str(README)).encode()
    update(files)
    for name, table in chosen.items():
        if not table.has_runs:
            page = results / "tables" / f"{file_name(name, table.scale, table.seeds)}.md"
            say_not_made(name, "not written: none of its runs has a record", page)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
