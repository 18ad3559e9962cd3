"""`train.py` with the small network, slow enough to be killed between iterations, for torchrun.

SIGNALLED, of the environment, may be "NUMBER RANK ITERATION WHOM": at the end of its ITERATION-th iteration the process
of that rank sends the signal to itself ("self") or to its launcher ("parent"), and goes on once it has noticed that.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path

from mbn.system.processes import end, from_environment


def main(results, *overrides):
    from_environment()  # as in train.py before torch is imported: it notes who the launcher is
    import running

    import models
    import train
    from mbn.system import signals
    from mbn.training import run
    from mbn.training.iteration import Update

    rank, parent, asked, iterations = os.environ["RANK"], os.getppid(), threading.Event(), itertools.count(1)
    number, *moment, whom = os.environ["SIGNALLED"].split() or ["", ""]
    answer = signals.Stop._answer
    signals.Stop._answer = lambda *given: (answer(*given), asked.set())

    def slowly(self, *args):
        original(self, *args)
        time.sleep(0.02)
        iteration = next(iterations)
        if iteration == 1:
            (Path(results) / "policies" / rank).write_text(json.dumps(policies()))
        if moment == [rank, str(iteration)]:
            (Path(results) / "signalled").touch()
            os.kill(os.getpid() if whom == "self" else parent, int(number))
            while os.getppid() == parent and not asked.is_set():
                time.sleep(0.01)

    models.build = lambda *, layers, classes, **_: running.Small(layers, classes)
    run.SAVES_APART = 0.0
    original, Update.__call__ = Update.__call__, slowly
    (Path(results) / "pids" / rank).write_text(str(os.getpid()))
    return train.main([f"machine.results={results}", *overrides])


def policies():
    """How the main thread and gloo's are scheduled."""
    found = {"main": os.sched_getscheduler(os.getpid()), "gloo": []}
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if "gloo" in (thread / "comm").read_text():
                found["gloo"].append(os.sched_getscheduler(int(thread.name)))
    return found


if __name__ == "__main__":
    end(main(*sys.argv[1:]))
