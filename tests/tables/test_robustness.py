"""The same differences under other assumptions: by hand, and from toy records."""

import math
import statistics

import numpy as np
import pytest
import toy_records
from scipy import stats

from mbn import grid
from mbn.tables.cells import read_records, read_tables
from mbn.tables.over_seeds import Sample, Spread, contrast
from mbn.tables.robustness import GpuEffect, allowing_for_gpus, paired, permutation, robustness_page, welch
from mbn.tables.run_cells import run_cells

A, B = [6.1, 6.3, 6.2, 6.6], [6.5, 7.9, 6.4]


def interval(mean, error, freedom):
    half = stats.t.ppf(0.975, freedom) * error
    return mean - half, mean + half


def test_welchs_test_by_hand():
    va, vb = statistics.variance(A) / 4, statistics.variance(B) / 3
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 2)
    found, mean = welch(A, B), statistics.fmean(A) - statistics.fmean(B)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx(interval(mean, math.sqrt(va + vb), freedom))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / math.sqrt(va + vb), freedom))
    test = stats.ttest_ind(A, B, equal_var=False)
    assert (found.low, found.high, found.p) == pytest.approx((*test.confidence_interval(), test.pvalue))
    assert welch([1.0, 1.0], [2.0, 2.0]) is None


def test_welchs_test_where_one_cell_does_not_vary():
    found = welch([1.0, 1.0], [2.0, 3.0])
    assert (found.low, found.high) == pytest.approx(interval(-1.5, 0.5, 1))


def test_the_permutation_test_by_hand():
    assert permutation([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == 2 / 20
    assert permutation([9.0], [1.0, 2.0, 3.0]) == 1 / 4
    assert permutation([1.0, 1.1], [1.1, 1.0]) == 1
    test = stats.permutation_test(
        (A, B), lambda a, b: abs(statistics.fmean(a) - statistics.fmean(b)), vectorized=False, alternative="greater"
    )
    assert permutation(A, B) == pytest.approx(test.pvalue)


def test_the_paired_test_by_hand():
    differences = [-0.4, -1.6, -0.2]
    error = statistics.stdev(differences) / math.sqrt(3)
    found, mean = paired(A[:3], B), statistics.fmean(differences)
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx(interval(mean, error, 2))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(mean) / error, 2))
    assert paired([1.0], [2.0]) is None
    assert paired([1.0, 2.0], [2.0, 3.0]) is None


CPU, GPU, BOTH = "cpu: Toy", "cuda: Toy", "cuda: Toy, then cpu: Toy"


def written(folder, runs, row="8"):
    """Records of a row of Table 4, by column: error and device of each seed."""
    for column, some in runs.items():
        for seed, (error, device) in enumerate(some):
            toy_records.write(folder, grid.read("table4").cell(row, column), seed, error, device=device)
    return read_tables(read_records(folder))


def difference(gpu, first, second):
    """Two cells' means, by their names."""
    samples = [Sample(name, 0.0, 2, "here", Spread()) for name in (first, second)]
    return allowing_for_gpus(contrast(samples, (1, -1)), {"here": gpu})


BALANCED = {
    "BN": [(20.0, CPU), (22.0, CPU), (24.0, GPU), (26.0, BOTH)],
    "MBN": [(10.0, CPU), (12.0, CPU), (14.0, BOTH), (16.0, GPU)],
}


def test_the_effect_of_gpus_by_hand(tmp_path):
    """Balanced: b = 4 is the mean difference within cells, all residuals are 1 or -1: s² = 8 / (8 - 3)."""
    tables = written(tmp_path, BALANCED)
    gpu = GpuEffect.fit(run_cells(tables))
    error = math.sqrt(8 / 5 * (1 / 4 + 1 / 4))
    bn, mbn = (grid.read("table4").cell("8", column).name(0) for column in ("BN", "MBN"))
    found = difference(gpu, mbn, bn)
    assert (found.low, found.high) == pytest.approx(interval(-10, error, 5))
    assert found.p == pytest.approx(2 * stats.t.sf(10 / error, 5))
    low, high = interval(4, error, 5)
    assert gpu.sentence().startswith("of 8 runs 4 were on a GPU")
    assert f"by +4.00 [{low:+.2f}, {high:+.2f}], p = " in gpu.sentence()


def test_an_unbalanced_difference_is_corrected(tmp_path):
    """MBN has the same error as BN on each device, but more of its runs were on a GPU."""
    tables = written(
        tmp_path,
        {"BN": [(20.0, CPU), (20.2, CPU), (24.0, GPU)], "MBN": [(20.1, CPU), (24.0, GPU), (24.2, GPU)]},
    )
    bn, mbn = (grid.read("table4").cell("8", column).name(0) for column in ("BN", "MBN"))
    found = difference(GpuEffect.fit(run_cells(tables)), mbn, bn)
    assert found.mean == pytest.approx(0.05)  # 4.1 / 3 - b / 3, b = 3.95
    page = robustness_page(tables, run_cells(tables))
    (line,) = [
        line for line in page.splitlines() if line.startswith("| ResNet-56 on CIFAR-10, batch 8: MBN-2 - BN-1 |")
    ]
    _, n, pooled, of_welch, of_deals, of_pairs, of_gpus, r = line.strip("| ").split(" | ")
    assert n == "3+3"
    assert r == f"{stats.pearsonr([20.0, 20.2, 24.0], [20.1, 24.0, 24.2]).statistic:+.2f} (3)"
    assert of_gpus == str(found)
    assert pooled.startswith("+1.37 [")
    assert of_welch == str(welch([20.1, 24.0, 24.2], [20.0, 20.2, 24.0]))
    assert of_deals == f"p = {permutation([20.1, 24.0, 24.2], [20.0, 20.2, 24.0]):.3f}"
    assert of_pairs == f"{paired([20.1, 24.0, 24.2], [20.0, 20.2, 24.0])} (3)"
    assert "| ResNet-56 on CIFAR-10, batch 8, BN-1 | 3 | 21.40 | 2.25 | 20.00 to 24.00 |" in page
    of_brown, of_levene = (
        stats.levene([20.0, 20.2, 24.0], [20.1, 24.0, 24.2], center=center).pvalue for center in ("median", "mean")
    )
    tested = f"Brown and Forsythe's p = {of_brown:.3f}, Levene's p = {of_levene:.3f}"
    assert f"- ResNet-56 on CIFAR-10, 2 cells: {tested}" in page


def test_runs_without_weight_decay_on_gamma_and_beta_change_no_fit_of_the_others(tmp_path):
    alone = written(tmp_path, BALANCED)
    before = robustness_page(alone, run_cells(alone)).splitlines()
    cell = grid.read("table4-no-decay").cell("8", "BN no decay")
    for seed, error in enumerate([14.0, 19.0, 30.0]):
        toy_records.write(tmp_path, cell, seed, error)
    tables = read_tables(read_records(tmp_path))
    after = robustness_page(tables, run_cells(tables)).splitlines()
    assert [line for line in before if line not in after] == []
    assert any("(optimizer.decay_norm=false)" in line for line in after)


def primary_line(tables):
    page = robustness_page(tables, run_cells(tables))
    (line,) = [line for line in page.splitlines() if line.startswith("| MBN < BN |")]
    return line.strip("| ").split(" | ")


def test_a_primary_claim_allows_for_gpus(tmp_path):
    """Batch 8 as above, -10 with variance s² / 2; batch 16, one run each on a CPU, -1 with 2 s²: weights 0.8, 0.2."""
    written(tmp_path, BALANCED)
    tables = written(tmp_path, {"BN": [(12.0, CPU)], "MBN": [(11.0, CPU)]}, "16")
    mean, error = -0.8 * 10 - 0.2 * 1, math.sqrt(8 / 5 * (0.64 / 2 + 0.04 * 2))
    low, high = interval(mean, error, 5)
    p = 2 * stats.t.sf(-mean / error, 5)
    _, n, pooled, equal, _, of_gpus, _ = primary_line(tables)
    assert n == "5+5"
    assert pooled.startswith("-8.20 [")
    assert p < 0.001
    assert of_gpus == f"-8.20 [{low:+.2f}, {high:+.2f}], p < 0.001 ({3 * p:.3f})"
    # Both places with weight 1/2: without an effect of GPUs s² = 40 / 6.
    error = math.sqrt(40 / 6 * (1 / 4 * (1 / 4 + 1 / 4) + 1 / 4 * 2))
    low, high = interval(-5.5, error, 6)
    p = 2 * stats.t.sf(5.5 / error, 6)
    assert equal == f"-5.50 [{low:+.2f}, {high:+.2f}], p = {p:.3f} ({3 * p:.3f})"


def test_a_primary_claim_without_any_one_of_its_runs_by_hand(tmp_path):
    """BN 20, 21 and MBN 19, 18: -2.5 and -1.5, twice each, with the variance 1/2 (1 + 1/2) of the other cell."""
    tables = written(tmp_path, {"BN": [(20.0, CPU), (21.0, CPU)], "MBN": [(19.0, CPU), (18.0, CPU)]})
    low, high = (min(1, 3 * 2 * stats.t.sf(distance / math.sqrt(0.75), 1)) for distance in (2.5, 1.5))
    assert primary_line(tables)[-1] == f"{low:.3f} to {high:.3f}, above 0.05 in 4 of 4"
    assert low < high
    clear = {"BN": [(90.0, CPU), (90.1, CPU), (90.0, CPU)], "MBN": [(10.0, CPU), (10.1, CPU), (10.0, CPU)]}
    assert primary_line(written(tmp_path, clear))[-1].endswith(", above 0.05 in 0 of 6")


def test_a_difference_over_two_networks_by_hand(tmp_path):
    """-10 with variance 2 and -4 with 1/2: weights 1/5 and 4/5."""
    written(tmp_path, {"BN": [(20.0, CPU), (22.0, CPU)], "MBN": [(10.0, CPU), (12.0, CPU)]})
    for column, errors in (("BN-1", (20.0, 21.0)), ("MBN-2", (16.0, 17.0))):
        for seed, error in enumerate(errors):
            toy_records.write(tmp_path, grid.read("table4-resnet20").cell("8", column), seed, error, device=CPU)
    tables = read_tables(read_records(tmp_path))
    (line,) = [one for one in robustness_page(tables, run_cells(tables)).splitlines() if " and ResNet-" in one]
    v, w = 0.04 * 2, 0.64 * 0.5
    freedom = (v + w) ** 2 / (v**2 / 2 + w**2 / 2)
    low, high = interval(-5.2, math.sqrt(v + w), freedom)
    p = 2 * stats.t.sf(5.2 / math.sqrt(v + w), freedom)
    where = "ResNet-56 on CIFAR-10 and ResNet-20 on CIFAR-10, batch 8: MBN-2 - BN-1"
    assert line == f"| {where} | 4+4 | -5.20 [{low:+.2f}, {high:+.2f}], p = {p:.3f} | - | - | - | - | - |"


def test_a_primary_claim_by_pairs_by_hand(tmp_path):
    """Differences -1, -3, -2 at batch 8 and +1, +2 at batch 16: s² = (2 + 1/2) / 3, weights 3/5 and 2/5."""
    written(tmp_path, {"BN": [(20.0, CPU), (21.0, CPU), (26.0, CPU)], "MBN": [(19.0, CPU), (18.0, CPU), (24.0, CPU)]})
    tables = written(tmp_path, {"BN": [(12.0, CPU), (11.0, CPU)], "MBN": [(13.0, CPU), (13.0, CPU)]}, "16")
    mean, error = -0.6 * 2 + 0.4 * 1.5, math.sqrt(2.5 / 3 * (0.36 / 3 + 0.16 / 2))
    low, high = interval(mean, error, 3)
    p = 2 * stats.t.sf(-mean / error, 3)
    _, n, pooled, _, pairs, of_gpus, _ = primary_line(tables)
    assert n == "5+5"
    assert pooled.startswith(f"{mean:+.2f} [")
    assert pairs == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], p = {p:.3f} ({3 * p:.3f})"
    assert of_gpus == "-"


def test_a_primary_claim_without_a_pair_at_a_place_has_none(tmp_path):
    written(tmp_path, {"BN": [(20.0, CPU), (21.0, CPU)], "MBN": [(19.0, CPU), (18.0, CPU)]})
    for column, seed in (("BN", 0), ("MBN", 1)):
        toy_records.write(tmp_path, grid.read("table4").cell("16", column), seed, 12.0, device=CPU)
    _, n, _, _, pairs, _, _ = primary_line(read_tables(read_records(tmp_path)))
    assert (n, pairs) == ("3+3", "-")


def test_pairs_are_runs_of_equal_seeds(tmp_path):
    """BN at seeds 0, 1, 2 and MBN at 1, 2, 3: two pairs, with differences 2 and 3."""
    for column, first, errors in (("BN", 0, (20.0, 10.0, 11.0)), ("MBN", 1, (12.0, 14.0, 30.0))):
        for seed, error in enumerate(errors, first):
            toy_records.write(tmp_path, grid.read("table4").cell("8", column), seed, error, device=CPU)
    tables = read_tables(read_records(tmp_path))
    (line,) = [one for one in robustness_page(tables, run_cells(tables)).splitlines() if "batch 8: MBN-2 - BN-1" in one]
    low, high = interval(2.5, 0.5, 1)
    assert line.split(" | ")[5] == f"+2.50 [{low:+.2f}, {high:+.2f}], p = {2 * stats.t.sf(5, 1):.3f} (2)"


def test_a_primary_claim_by_pairs_over_two_networks_by_hand(tmp_path):
    """MBN < BRN: on ResNet-20 differences 1 and 3 (s² = 2), on ResNet-56 -1, 0 and 1 (s² = 1).

    Unpaired their variances are 1 (1/2 + 1/2) and 1/2 (1/3 + 1/3), so that the weights are 1/4 and 3/4.
    """
    for name, mbn, brn in (("table4-resnet20", (11.0, 13.0), 2 * (10.0,)), ("table4-methods", (9, 10, 11), 3 * (10,))):
        for column, errors in (("MBN-2", mbn), ("BRN-2", brn)):
            for seed, error in enumerate(errors):
                toy_records.write(tmp_path, grid.read(name).cell("8", column), seed, float(error), device=CPU)
    tables = read_tables(read_records(tmp_path))
    page = robustness_page(tables, run_cells(tables))
    (line,) = [one for one in page.splitlines() if one.startswith("| MBN < BRN |")]
    v, w = 2 / 16 / 2, 9 / 16 / 3
    freedom = (v + w) ** 2 / (v**2 / 1 + w**2 / 2)
    low, high = interval(0.5, math.sqrt(v + w), freedom)
    p = 2 * stats.t.sf(0.5 / math.sqrt(v + w), freedom)
    assert line.split(" | ")[4] == f"+0.50 [{low:+.2f}, {high:+.2f}], p = {p:.3f} ({min(1, 3 * p):.3f})"


def test_over_two_networks_variances_and_satterthwaites_degrees_of_freedom():
    fits = {
        "A": GpuEffect(("x", "y"), np.array([1.0, 3.0, 0.5]), np.diag([0.1, 0.2, 1.0]), 4, 6, 3),
        "B": GpuEffect(("z", "unused"), np.array([7.0, 9.0, 0.5]), np.diag([0.4, 0.5, 1.0]), 8, 6, 3),
    }
    samples = [Sample(name, 0.0, 2, group, Spread(1.0, 4)) for name, group in (("x", "A"), ("y", "A"), ("z", "B"))]
    number = contrast(samples, (1, -1, 0.5))
    v, w = 0.1 + 0.2, 0.25 * 0.4
    found = allowing_for_gpus(number, fits)
    assert found.mean == pytest.approx(1 - 3 + 0.5 * 7)
    assert (found.low, found.high) == pytest.approx(
        interval(1.5, math.sqrt(v + w), (v + w) ** 2 / (v**2 / 4 + w**2 / 8))
    )
    assert allowing_for_gpus(number, fits | {"B": None}) is None


def test_what_cannot_be_told_is_not_told(tmp_path):
    tables = written(tmp_path / "one", {"BN": [(20.0, CPU), (20.2, CPU)], "MBN": [(20.1, CPU)]})
    assert robustness_page(tables, run_cells(tables)) == ""
    tables = written(tmp_path / "two", {"BN": [(20.0, CPU), (20.2, CPU)], "MBN": [(20.1, CPU), (20.3, CPU)]})
    page = robustness_page(tables, run_cells(tables))
    assert "No cell has runs on a GPU and others." in page
    assert " | - | - | - |\n" in page  # all differ alike, no GPU, no correlation of two
    assert "Levene's p" not in page
