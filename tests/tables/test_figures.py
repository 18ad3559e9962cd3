"""Figures from toy records: they are not empty, have the same bytes each time, and the lines that they should have."""

import pytest
import toy_records
from matplotlib.figure import Figure
from PIL import Image

from mbn import grid
from mbn.tables import figures as plot
from mbn.tables.cells import read_records


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Records of ResNet-56 only: seeds 0 and 1 of BN and MBN at batch 8 and 128, and seed 0 of BN at 16."""
    folder = tmp_path_factory.mktemp("results")
    g = grid.read("table4-methods")
    for seed in range(2):
        for row, column in (("8", "BN-1"), ("8", "MBN-2"), ("128", "BN-1"), ("128", "MBN-2"), ("16", "BN-1")):
            if row == "16" and seed > 0:
                continue
            error = 9 + seed / 10 - (column == "MBN-2") - int(row) / 128
            toy_records.write(folder, g.cell(row, column), seed, error, fall=1.0, bump=0.5)
    return folder


@pytest.fixture(scope="module")
def figures(results) -> dict[str, Figure | None]:
    return plot.draw(read_records(results))


def lines(panel):
    return {line.get_label(): line for line in panel.get_lines()}


def test_figures_without_data_are_not_drawn(figures):
    assert {name for name, f in figures.items() if f is None} == {"figure3", "gap-resnet20", "training-resnet20"}
    assert set(plot.draw({}).values()) == {None}


def test_lines_are_means_over_seeds_by_epoch(figures):
    (panel,) = figures["figure1"].axes
    found = lines(panel)
    assert set(found) == {"BN-1", "MBN-2"}
    x, y = found["BN-1"].get_data()
    assert (x[0], x[-1], y[-1]) == (2.0, 200.0, pytest.approx(8.05))
    assert len(panel.collections) == 2  # a band each
    networks = figures["figure2"].axes
    assert [p.get_title() for p in networks] == ["ResNet-20", "ResNet-56", "VGG"]
    assert set(lines(networks[1])) == {"BN, training", "BN, test", "MBN, training", "MBN, test"}
    thin, bold = lines(networks[1])["MBN, training"], lines(networks[1])["MBN, test"]
    assert thin.get_linewidth() < bold.get_linewidth()


def test_error_against_batch_size(figures):
    (panel,) = figures["batch-size"].axes
    x, y = lines(panel)["BN-1"].get_data()
    assert list(x) == [8, 16, 128]
    assert list(y) == [pytest.approx(error - b / 128) for b, error in zip(x, (9.05, 9.0, 9.05), strict=True)]
    assert list(lines(panel)["MBN-2"].get_xdata()) == [8, 128]
    assert panel.get_xscale() == "log"
    # Seeds 0 and 1 are 0.1 apart; at 16 there is one alone, and no bar.
    bars = [bar for c in panel.collections for bar in c.get_segments()]
    assert sorted({round(x) for (x, _), _ in bars}) == [8, 128]
    assert [high - low for (_, low), (_, high) in bars] == [pytest.approx(2 * 0.1 / 2**0.5)] * 4


def test_gap_is_over_the_share_of_training(figures):
    panel = figures["gap-resnet56"].axes[0]
    x, y = lines(panel)["MBN-2"].get_data()
    assert (x[0], x[-1]) == (pytest.approx(1, rel=1e-2), 100)
    assert y[-1] == pytest.approx(0.01)


def test_training_is_drawn_in_the_finest_steps_there_are(figures):
    loss, error, weights = figures["training-resnet56"].axes
    assert [p.get_title() for p in (loss, error, weights)] == ["training loss", "test error (%)", "norm of all weights"]
    x, y = lines(loss)["MBN-2"].get_data()
    assert (len(x), x[0], x[-1], y[-1]) == (200, pytest.approx(0.5, rel=1e-3), 100, pytest.approx(0.01))
    assert len(lines(error)["BN-1"].get_xdata()) == 100
    assert lines(weights)["BN-1"].get_ydata()[-1] == 20
    for panel in (loss, error, weights):
        assert [line.get_xdata()[0] for line in panel.get_lines() if line.get_linestyle() == ":"] == [40, 60]


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
        looks = [plot.look(cell) for cell in grid.read(name).cells[:columns]]
        assert len({(look["marker"], look["linestyle"]) for look in looks}) == len({look["label"] for look in looks})


def test_files_are_pictures_and_the_same_each_time(figures, results, tmp_path):
    some = {"figure1": figures["figure1"], "figure3": None}
    again = {"figure1": plot.draw(read_records(results))["figure1"], "figure3": None}
    written = plot.write(some, tmp_path / "a")
    plot.write(again, tmp_path / "b")
    assert sorted(p.name for p in written) == ["figure1.png", "figure1.svg"]
    for path in written:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    with Image.open(tmp_path / "a" / "figure1.png") as image:
        assert image.size == (660, 600)
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    svg = (tmp_path / "a" / "figure1.svg").read_text()
    assert plot.METHODS["mbn"].colour.lower() in svg
    assert "<dc:date>" not in svg
    assert [p.name for p in plot.write(again, tmp_path / "c", scale=0.1)] == [
        *("figure1-scale0.1.png", "figure1-scale0.1.svg"),
    ]
