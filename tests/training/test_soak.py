"""Two hundred thousand iterations: nothing grows, and no measurement is missing."""

import json
import re
from pathlib import Path

import pytest
from running import Run

from mbn.config import iterations, iterations_per_epoch

# At this gradient and learning rate the weights of a small batch do not drift, however long it trains.
OVERRIDES = ["dataset=digits", "batch_size=4", "norm.memory=5", "norm.gradient=batch", "schedule.lr=[0.01]"]
OVERRIDES += ["machine.threads=1", "machine.device=cpu"]


def complete(run, samples):
    """What is wrong with a run's files and its process's samples; an empty list where all is well."""
    length, per_epoch = iterations(run.config), iterations_per_epoch(run.config)
    step = 50  # a tenth of an epoch, which is 36 here, waits for the losses to be read
    due = [t for t in range(1, length + 1) if t % per_epoch == 0 or t == length or t % per_epoch % step == 0]
    rows = run.rows()
    wrong = [] if [row["iteration"] for row in rows] == due else [f"{len(rows)} rows, not {len(due)}"]
    points = run.points()
    for tag, key in (("loss/train", "train_loss"), ("error/test", "test_error"), ("schedule/lambda", "lambda")):
        if [s for s, _ in points[tag]] != [row["images"] for row in rows if key in row]:
            wrong.append(f"{tag} is not complete")
    if run.record()["iterations"] != length:
        wrong.append("no record")
    warm = [s for s in samples if s["iteration"] >= length / 10]
    rss = [s["rss"] for s in warm]
    if max(rss) > 1.02 * rss[0]:
        wrong.append(f"memory went from {rss[0]} to {max(rss)} bytes")
    if len({s["files"] for s in warm}) != 1:
        wrong.append(f"{sorted({s['files'] for s in warm})} open files")
    return (
        wrong,
        f"{rss[0] / 1e6:.1f} MB after a tenth, {max(rss) / 1e6:.1f} MB at most later; {warm[0]['files']} files",
    )


def soak(forker, folder, length):
    overrides = [*OVERRIDES, f"schedule.iterations={length}"]
    run = Run(folder / "results", overrides)
    samples = folder / "samples.jsonl"
    ended = forker.run(
        job="soak",
        network="tiny",
        overrides=[*overrides, f"machine.results={run.results}"],
        samples=str(samples),
        every=length // 200,
    )
    assert ended.code == 0, ended.text[-2000:]
    return complete(run, [json.loads(line) for line in samples.read_text().splitlines()])


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


@needs_proc
def test_a_short_soak(forkers, tmp_path):
    """Without the check of memory, which still grows at the start: the long test has it."""
    wrong, _ = soak(forkers[0], tmp_path, 1000)
    assert not [w for w in wrong if not re.match("memory went", w)]


@needs_proc
@pytest.mark.long("10", "Iterations of a tiny network with flat memory (2 %), no more open files, complete logs")
def test_200_000_iterations(forkers, tmp_path, count, figure):
    length = count(200_000)
    wrong, remarks = soak(forkers[0], tmp_path, length)
    figure(0 if wrong else length, length, "; ".join([*wrong, remarks]))
