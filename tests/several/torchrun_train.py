"""`train.py` with the small network, slow enough to be killed between iterations, for torchrun."""

import os
import sys
import time
from pathlib import Path

from mbn.system.processes import from_environment


def main(results, *overrides):
    from_environment()  # as in train.py before torch is imported: it notes who the launcher is
    import running
    import several_runs

    import models
    import train
    from mbn.training import run
    from mbn.training.iteration import Update

    def slowly(self, *args):
        original(self, *args)
        time.sleep(0.02)

    models.build = lambda *, layers, classes, **_: running.Small(layers, classes)
    run.SAVES_APART = 0.0
    original, Update.__call__ = Update.__call__, slowly
    (Path(results) / "pids" / os.environ["RANK"]).write_text(str(os.getpid()))
    return train.main([*several_runs.RUN, f"machine.results={results}", *overrides])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
