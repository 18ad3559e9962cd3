"""Which runs tables, seeds and filters choose, and how long they take."""

import json
import math
import shutil

import pytest

from mbn import grid
from mbn.config import REPOSITORY, load, run_name
from mbn.launch import missing_runs
from mbn.launch.estimate import Estimate
from mbn.launch.missing_runs import runs
from mbn.records import record
from mbn.system.durations import duration
from mbn.system.errors import UserError


def test_all_is_everything_except_imagenet_and_a_shared_run_stands_once(tmp_path):
    for name in ("table1", "table3", "table6"):
        shutil.copy(REPOSITORY / "scripts" / "grids" / f"{name}.yaml", tmp_path)
    names = [run.name for run in runs(["all"], [0], folder=tmp_path)]
    assert not any(name.startswith("imagenet") for name in names)
    # ResNet-20 with MBN and a memory of 20 is in both.
    assert len(set(names)) == len(names) == 14 + 3 - 1
    assert set(missing_runs.NOT_IN_ALL) < set(grid.names())


def test_order_is_all_cells_with_one_seed_then_with_the_next():
    found = runs(["table6", "table5"], [0, 1, 2])
    assert [run.config.seed for run in found] == [0] * 8 + [1] * 8 + [2] * 8
    assert [run.config.model.name for run in found[:8]] == ["resnet20"] * 3 + ["resnet56"] * 5
    assert all(f"seed={run.config.seed}" in run.overrides and run_name(run.config) == run.name for run in found)


@pytest.mark.parametrize(
    ("tables", "filters", "count"),
    [
        (["table4"], ["norm=bn,mbn", "batch_size=8"], 2),
        (["table4"], ["norm=mbn"], 5),
        (["table4"], ["batch_size=8,128"], 4),
        (["table1"], ["model=nin,vgg16", "norm=mbn"], 2),
        (["table5"], ["norm.lam=[0.1,0.5,0.9]"], 1),
        (["table5"], ["norm.lam=[0.9],[0.1,0.5,0.9]"], 2),
        (["table1-nin"], ["model.dropout=0", "norm=bn"], 2),
        (["table6", "table1"], ["norm.memory=20"], 4),
        (["table1"], ["schedule.epochs=null", "optimizer.weight_decay=0.0001", "dataset.flip=true"], 14),
    ],
)
def test_filters(tables, filters, count):
    assert len(runs(tables, [0], filters)) == count


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        (["nrom=bn"], "setting 'nrom'"),
        (["norm.size=3"], "setting 'norm.size'"),
        (["schedule=cifar10"], "setting 'schedule'"),
        (["norm=bn,brn"], "norm=brn: they have bn, mbn"),
        (["seed=1"], "--seed"),
        (["norm="], "norm=: they have bn, mbn"),
        (["norm.memory=20", "norm=bn"], "norm.memory=20 and norm=bn together"),
    ],
)
def test_filters_that_mean_nothing(filters, says):
    with pytest.raises(UserError) as caught:
        runs(["table4"], [0], filters)
    assert says in str(caught.value)


def test_the_estimate_is_from_records_of_the_same_kind_else_of_the_same_network(tmp_path):
    config = load(["dataset=digits", "batch_size=8", "schedule.iterations=100"])
    (tmp_path / "records").mkdir()

    def write(name, **numbers):
        one = {"config": record.config_for_record(config), "images": 800, "iterations": 100} | numbers
        (tmp_path / "records" / f"{name}.json").write_text(json.dumps(one))

    for seconds in (10.0, 20.0, 90.0):
        write(seconds, seconds=seconds)
    write("trial", seconds=9000.0, iterations=20, images=160)
    write("diverged", seconds=1.0, diverged_at=1)
    for name in ("moved", "moved again", "moved once more"):
        write(name, seconds=1.0, device="cuda: NVIDIA H200, then cpu: AMD EPYC")
    for nonsense in (math.nan, math.inf, -3, "1", None, True, [1], 10**400):
        for key in ("seconds", "iterations", "images"):
            write(f"{key}{str(nonsense)[:9]}", **({"seconds": 9000.0} | {key: nonsense}))
    for name, text in {
        "broken": "{",
        "list": "[]",
        "deep": "[" * 200_000,
        "strange": '{"config": {"model": 1}}',
    }.items():
        (tmp_path / "records" / f"{name}.json").write_text(text)
    estimate = Estimate.read(tmp_path)
    known, like, other = (
        missing_runs.PlannedRun("", load(["dataset=digits", "schedule.iterations=1000", *more]), ())
        for more in (["batch_size=8"], ["norm=bn", "batch_size=16"], ["model=vgg16"])
    )
    assert estimate.seconds(known.config) == pytest.approx(200)
    assert estimate.seconds(like.config) == pytest.approx(400)
    assert estimate.seconds(other.config) is None
    assert [duration(s) for s in (45.4, 720, 12000)] == ["45 s", "12 min", "3 h 20 min"]
    # Those of 100 iterations tell little of 10,000, if there is a longer one of the network.
    write("long", seconds=5000.0, iterations=5000, images=80_000, config=record.config_for_record(like.config))
    long = load(["dataset=digits", "batch_size=8", "schedule.iterations=10000"])
    assert estimate.seconds(long) == pytest.approx(2000)
    assert Estimate.read(tmp_path).seconds(long) == pytest.approx(5000)
    sentence = estimate.sentence([known, like, other], jobs=2)
    assert all(part in sentence for part in ("3 runs", "10 min of training", "5 min with 2", "unknown for 1"))
