"""Runs of train.py as real processes: killed, signalled, finished."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from running import COMMIT, UGLY, Run, assert_same_run, outcome, start

from mbn.config import REPOSITORY
from mbn.records import record

pytestmark = pytest.mark.timeout(1200)  # real runs, on a machine that may be busy

# 23 iterations an epoch; the second epoch is not complete.
OVERRIDES = [
    *("dataset=digits", "model=resnet20", "norm=mbn", "batch_size=64", "schedule.iterations=26"),
    *("machine.threads=1", "machine.device=cpu", "machine.checkpoint_seconds=0.05"),
]
SIGNALLED = REPOSITORY / "tests" / "signalled.py"
# After which of its iterations each process gets a signal, and which.
STOPS = {"whole": [], "stopped": [(signal.SIGKILL, 9), (signal.SIGTERM, 6)]}


def train(run, stops):
    """Train to the end, in a process more than there are stops, one after another. Returns how they ended."""
    # From another working directory, with the results under a relative path.
    settings, folder = [*OVERRIDES, f"machine.results={run.results.name}"], run.results.parent
    outcomes = [
        outcome(start(str(number.value), str(iteration), *settings, cwd=folder, program=SIGNALLED))
        for number, iteration in stops
    ]
    return [*outcomes, outcome(start(*settings, cwd=folder))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A whole run and a stopped one in a folder with an ugly name, with the outcomes of their processes."""
    folders = {"whole": "results", "stopped": UGLY}
    runs = [Run(tmp_path_factory.mktemp(name) / folders[name], OVERRIDES) for name in STOPS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STOPS, zip(runs, pool.map(train, runs, STOPS.values()), strict=True), strict=True))


@pytest.fixture
def whole(runs):
    return runs["whole"][0]


def test_a_run_that_was_killed_and_signalled_ends_with_the_bits_of_an_uninterrupted_one(runs, whole):
    run, outcomes = runs["stopped"]
    assert [o.code for o in outcomes] == [-signal.SIGKILL, 75, 0], outcomes
    stopped = re.search(r"^stopped at iteration (\d+) of 26, saved in ", outcomes[1].err, re.MULTILINE)
    resumed = [re.findall(r"resuming at iteration (\d+) of 26", o.out) for o in outcomes]
    assert resumed[0] == []
    assert 0 < int(resumed[1][0]) < 9
    assert int(resumed[1][0]) + 6 == int(resumed[2][0]) == int(stopped[1])
    assert "Traceback" not in outcomes[1].err
    assert_same_run(run, whole)


def test_the_record_of_a_run_is_whole_and_follows_its_name(whole):
    result = record.read(whole.record_path)
    assert result["name"] == whole.name == whole.folder.relative_to(whole.results / "runs").as_posix()
    assert (result["iterations"], result["images"], result["parameters"]) == (26, 1437 + 3 * 64, 269_722)
    assert (result["mode"], result["threads"], result["device"][:5]) == ("eager", 1, "cpu: ")
    assert 0 <= result["test_error_best"] <= result["test_error"] <= 100
    assert min(result["seconds"], result["images_per_second"]) > 0
    assert set(result["versions"]) >= {"mbn", "torch", "python", "numpy"}
    assert (result["commit"], result["dirty"]) == (COMMIT, False)


def test_a_run_says_what_was_reached_where_the_record_is_and_the_tensorboard_command(runs):
    run, (done,) = runs["whole"]
    assert f"test error {run.record()['test_error']:.2f} %" in done.out
    assert f"record: {run.record_path.relative_to(run.results.parent)}\n" in done.out
    assert f"tensorboard --logdir {run.results.name}/runs\n" in done.out
    assert done.err == ""


def test_a_finished_command_run_again_says_so_without_importing_torch(whole, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    done = outcome(start(*OVERRIDES, f"machine.results={whole.results}", cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert done.code == 0, done.err
    assert "finished" in done.out
    assert f"test error {whole.record()['test_error']:.2f} %" in done.out


SCALARS = {
    *("loss/train", "error/train", "loss/test", "error/test", "schedule/learning_rate", "schedule/lambda"),
    *("throughput/images_per_second", "statistics/weight_norm", "statistics/gap_mean", "statistics/gap_log_std"),
    *("statistics/dead_channels", "statistics/dead_layers", "statistics/dead_relus", "within_stages/dead_relus/layer1"),
}


@pytest.mark.parametrize("name", ["whole", "stopped"])
def test_tensorboard_shows_every_row_of_the_journal_once(runs, name):
    points, rows = runs[name][0].points(), runs[name][0].rows()
    assert set(points) >= SCALARS
    for tag, key in (("loss/train", "train_loss"), ("schedule/lambda", "lambda"), ("error/test", "test_error")):
        steps, values = zip(*points[tag], strict=True)
        assert list(steps) == [row["images"] for row in rows if key in row]
        assert list(values) == pytest.approx([row[key] for row in rows if key in row])
    assert rows[-1]["images"] == 1437 + 3 * 64


def test_weight_norms_and_gaps_of_each_layer_are_logged(whole):
    points = whole.points()
    mean, std, weights = (
        {tag.removeprefix(kind) for tag in points if tag.startswith(kind)}
        for kind in ("within_layers/gap_mean/", "within_layers/gap_log_std/", "within_layers/weight_norm/")
    )
    assert mean == std
    assert (len(mean), len(weights)) == (19, 20)
    last, model = whole.rows()[-1], whole.checkpoint()["model"]
    for name, norm in last["weight_norms"].items():
        assert norm == pytest.approx(model[name].double().norm().item(), rel=1e-5)
    assert last["weight_norm"] == pytest.approx(sum(v**2 for v in last["weight_norms"].values()) ** 0.5)
    assert last["gap_mean"] == pytest.approx(sum(last["gap_means"].values()) / 19)


def test_nothing_is_written_beside_the_results(runs):
    for run, _ in runs.values():
        assert [p.name for p in run.results.parent.iterdir()] == [run.results.name]
    assert not list(runs["whole"][0].results.rglob("*.partial"))


def test_the_repository_is_on_the_path_before_what_is_installed(tmp_path):
    """A second worktree runs its own code."""
    (tmp_path / "mbn").mkdir()
    (tmp_path / "mbn" / "__init__.py").write_text("raise ImportError('another mbn')\n")
    done = outcome(start("--cfg", "job", cwd=tmp_path, PYTHONPATH=str(tmp_path)))
    assert done.code == 0, done.err
    assert f"data: {REPOSITORY / 'data'}\n" in done.out
    assert os.fspath(tmp_path) not in done.out
