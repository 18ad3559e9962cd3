"""Runs that are killed with SIGKILL, at chosen places and random moments, end with the bits of an unbroken run."""

import collections
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from killing import PLACES, state
from running import Run, fingerprint

from mbn.training import checkpoint_file

# Real images; 23 iterations an epoch, the last one smaller; two epochs and a half.
BASE = ["dataset=digits", "batch_size=64", "machine.threads=1", "machine.device=cpu", "evaluate.batch_size=100"]
LENGTH, EPOCH = 56, 23
# A checkpoint in about every iteration, or only at an epoch's end.
SAVES = ["machine.checkpoint_seconds=0.01", "machine.checkpoint_seconds=300"]
COMPOSING = threading.Lock()  # Hydra is not thread-safe
RECORDING = ("half a record", "record written")


class Kill(NamedTuple):
    """place: one of PLACES, reached at or after iteration `at`; None: a random moment, `at` seconds into training."""

    place: str | None
    at: float


def plan(draw, seconds, kills):
    """A list of that many kills of one run, in the order in which they can come."""
    aimed = [p for p in PLACES if p not in RECORDING]
    draw.shuffle(aimed)
    places = [*itertools.islice(itertools.cycle(aimed), kills - kills // 3 - 1), *[None] * (kills // 3)]
    draw.shuffle(places)
    moments = sorted(draw.randrange(LENGTH) for _ in places)
    plan = [
        Kill(place, moment if place else draw.uniform(0, seconds / 3))
        for place, moment in zip(places, moments, strict=True)
    ]
    return [*plan, Kill(draw.choice(RECORDING), -1)]


def job(run, overrides):
    return {"job": "train", "network": "small", "overrides": [*overrides, f"machine.results={run.results}"]}


class Killed:
    """Trains one configuration many times, each time killed by a plan, and counts the kills that a run survived."""

    def __init__(self, forker, folder, overrides):
        self.forker, self.folder = forker, folder
        self.overrides = [*BASE, f"schedule.iterations={LENGTH}", *overrides]
        self.hits = collections.Counter()
        self.last_epoch = 0
        self.wrong = []
        whole, train = self._run("whole", SAVES[1])
        ended = self.forker.run(**train)
        assert ended.code == 0, ended
        self.seconds = ended.seconds
        self.expected = result(whole)

    def _run(self, name, saves):
        """What a run leaves, and the job that trains it."""
        with COMPOSING:
            run = Run(self.folder / name, [*self.overrides, saves])
        return run, job(run, [*self.overrides, saves])

    def once(self, number, kills, planned=None):
        """Kill one run that many times, or as planned; return how many kills came, and how many of them it survived."""
        draw = random.Random(f"{self.overrides} {number}")
        run, train = self._run(f"run{number}", SAVES[number % 2])
        done = 0
        # A run may end before a kill of its plan comes. Another run gets the rest.
        for kill in planned or plan(draw, self.seconds, kills):
            if kill.place:
                ended = self.forker.run(**train, place=kill.place, at=kill.at, seed=draw.randrange(1 << 30))
            else:
                ended = self.forker.run(**train, after=kill.at, once=run.folder / "config.yaml")
            if ended.code == 0:
                break
            assert ended.code == -9, ended
            done += 1
            self.hits[kill.place or "at a random moment"] += 1
            self.last_epoch += reached(run) > 2 * EPOCH
        ended = self.forker.run(**train)
        assert ended.code == 0, ended
        if result(run) != self.expected:
            self.wrong.append(run.name)
            return done, 0
        assert not list(run.results.rglob("*.partial"))
        return done, done

    def all(self, kills, each):
        """Kill runs until there were that many kills; return how many the runs survived."""
        done = survived = 0
        for number in itertools.count():
            if done >= kills:
                return survived
            counted, right = self.once(number, min(each, kills - done))
            done, survived = done + counted, survived + right

    def remarks(self):
        hits = ", ".join(f"{n} {place}" for place, n in self.hits.most_common())
        return f"{hits}; {self.last_epoch} in the last epoch"


def reached(run):
    path = run.checkpoint_path if run.checkpoint_path.exists() else checkpoint_file.previous(run.checkpoint_path)
    return checkpoint_file.read(path)["iteration"] if path.exists() else 0


def result(run):
    """The fingerprint of a run without the configuration in its record, which says how often to save."""
    original = run.record()
    run.record = lambda: original | {"config": None}
    return fingerprint(run)


def test_a_run_killed_once_at_each_place_ends_with_the_bits_of_a_whole_one(forkers, tmp_path):
    killed = Killed(forkers[0], tmp_path, ["norm=mbn", "norm.memory=5"])
    kills = [Kill(place, -1 if place in RECORDING else 5 * i) for i, place in enumerate(PLACES)]
    assert killed.once(0, len(kills), kills) == (len(PLACES), len(PLACES))
    assert set(killed.hits) == set(PLACES)


@pytest.mark.long("1", "Kills of MBN with two forwards after which the run ended with the same SHA-256 (eager)")
def test_hundred_kills_of_mbn(forkers, tmp_path, count, figure):
    kills = count(100)

    def half(side):
        (tmp_path / str(side)).mkdir()
        killed = Killed(forkers[side], tmp_path / str(side), ["norm=mbn", "norm.memory=5", f"seed={side}"])
        return killed.all((kills + side) // 2, 10), killed

    with ThreadPoolExecutor(2) as pool:
        sides = list(pool.map(half, (0, 1)))
    both = sides[0][1]
    both.hits += sides[1][1].hits
    both.last_epoch += sides[1][1].last_epoch
    figure(sum(survived for survived, _ in sides), kills, both.remarks())


@pytest.mark.long("1", "Kills after which the run ended with the same SHA-256: {overrides}")
@pytest.mark.parametrize(
    "overrides",
    ["norm=bn", "norm=bn forwards=2", "norm=brn", "norm=mbn norm.gradient=batch", "norm=mbn machine.mode=compile"],
)
def test_ten_kills_of_the_others(forkers, tmp_path, count, figure, overrides):
    killed = Killed(forkers[0], tmp_path, overrides.split())
    kills = count(10)
    figure(killed.all(kills, 10), kills, killed.remarks())


# Inside a save.


def kill_saves(forker, path, kills, size, draw):
    """Kill that many saves, half at a call or return inside one, half at a random moment; return how many survived."""
    last = survived = 0
    checkpoint_file.save(state(0, size), path)
    for number in range(kills):
        job = {"job": "save", "path": str(path), "at": last, "size": size}
        if number % 2:
            ended = forker.run(**job, nth=draw.choice([draw.randint(1, 1500), draw.randint(1, 200)]))
        else:
            before = path.stat().st_mtime_ns if path.exists() else 0
            ended = forker.run(**job, after=draw.uniform(0, 0.05), once=Changed(path, before))
        assert ended.code == -9, ended
        found = checkpoint_file.newest(path)
        whole = found is not None and found["iteration"] >= last and not list(path.parent.glob("*damaged*"))
        whole = whole and (found["weights"] == found["iteration"]).all().item() and len(found["weights"]) == size
        survived += bool(whole)
        last = found["iteration"] if found else 0
        for partial in path.parent.glob("*.partial"):
            partial.unlink()
    return survived


class Changed(NamedTuple):
    """Acts as a file that exists once path has been written again."""

    path: object
    before: int

    def exists(self):
        try:
            return self.path.stat().st_mtime_ns != self.before
        except FileNotFoundError:  # between the renames
            return True


def test_kills_inside_a_save_leave_a_readable_state(forkers, tmp_path):
    assert kill_saves(forkers[0], tmp_path / "checkpoint.pt", 20, 100_000, random.Random(0)) == 20


@pytest.mark.long("2", "Kills inside a save that left a readable, right state, the newest or the one before")
def test_500_kills_inside_a_save(forkers, tmp_path, count, figure):
    kills = count(500)
    survived = kill_saves(forkers[0], tmp_path / "checkpoint.pt", kills, 300_000, random.Random(1))
    figure(survived, kills, "half at a call or return inside the save, half at random moments; 1.2 MB a file")


# The same command twice.


def same_twice(forkers, folder, overrides):
    """Whether two processes that train the same end with the same SHA-256."""
    sums = set()
    for number, forker in enumerate(forkers):
        settings = [*BASE, f"schedule.iterations={LENGTH}", *overrides]
        run = Run(folder / str(number), settings)
        ended = forker.run(**job(run, settings))
        assert ended.code == 0, ended
        sums.add(fingerprint(run))
    return len(sums) == 1


def test_the_same_command_twice_gives_the_same_sha(forkers, tmp_path):
    assert same_twice(forkers, tmp_path, ["norm=mbn"])


@pytest.mark.long("9", "Methods and modes of which the same command twice gave the same SHA-256 of all but timing")
def test_every_method_and_mode_twice(forkers, tmp_path, count, figure):
    norms = ["norm=mbn", "norm=mbn forwards=1", "norm=mbn norm.gradient=batch", "norm=brn", "norm=bn", "norm=gn"]
    cases = [*norms, "norm=mbn precision=bf16", "norm=mbn machine.mode=compile", "norm=bn machine.mode=compile"]
    cases = cases[: count(len(cases))]
    same = [same_twice(forkers, tmp_path / str(i), case.split()) for i, case in enumerate(cases)]
    figure(sum(same), len(cases), ", ".join(c for c, s in zip(cases, same, strict=True) if not s))
