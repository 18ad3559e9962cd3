"""Records with fitting checksums that cannot be true, made from one that could be."""

import copy
import functools
import math

from mbn.records import record

# Values by the kind of field; each kind has those of ANY too.
ANY = [True, "8", "", [], {}, [[8]], {"a": 1}, math.nan, math.inf, -math.inf]
NUMBER = [*ANY, None, -3, -0.01, 10**400, 1e300]
PERCENT = [*NUMBER, 250, 100.01, 8.0001]
WHOLE = [*NUMBER, 0, 1.5, 10, 78_199]
TEXT = [True, None, 8, [], {}, "", "\x1b[2J", "a\nb", "\ud800"]
HASH = [*TEXT, "0" * 63, "G" * 64, "0" * 65]
OF_FIELDS = {
    **{key: [*PERCENT, 99.0] for key in ("test_error", "test_error_best", "test_error_top5")},
    "test_error_precise": [value for value in PERCENT if value is not None],
    "train_error": [value for value in PERCENT if value != 8.0001],
    "train_loss": [value for value in NUMBER if value != 1e300],
    **dict.fromkeys(("seconds", "images_per_second"), NUMBER),
    "test_loss": [*(value for value in NUMBER if value is not None), 7.7],
    **dict.fromkeys(("iterations", "images"), WHOLE),
    **{key: [value for value in WHOLE if value not in (10, 78_199)] for key in ("parameters", "threads")},
    "device": TEXT,
    "mode": [*TEXT, "auto", "fast"],
    "commit": [value for value in [*HASH, "abcdef", "main"] if value is not None],
    "dirty": ["true", 0, 1, "", [], {}],
    "code": [value for value in HASH if value is not None],
    "versions": [*TEXT, {"torch": 2}, {"torch": None}, {"torch": "\x1b"}, {"\x1b": "2"}, ["torch"]],
    "date": [*TEXT, 20261126, "yesterday", "2026-13-01T00:00:00+00:00", "2026-11-26", "2026-11-26T00:00:00", 1e9],
    "curves": [*TEXT, [1], {"images": [8]}],
    "name": TEXT,
    "config": [*TEXT, [1]],
    "version": [True, 3.0, "3", 0, -1, 99, None, [], {}],
}
# Of a curve in percent, and of any other.
POINTS = [None, [], {}, 8, "8", True, [[1]], "none", "nan", "text", "bool", "null", "negative", "short", "long", "last"]
OF_SETTINGS = {
    "config.dataset.train_images": ["50000", "${oc.env:HOME}", True, None, [50000], -1],
    "config.dataset.std": [[True, 1, 1], "1", [1, 1], [math.nan] * 3],
    "config.batch_size": ["8", 8.5, True, None, {}, "???"],
    "config.seed": ["0", 1, -1, "${oc.env:HOME}", [[0]]],
    "config.model.name": ["${oc.env:HOME}", None, 5, "resnet56", ["nin"], {}],
    "config.norm": [None, [], "bn", {}, {"name": "mbn", "memory": "20"}],
    "config.schedule.lr": [[[0.1]], ["0.1"], "0.1", [math.inf], None, {}],
    "config.machine": [None, [], "cpu"],
    "config.machine.threads": ["1", True, 1.5],
    "config.machine.again": ["false", 0, None],
    "config.more": [1],
}


def nonsense(sound):
    """What is wrong, and a record with it, for one record that is sound."""
    for key, values in OF_FIELDS.items():
        for value in values:
            yield signed(sound, f"{key}: {value!r:.40}", key, value)
    for key, values in OF_SETTINGS.items():
        for value in values:
            yield signed(sound, f"{key}: {value!r}", key, value)
    for key in (*sound["curves"], "training.images", "training.loss", "training.error"):
        if key != "training":
            for kind in POINTS:
                # The last training loss and error need not be those of the last epoch.
                if kind != "last" or key in ("images", "test_error", "test_loss", "training.images"):
                    points = functools.reduce(dict.__getitem__, key.split("."), sound["curves"])
                    yield signed(sound, f"curves.{key}: {kind!r}", f"curves.{key}", spoiled(points, kind))
    points = sound["curves"]["images"]
    yield signed(sound, "curves.images: falls", "curves.images", [points[1], points[0], *points[2:]])
    yield signed(sound, "curves: unknown", "curves.unknown", points)
    yield signed(sound, "curves.training: text", "curves.training", "text")
    yield signed(sound, "a field too many", "more", 1)
    yield signed(sound, "the best below no epoch", "curves.test_error", [0.01, *sound["curves"]["test_error"][1:]])


def signed(sound, what, key, value):
    """What is wrong, and the sound record with one value changed and a checksum that fits."""
    made = copy.deepcopy(sound)
    *parents, last = key.split(".")
    functools.reduce(dict.__getitem__, parents, made)[last] = value
    made["checksum"] = record.checksum(made)
    return what, made


def spoiled(points, kind):
    """A curve with one thing wrong; a kind that is no text of those below is what stands in its place."""
    wrong = {"none": None, "nan": math.nan, "text": "8", "bool": True, "negative": -1, "null": {}}
    if kind == "short":
        return points[:-1]
    if kind == "long":
        return [*points, points[-1]]
    if kind == "last":
        return [*points[:-1], points[-1] + 1]
    return [wrong[kind], *points[1:]] if isinstance(kind, str) and kind in wrong else kind
