"""A fake train.py without torch: it has a lock, a checkpoint, a record and the exit codes, at 0.1 s an iteration."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mbn import config
from mbn.records import record
from mbn.records.sense import RESULTS
from mbn.system import files, signals
from mbn.system.errors import UserError


def train(cfg):
    name = config.run_name(cfg)
    results = Path(cfg.machine.results)
    folder = results / "runs" / name
    if record.path_of(results, name).exists():
        return
    with files.lock(folder / "lock"), signals.Stop() as stop:
        if record.path_of(results, name).exists():  # another process has finished it until this one could lock it
            return
        with (results / "starts").open("a") as file:
            file.write(name + "\n")
        if cfg.schedule.lr == [1e30]:
            raise UserError("no space is left: free some.")
        if cfg.schedule.lr == [1e20]:
            record.write(results, content(cfg) | dict.fromkeys(RESULTS) | {"curves": {}, "diverged_at": 3})
            raise UserError("training diverged: try a smaller schedule.lr.")
        saved = folder / "checkpoint.pt"
        for i in range(int(saved.read_text()) if saved.exists() else 0, config.iterations(cfg)):
            time.sleep(0.1)
            # A test that signals runs holds them here: none can end before the signal.
            while i == 2 and stop.code is None and (results / "hold").exists():
                time.sleep(0.02)
            saved.write_text(str(i + 1))
            if stop.code is not None:
                time.sleep(0.5)  # saving takes a while; a second signal would end it before it has printed
                raise UserError("stopped.", code=stop.code)
        record.write(results, content(cfg))


def content(cfg):
    """A record in which every number is 0 that may be."""
    epochs, batches = divmod(config.iterations(cfg), config.iterations_per_epoch(cfg))
    images = epochs * cfg.dataset.train_images + batches * cfg.batch_size
    return dict.fromkeys(record.FIELDS, 0.0) | {
        "name": config.run_name(cfg),
        "config": record.config_for_record(cfg),
        **dict.fromkeys(("test_error_precise", "parts", "journal", "controls", "diverged_at")),
        "iterations": config.iterations(cfg),
        "images": images,
        **dict.fromkeys(("parameters", "threads"), 1),
        "device": "cpu: Toy",
        "mode": "eager",
        "commit": "c" * 40,
        "dirty": False,
        "code": "c" * 64,
        "versions": {"torch": "2"},
        "curves": {"images": [images], "test_error": [0.0]},
    }


if __name__ == "__main__":
    try:
        train(config.load(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}")
        sys.exit(error.code)
