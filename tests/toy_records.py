"""Toy records with the configurations of real cells."""

from mbn.config import iterations, iterations_per_epoch, run_name
from mbn.records import record
from mbn.records.sense import RESULTS
from mbn.tables.cells import AllRuns, Table

EPOCHS = tuple(range(1, 101))


def images_of(config):
    """The images that a whole run sees."""
    epochs, batches = divmod(iterations(config), iterations_per_epoch(config))
    return epochs * config.dataset.train_images + batches * config.batch_size


def curves_of(config, test_error, train_error, bump, fall):
    """A hundred points: the test error falls by `fall`, the training error rises by `bump` at 60 % of training."""
    images = images_of(config)
    points = [images * i // 100 for i in EPOCHS]
    late = [i > 60 for i in EPOCHS]
    return {
        "images": points,
        "train_error": [train_error + bump * (i == 61) + 30 / i for i in EPOCHS],
        "train_loss": [0.1] * 100,
        "test_error": [float(f"{test_error + (0 if after else fall):.5g}") for after in late],
        "test_loss": [0.2] * 100,
        "gap_mean": [1 / i for i in EPOCHS],
        "gap_std": [0.5 / i for i in EPOCHS],
        "weight_norm": [10 + i / 10 for i in EPOCHS],
        "training": {
            "images": [images * i // 200 for i in range(1, 201)],
            "loss": [2 / i for i in range(1, 201)],
            "error": [60 / i for i in range(1, 201)],
        },
    }


def table(grid, records, **asked):
    """A table whose grid is the only one."""
    return Table(grid, AllRuns((grid,), records, **asked))


def write(results, cell, seed, test_error, scale=1.0, train_error=1.0, bump=0.0, fall=0.0, **fields):
    """Write one record of a cell, with other fields as they are given, and return its path."""
    config = cell.config(seed, scale)
    curves = curves_of(config, test_error or 0.0, train_error or 0.0, bump, fall)
    part = {
        **{"from": 0, "device": "cuda: Toy", "cpu_capability": "AVX2", "threads": 2, "mode": "eager", "tf32": True},
        **{"deterministic": False, "code": "0" * 64, "commit": "0123456789" * 4, "dirty": False},
        **{"versions": {"torch": "2.11"}, "data": "2" * 64},
    }
    content = {
        "name": run_name(config),
        "config": record.config_for_record(config),
        "test_error": test_error,
        "test_error_best": test_error,
        "train_error": train_error,
        "test_error_top5": test_error,
        "test_error_precise": None,
        "test_loss": 0.2,
        "train_loss": 0.1,
        "iterations": iterations(config),
        "images": curves["images"][-1],
        "parameters": 1,
        "seconds": 1800.0,
        "images_per_second": 1.0,
        "device": "cuda: Toy",
        "mode": "eager",
        "threads": 2,
        "commit": "0123456789" * 4,
        "dirty": False,
        "code": "0" * 64,
        "versions": {"torch": "2.11"},
        "parts": [part],
        "journal": "1" * 64,
        "diverged_at": None,
        "curves": curves,
        "controls": None,
    }
    record.write(results, content | fields)
    return record.path_of(results, content["name"])


def write_diverged(results, cell, seed, at, scale=1.0, **fields):
    """Write the record of a run of a cell that diverged at an iteration, and return its path."""
    nothing = dict.fromkeys(key for key in RESULTS if key not in ("test_error", "train_error"))
    gone = {**nothing, "test_error_best": None, "curves": {}, "diverged_at": at}
    return write(results, cell, seed, None, scale, None, **gone, **fields)
