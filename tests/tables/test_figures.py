"""Figures from toy records: they are not empty, have the same bytes each time, and the lines that they should have."""

import io
from math import log2

import pytest
import toy_records
from matplotlib.figure import Figure
from PIL import Image

from mbn import grid
from mbn.methods import METHODS
from mbn.tables import figures as drawing
from mbn.tables.cells import read_records
from mbn.tables.figures.style import curve, look


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Records of ResNet-56 only: seeds 0 and 1 of BN and MBN at batch 8 and 128, and seed 0 of BN at 16."""
    folder = tmp_path_factory.mktemp("results")
    g = grid.read("table4-methods")
    for seed in range(2):
        for row, column in (("8", "BN-1"), ("8", "MBN-2"), ("128", "BN-1"), ("128", "MBN-2"), ("16", "BN-1")):
            if row == "16" and seed > 0:
                continue
            error = round(9 + seed / 10 - (column == "MBN-2") - int(row) / 100, 2)
            toy_records.write(folder, g.cell(row, column), seed, error, fall=1.0, bump=0.5)
    return folder


@pytest.fixture(scope="module")
def figures(results) -> dict[str, Figure | None]:
    return drawing.draw(read_records(results))


def lines(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_figures_without_data_are_not_drawn(figures):
    assert {name for name, f in figures.items() if f is None} == {"figure3", "gap-resnet20", "training-resnet20"}
    assert set(drawing.draw({}).values()) == {None}


def test_lines_are_means_over_seeds_by_epoch(figures):
    (panel,) = figures["figure1"].axes
    found = lines(panel)
    assert set(found) == {"BN-1", "MBN-2"}
    x, y = found["BN-1"].get_data()
    assert (x[0], x[-1], y[-1]) == (2.0, 200.0, pytest.approx(7.77))
    assert len(panel.collections) == 2  # a band each
    networks = figures["figure2"].axes
    assert [p.get_title() for p in networks] == ["ResNet-20", "ResNet-56", "VGG"]
    assert set(lines(networks[1])) == {"BN, training", "BN, test", "MBN, training", "MBN, test"}
    thin, bold = lines(networks[1])["MBN, training"], lines(networks[1])["MBN, test"]
    assert thin.get_linewidth() < bold.get_linewidth()


def test_error_against_batch_size(figures):
    (panel,) = figures["batch-size"].axes
    x, y = lines(panel)["BN-1"].get_data()
    assert x == pytest.approx([8, 16, 128], rel=0.1)
    assert list(y) == [pytest.approx(error - b / 100) for b, error in ((8, 9.05), (16, 9.0), (128, 9.05))]
    assert lines(panel)["MBN-2"].get_xdata() == pytest.approx([8, 128], rel=0.1)
    assert panel.get_xscale() == "log"
    x, y = lines(panel)["MBN, paper"].get_data()
    assert (list(x), list(y)) == ([8, 16, 32, 64, 128], [15.37, 11.87, 9.37, 7.79, 6.23])
    # Seeds 0 and 1 are 0.1 apart; at 16 there is one alone, and no bar.
    bars = [bar for c in panel.collections for bar in c.get_segments()]
    assert sorted({2 ** round(log2(x)) for (x, _), _ in bars}) == [8, 128]
    assert [high - low for (_, low), (_, high) in bars] == [pytest.approx(2 * 0.1 / 2**0.5)] * 4


def test_a_seed_without_a_curve_does_not_take_it_from_the_others(tmp_path):
    """Older records lack some."""
    g = grid.read("table4")
    cell = g.cell("8", "BN")
    for seed in (0, 1):
        toy_records.write(tmp_path, cell, seed, 15.0)
    records = read_records(tmp_path)
    table = toy_records.table(g, records)
    both = curve(table, cell, "gap_mean")
    del records[cell.name(1)]["curves"]["gap_mean"]
    assert curve(table, cell, "gap_mean") == [(x, ys[:1]) for x, ys in both]
    del records[cell.name(0)]["curves"]["gap_mean"]
    assert curve(table, cell, "gap_mean") == []


def test_a_table_whose_runs_have_all_diverged_has_no_panel(tmp_path):
    toy_records.write_diverged(tmp_path, grid.read("table4-resnet20").cell("8", "MBN-1"), 0, at=5)
    assert drawing.draw(read_records(tmp_path))["batch-size"] is None
    toy_records.write(tmp_path, grid.read("table4").cell("8", "BN"), 0, 15.4)
    (panel,) = drawing.draw(read_records(tmp_path))["batch-size"].axes
    assert panel.get_title() == "ResNet-56 on CIFAR-10"


def test_a_far_error_is_an_arrow_and_a_panel_shows_only_the_sizes_that_it_has(tmp_path):
    g = grid.read("table4-resnet20")
    for column, error in (("BN-1", 16.0), ("BRN-2", 18.0), ("MBN-1", 40.0), ("MBN-2", 17.5), ("GN (untuned)", 37.5)):
        toy_records.write(tmp_path, g.cell("8", column), 0, error)
    toy_records.write(tmp_path, grid.read("table4").cell("8", "BN"), 0, 15.4)
    figures = drawing.draw(read_records(tmp_path))
    small, large = figures["batch-size"].axes
    assert [p.get_title() for p in (small, large)] == ["ResNet-20 on CIFAR-10", "ResNet-56 on CIFAR-10"]
    assert ([*small.get_xticks()], [*large.get_xticks()]) == ([8], [8, 16, 32, 64, 128])
    assert small.get_position().width < large.get_position().width / 2
    assert small.get_ylim() == large.get_ylim()
    assert 19.64 < small.get_ylim()[1] < 25
    assert [text.get_text() for text in small.texts] == ["MBN-1 40.0 ↑", "GN 37.5 ↑"]
    first, second = (text.xy[1] for text in small.texts)
    assert 19.64 < second < first - 0.5  # below each other
    assert not large.texts
    # Only batch 8 has run: no panel is empty.
    assert len(figures["gap-resnet20"].axes) == 2
    assert all("batch 8" in panel.get_title() and lines(panel) for panel in figures["gap-resnet20"].axes)


def test_a_seed_that_diverged_is_in_no_line(results, figures):
    records = read_records(results)
    name = grid.read("table4-methods").cell("8", "BN-1").name(1)
    records[name] |= {"diverged_at": 5, "test_error": None, "curves": {}}
    left = drawing.draw(records)
    _, y = lines(left["batch-size"].axes[0])["BN-1"].get_data()
    assert y[0] == pytest.approx(9 - 0.08)
    loss = [lines(some["training-resnet56"].axes[0])["BN-1"].get_xdata() for some in (left, figures)]
    assert [*loss[0]] == [*loss[1]]


def test_gap_is_over_the_share_of_training(figures):
    panels = figures["gap-resnet56"].axes
    assert [p.get_title().partition(": ")[2] for p in panels] == [
        *("ResNet-56 on CIFAR-10, batch 8", "ResNet-56 on CIFAR-10, batch 128") * 2
    ]
    x, y = lines(panels[0])["MBN-2"].get_data()
    assert (x[0], x[-1]) == (pytest.approx(1, rel=1e-2), 100)
    assert y[-1] == pytest.approx(0.01)


def test_gap_shows_batch_sizes_at_which_several_methods_have_run_if_there_are_any(results):
    records, g = read_records(results), grid.read("table4-methods")
    for column, batches in (("MBN-2", {"8"}), ("BN-1", {"8"}), ("BN-1", {"128"})):  # taken away one after the other
        drawn = [p.get_title().rpartition(" ")[2] for p in drawing.draw(records)["gap-resnet56"].axes]
        assert set(drawn) == {"8", "128"} if column == "MBN-2" else {"128"}
        for seed in range(2):
            for batch in batches:
                records.pop(g.cell(batch, column).name(seed))
    drawn = [p.get_title().rpartition(" ")[2] for p in drawing.draw(records)["gap-resnet56"].axes]
    assert drawn == ["16", "128"] * 2  # of one method each


def test_training_is_drawn_in_the_finest_steps_there_are(figures):
    loss, error, weights = figures["training-resnet56"].axes[:3]
    assert [p.get_title() for p in (loss, error, weights)] == ["training loss", "test error (%)", "norm of all weights"]
    x, y = lines(loss)["MBN-2"].get_data()
    assert (len(x), x[0], x[-1], y[-1]) == (200, pytest.approx(0.5, rel=1e-3), 100, pytest.approx(0.01))
    assert len(lines(error)["BN-1"].get_xdata()) == 100
    assert lines(weights)["BN-1"].get_ydata()[-1] == 20
    for panel in (loss, error, weights):
        assert [line.get_xdata()[0] for line in panel.get_lines() if line.get_linestyle() == ":"] == [40, 60]
    (legend,) = figures["training-resnet56"].legends
    assert "learning rate and λ change" in [text.get_text() for text in legend.get_texts()]


def test_below_is_the_part_after_the_last_change_at_its_own_scale(figures):
    for whole, late in zip(*(figures["training-resnet56"].axes[i : i + 3] for i in (0, 3)), strict=True):
        assert late.get_title() == f"{whole.get_title()}, last 40 %"
        for label, line in lines(late).items():
            x, y = lines(whole)[label].get_data()
            assert [*zip(*line.get_data(), strict=True)] == [(a, b) for a, b in zip(x, y, strict=True) if a >= 60]
        assert late.get_ylim()[1] - late.get_ylim()[0] < whole.get_ylim()[1] - whole.get_ylim()[0]


@pytest.mark.parametrize("name", ["figure1", "figure2", "batch-size", "gap-resnet56", "training-resnet56"])
def test_lines_differ_by_more_than_colour(figures, name):
    for panel in figures[name].axes:
        drawn = [line for line in panel.get_lines() if line.get_linestyle() != ":"]
        styles = {(line.get_linestyle(), line.get_marker(), line.get_linewidth()) for line in drawn}
        assert len(styles) == len(drawn)
        texts = [*panel.get_xticklabels(), *panel.get_yticklabels(), panel.xaxis.label, panel.yaxis.label, panel.title]
        texts += [t for legend in figures[name].legends for t in legend.get_texts()]
        assert min(t.get_fontsize() for t in texts) >= 7
        assert len(figures[name].legends) == 1


def test_every_method_has_a_look_of_its_own():
    for name, columns in (("figure1", 6), ("table4-methods", 7), ("gradient", 6)):
        looks = [look(cell) for cell in grid.read(name).cells[:columns]]
        assert len({(look["marker"], look["linestyle"]) for look in looks}) == len({look["label"] for look in looks})


def test_files_are_pictures_and_the_same_each_time(figures, results):
    some = {"figure1": figures["figure1"], "figure3": None}
    again = {"figure1": drawing.draw(read_records(results))["figure1"], "figure3": None}
    made = drawing.pictures(some)
    assert sorted(made) == ["figure1.png", "figure1.svg"]
    assert drawing.pictures(again) == made
    with Image.open(io.BytesIO(made["figure1.png"])) as image:
        assert image.size == (660, 600)
        assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)  # white also on a dark page
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    svg = made["figure1.svg"].decode()
    assert METHODS["mbn"].colour.lower() in svg
    assert "<dc:date>" not in svg
    assert list(drawing.pictures(again, scale=0.1)) == ["figure1-scale0.1.png", "figure1-scale0.1.svg"]


def test_clip_paths_are_named_in_their_order():
    """By matplotlib they are named by a hash of floats, whose last bits another numpy may change."""
    svg = b'<use clip-path="url(#pbbbbbbbbbb)"/><clipPath id="pbbbbbbbbbb"/><clipPath id="p0123456789"/>p0123456789'
    named = b'<use clip-path="url(#p1)"/><clipPath id="p1"/><clipPath id="p2"/>p2'
    assert drawing.with_numbered_clips(svg) == named
