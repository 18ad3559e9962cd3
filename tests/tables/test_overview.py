"""The pictures of all claims and of what has run: each number is where it should be, and all text can be read."""

import itertools

import pytest
import toy_records
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from mbn import grid
from mbn.records.record import config_for_record as record_config
from mbn.tables import claims
from mbn.tables.cells import read_records, read_tables
from mbn.tables.evidence import overview_part
from mbn.tables.figures.forest import LIMIT, forest
from mbn.tables.figures.status_grid import DONE, status_grid
from mbn.tables.figures.style import GREY
from mbn.tables.places import in_short, places, primary


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Batch 8: MBN is lower in three seeds of ResNet-56 and far below GN in one. Batch 16: one seed of each."""
    folder = tmp_path_factory.mktemp("results")
    table4, methods = grid.read("table4"), grid.read("table4-methods")
    for seed, (bn, mbn) in enumerate([(8.0, 7.0), (8.1, 7.2), (8.2, 7.4)]):
        toy_records.write(folder, table4.cell("8", "BN"), seed, bn)
        toy_records.write(folder, table4.cell("8", "MBN"), seed, mbn)
    toy_records.write(folder, methods.cell("8", "GN (untuned)"), 0, 27.5)
    toy_records.write(folder, table4.cell("16", "BN"), 0, 6.0)
    toy_records.write(folder, table4.cell("16", "MBN"), 0, 6.5)
    return read_tables(read_records(folder))


@pytest.fixture(scope="module")
def every(tables):
    return places(tables)


def found(every, table, label):
    return [place for place in every if (place.table.grid.name, place.label) == (table, label)]


def test_the_same_runs_are_compared_once_except_where_the_paper_prints_them_twice(every):
    assert len(found(every, "table4", "MBN - BN, batch 8")) == 1
    assert not found(every, "table4-methods", "MBN-2 - BN-1, batch 8")
    assert len(found(every, "table4-methods", "MBN-2 - BRN-2, batch 8")) == 1
    for table, label in (("table1", "MBN - BN, ResNet-56"), ("table4", "MBN - BN, batch 128")):
        assert found(every, table, label)[0].paper == pytest.approx(6.23 - 6.97)
    assert not found(every, "table4-epochs", "MBN - BN, batch 128")
    # The same runs, compared in other ways, are other claims.
    assert found(every, "figure2", "MBN - BN, training error, ResNet-56")
    assert {label for label in (p.number for p in every) if label.startswith("rise")} == {
        *("rise of MBN at 40 %", "rise of MBN at 60 %"),
    }


def test_a_label_alone_names_the_network_once(every):
    alone = {place.alone(place.number) for place in every}
    assert {
        "MBN - BN, batch 8, ResNet-56 on CIFAR-10",
        "MBN-2 - GN (untuned), batch 8, ResNet-20 on CIFAR-10",
        "MBN-2 batch - MBN-2 paper, ResNet-20, batch 128",
        "λ = {0.1, 0.5, 0.9} - λ = {0.1}, ResNet-56 on CIFAR-10",
        "gain of MBN - gain of BN, ResNet-56 on CIFAR-10",
    } < alone


def line_of(panel, label):
    """The height of a line of the picture, below the primary claims."""
    (y,) = {text.get_position()[1] for text in panel.texts if text.get_text() == label}
    return y


def at(panel, y):
    """The marks of a line as (x, marker, filled), and its bars as (low, high)."""
    marks, bars = [], []
    for line in panel.get_lines():
        x, height = line.get_data()
        if list(height) == [y] * len(x) and line.get_marker() != "None":
            marks.append((round(float(x[0]), 2), line.get_marker(), line.get_markerfacecolor() != "white"))
        elif list(height) == [y] * len(x) and line.get_transform() == panel.transData:
            bars.append(tuple(round(float(end), 2) for end in x))
    return marks, bars


def texts_at(panel, y):
    return [text.get_text() for text in panel.texts if text.get_position()[1] == y]


def test_a_line_has_the_papers_mark_and_our_mean_with_its_interval(every):
    (panel,) = forest(every).axes
    both = line_of(panel, "MBN − BN, batch 8")
    verdict = found(every, "table4", "MBN - BN, batch 8")[0].verdict
    interval = tuple(round(end, 2) for end in verdict.number.interval())
    assert at(panel, line_of(panel, "MBN − BN, batch 32")) == ([(-1.08, "s", False)], [])
    assert verdict.excluded
    assert at(panel, both) == ([(-4.27, "X", False), (-0.9, "o", True)], [interval])
    assert texts_at(panel, both) == ["MBN − BN, batch 8", "−4.27", "−0.90 [−1.26, −0.54], n = 3+3"]
    # One seed, with the spread of the others: undecided is hollow.
    one = line_of(panel, "MBN − BN, batch 16")
    assert at(panel, one) == ([(-1.39, "X", False), (0.5, "o", False)], [(-0.12, 1.12)])
    assert texts_at(panel, line_of(panel, "MBN − BN, batch 64")) == ["MBN − BN, batch 64", "not run", "−0.81"]


def test_joint_numbers_are_diamonds_and_the_primary_claims_stand_first(every, tables):
    (panel,) = forest(every, primary(tables)).axes
    together = [(round(primary(tables)[0].verdict.number.mean, 2), "D", True)]
    assert not found(every, "table4", "MBN - BN, together")  # the same number, which the corrected p decides
    heading, first, second, third = (texts_at(panel, y) for y in range(4))
    assert heading == ["Primary claims, each at all its places that have run"]
    assert (first[0], first[2]) == ("MBN < BN", "−0.55 [−0.86, −0.24], n = 4+4")
    assert at(panel, 1)[0][1:] == together
    assert (second, third) == (["two forwards < one (MBN)", "not run"], ["MBN < BRN", "not run"])


def test_the_primary_claims_are_corrected_together_and_count_each_run_once(tables):
    mbn, forwards, brn = primary(tables)
    p = mbn.verdict.number.p()
    assert ([one.where for one in mbn.measured], mbn.places) == (["batch 8", "batch 16"], 5)
    assert mbn.verdict.outcome == claims.HOLDS
    assert mbn.holm == pytest.approx(3 * p)  # of three claims, of which two are not measured
    assert mbn.papers == pytest.approx((-4.27, -1.39))
    # Figure 1's place is that of batch 128 of table4-methods; Table 1's ResNets are table4-methods's and -resnet20's.
    assert (forwards.places, forwards.papers) == (10, pytest.approx((-0.30,)))
    assert (brn.places, sorted(brn.papers)) == (4 + 4 + 4, pytest.approx([-0.25, -0.23, -0.21]))
    assert (forwards.holm, forwards.has_run, forwards.verdict.outcome) == (1, False, claims.OPEN)


def test_a_number_beyond_the_axis_is_an_arrow_with_its_number(every):
    (panel,) = forest(every).axes
    gn = line_of(panel, "MBN-2 − GN (untuned), batch 8")
    # One run of GN, which pools its variance with no other method, has no interval.
    assert at(panel, gn) == ([(-LIMIT, "<", False)], [])
    assert texts_at(panel, gn) == ["MBN-2 − GN (untuned), batch 8", "−20.30", "−20.30, n = 3+1"]


def test_beside_an_arrow_there_is_no_number_where_the_papers_mark_may_be(tmp_path):
    table4 = grid.read("table4")
    for column, error in (("BN", 14.0), ("MBN", 8.0)):
        toy_records.write(tmp_path, table4.cell("8", column), 0, error)
    (panel,) = forest(in_short(places(read_tables(read_records(tmp_path))))).axes
    y = line_of(panel, "MBN − BN, batch 8")
    assert at(panel, y)[0] == [(-4.27, "s", False), (-LIMIT, "<", False)]
    assert texts_at(panel, y) == ["MBN − BN, batch 8", "−4.27", "−6.00, n = 1+1"]


def test_an_interval_beyond_the_axis_ends_in_an_arrow(tmp_path):
    table4 = grid.read("table4")
    for seed, mbn in enumerate((6.0, 10.0)):
        toy_records.write(tmp_path, table4.cell("8", "BN"), seed, 8.0)
        toy_records.write(tmp_path, table4.cell("8", "MBN"), seed, mbn)
    (panel,) = forest(in_short(places(read_tables(read_records(tmp_path))))).axes
    marks, bars = at(panel, line_of(panel, "MBN − BN, batch 8"))
    assert bars == [(-LIMIT, LIMIT)]
    assert {marker for _, marker, _ in marks} == {"s", "o", "<", ">"}


def test_where_the_claim_holds_is_shaded(every):
    (panel,) = forest(every).axes
    shaded = {patch.get_y() + 0.5: (patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches}
    assert shaded[line_of(panel, "MBN − BN, batch 8")] == (-LIMIT, 0)
    assert shaded[line_of(panel, "gain of MBN − gain of BN")] == (0, LIMIT)
    assert shaded[line_of(panel, "40 − 20, ResNet-20")] == (-0.25, 0.25)


def test_places_without_anything_to_show_share_a_pale_line(every):
    (panel,) = forest(every).axes
    rest = [text.get_text() for text in panel.texts if text.get_text().endswith(": not run")]
    assert "batch 16, 32, 64, 128: not run" in rest
    assert "ResNet-20, ResNet-56, VGG: not run" in rest
    assert "3 places: not run" in rest


def test_where_training_diverges_claims_say_so(tmp_path):
    table1, nin = grid.read("table1"), grid.read("table1-nin")
    cells = [table1.cell("NormProp", "VGG"), *(nin.cell("NormProp", name) for name in ("CIFAR-10", "CIFAR-100"))]
    for cell in cells:
        toy_records.write_diverged(tmp_path, cell, 0, at=5)
    tables = read_tables(read_records(tmp_path), ["table1", "table1-nin"])
    assert "\n\nNot measured: 12 of 15 comparisons; for 3 more, training diverges. Missing: " in overview_part(tables)
    (panel,) = forest(places(tables)).axes
    assert texts_at(panel, line_of(panel, "BN − NormProp, VGG")) == ["BN − NormProp, VGG", "diverges", "−4.43"]
    assert texts_at(panel, line_of(panel, "NormProp − BN")) == ["NormProp − BN", "CIFAR-10, CIFAR-100: diverges"]


def test_the_short_picture_has_what_has_run_and_table_4(every):
    assert {(place.table.grid.name, place.label) for place in in_short(every)} == {
        *(("table4", f"MBN - BN, {place}") for place in (f"batch {2**i}" for i in range(3, 8))),
        ("table4-methods", "MBN-2 - GN (untuned), batch 8"),
    }


def test_the_status_grid_shows_the_seeds_of_each_cell(tables):
    (panel,) = status_grid([tables[name] for name in ("table1", "table4", "table4-methods")]).axes
    texts = [text.get_text() for text in panel.texts]
    # Table 4's four cells stand in Table 4, methods too, which has GN besides.
    assert sorted(text for text in texts if text in ("1", "2", "3", "4", "5")) == ["1"] * 5 + ["3"] * 4
    assert texts.count("–") == 2  # NormProp is not run on the residual networks
    assert len(panel.patches) == 14 + 10 + 35
    assert any(text.startswith("8 of 50 runs; left: ") for text in texts)
    assert texts[0].startswith("All tables, each run once: 9 of 230 runs; left: ")


def test_the_status_grid_is_grey_where_all_runs_of_a_cell_diverged(tmp_path):
    g = grid.read("table1")
    gone, mixed = g.cell("NormProp", "VGG"), g.cell("MBN", "VGG")
    for cell, seed in ((gone, 0), (gone, 1), (mixed, 0)):
        toy_records.write_diverged(tmp_path, cell, seed, at=5)
    toy_records.write(tmp_path, mixed, 1, 7.0)
    (panel,) = status_grid([read_tables(read_records(tmp_path))["table1"]]).axes
    faces = [face for patch in panel.patches if (face := patch.get_facecolor()[:3]) != (1, 1, 1)]
    grey, blue = ([1 - 0.4 * (1 - part) for part in to_rgb(colour)] for colour in (GREY, DONE))
    assert faces == [pytest.approx(grey), pytest.approx(blue)]


def full():
    """Tables in which every cell has three of five seeds: with small and large differences, some beyond the axis."""
    tables = read_tables({})
    for table in tables.values():
        for i, cell in enumerate(cell for cell in table.grid.cells if cell.overrides is not None):
            for seed in range(3):
                error = 10 + 7.7 * (i % 3) + seed * (i % 4) / 3
                record = {"test_error": error, "train_error": error, "curves": {}, "images": 600}
                config = record_config(cell.config(seed))
                table.records[cell.name(seed)] = record | {"config": config, "seconds": 9e5, "iterations": 9}
    return tables


@pytest.mark.parametrize("all_cells", [False, True])
@pytest.mark.parametrize("name", ["claims", "claims-short", "status"])
def test_all_text_is_inside_the_picture_and_none_lies_on_another(name, all_cells, tables):
    tables = full() if all_cells else tables
    made = {
        "claims": lambda: forest(places(tables), primary(tables)),
        "claims-short": lambda: forest(in_short(places(tables)), primary(tables)),
        "status": lambda: status_grid([*tables.values()]),
    }
    figure = made[name]()
    renderer = FigureCanvasAgg(figure).get_renderer()
    (panel,) = figure.axes
    boxes = {text: text.get_window_extent(renderer) for text in panel.texts}
    boxes |= {line: line.get_window_extent(renderer) for line in panel.get_lines() if line.get_marker() in "DX"}
    for item, box in boxes.items():
        assert figure.bbox.contains(box.x0, box.y0), item
        assert figure.bbox.contains(box.x1, box.y1), item
    assert min(item.get_fontsize() for item in boxes if item in panel.texts) >= 7
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        assert not a.overlaps(b), f"{one} lies on {other}"
