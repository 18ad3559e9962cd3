#!/usr/bin/env python
"""Draw the figures from the records: results/figures/*.png and *.svg.

python scripts/plots.py
python scripts/plots.py --scale 0.1 machine.results=/results
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mbn.system import signals

if __name__ == "__main__":
    signals.answer_while_loading()

from mbn.config.folders import results_to_read
from mbn.system.command_line import Parser, add_which_runs, entry_point
from mbn.tables.cells import file_name, read_records
from mbn.tables.export import say_not_made, update
from mbn.tables.over_seeds import SEEDS


@entry_point
def main(arguments: list[str]) -> None:
    parser = Parser(
        description="Draw results/figures from results/records: an overview of all claims and of what has run, Figures "
        "1 to 3 of the paper, error against batch size, and the statistics gap over time. Figures without any data are "
        "not written."
    )
    parser.add_argument("settings", nargs="*", metavar="machine.results=DIR", help="the folder that holds records/")
    add_which_runs(parser, SEEDS)
    options = parser.parse_intermixed_args(arguments)
    results = results_to_read(options.settings)
    from mbn.tables import figures  # matplotlib takes a while

    drawn = figures.draw(read_records(results), options.scale, options.seeds)
    pictures = figures.pictures(drawn, options.scale, options.seeds)
    update({results / "figures" / name: content for name, content in pictures.items()})
    for name, figure in drawn.items():
        if figure is None:
            picture = results / "figures" / f"{file_name(name, options.scale, options.seeds)}.png"
            say_not_made(name, "not drawn: no record has data for it", picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
