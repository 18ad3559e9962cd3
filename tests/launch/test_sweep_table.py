"""The table at the end of a sweep, from toy records."""

import dataclasses
import types

import toy_records
from running import compose

from mbn.config import run_name, sweep_lines
from mbn.launch.missing_runs import PlannedRun
from mbn.launch.sweep_table import sweep_table


def planned(*overrides):
    lines = [(line, compose(*line)) for line in sweep_lines(list(overrides))]
    return [PlannedRun(run_name(config), config, tuple(line)) for line, config in lines]


def finish(results, run, test_error, **fields):
    cell = types.SimpleNamespace(config=lambda seed, _: dataclasses.replace(run.config, seed=seed))
    return toy_records.write(results, cell, run.config.seed, test_error, **fields)


def test_a_line_a_run_with_what_differs_and_a_mean_over_seeds(tmp_path):
    runs = planned("norm=bn,gn", "seed=range(0,3)")
    finish(tmp_path, runs[0], 2.0, test_error_best=1.5, train_error=0.25, seconds=45.2)
    finish(tmp_path, runs[1], 4.0, seconds=7300.0)
    finish(tmp_path, runs[3], 7.12)
    begun = runs[4].folder(tmp_path)
    begun.mkdir(parents=True)
    (begun / "checkpoint.pt").touch()
    text = sweep_table(runs, tmp_path, {runs[2].name: "failed: " + "and " * 20})
    assert text.splitlines() == [
        "norm  seed  test error  best epoch  training error       time",
        "bn    0         2.00 %      1.50 %          0.25 %       45 s",
        "bn    1         4.00 %      4.00 %          1.00 %  2 h 2 min",
        f"bn    2              -           -               -          -  failed:{' and' * 12} ...",
        "gn    0         7.12 %      7.12 %          1.00 %     30 min",
        "gn    1              -           -               -          -  unfinished",
        "gn    2              -           -               -          -  not begun",
        "",
        "mean ± standard deviation in percent (seeds):",
        "norm       test error       best epoch   training error",
        "bn    3.00 ± 1.41 (2)  2.75 ± 1.77 (2)  0.62 ± 0.53 (2)",
        "gn           7.12 (1)         7.12 (1)         1.00 (1)",
    ]


def test_a_run_that_diverged_has_no_errors_and_does_not_count_in_the_mean(tmp_path):
    runs = planned("seed=0,1")
    cell = types.SimpleNamespace(config=lambda seed, _: dataclasses.replace(runs[0].config, seed=seed))
    finish(tmp_path, runs[0], 2.0)
    toy_records.write_diverged(tmp_path, cell, 1, at=91, seconds=12.0)
    lines = sweep_table(runs, tmp_path, {}).splitlines()
    assert lines[2].split("  ")[-2:] == ["12 s", "diverged at iteration 91 of 78,200"]
    assert lines[-1].split() == ["2.00", "(1)", "2.00", "(1)", "1.00", "(1)"]


def test_without_seeds_there_are_no_means_and_a_run_that_stands_twice_counts_once(tmp_path):
    runs = planned("norm=bn", "batch_size=8,16")
    finish(tmp_path, runs[0], 2.0, test_error_best=1.0)
    assert sweep_table(runs, tmp_path, {}).splitlines() == [
        "batch_size  test error  best epoch  training error    time",
        "8               2.00 %      1.00 %          1.00 %  30 min",
        "16                   -           -               -       -  not begun",
    ]
    runs = planned("++seed=0,0,1")
    finish(tmp_path, runs[0], 2.0)
    finish(tmp_path, runs[2], 4.0)
    assert sweep_table(runs, tmp_path, {}).splitlines()[-1] == "3.00 ± 1.41 (2)  3.00 ± 1.41 (2)  1.00 ± 0.00 (2)"


def test_a_record_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    runs = planned("seed=0,1")
    finish(tmp_path, runs[0], 2.0).write_text("{")
    finish(tmp_path, runs[1], 4.0)
    _, first, second, *_ = sweep_table(runs, tmp_path, {}).splitlines()
    assert first.endswith("its record cannot be read")
    assert "4.00 %" in second
