"""Tests a network: its errors and, once it is trained, its controls (precise statistics, other rules of testing, the
training error in evaluation mode).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mbn.config import Config, iterations, iterations_per_epoch
from mbn.data.in_memory import Batch, Data
from mbn.measure.evaluation import Evaluation, batch_size_for, evaluate
from mbn.measure.other_rules import LAST_BATCHES, Rules, rules
from mbn.measure.precise_bn import take_precise_statistics
from mbn.methods import METHODS
from mbn.norm.as_in_training import kept
from mbn.system.cuda_graph import uncaptured
from mbn.system.processes import ALONE, Processes
from mbn.system.signals import StopRequest
from mbn.training.iteration import autocast
from mbn.training.schedule import scheduled


@dataclass(frozen=True)
class Trained:
    """A network, and what it is tested with; several processes share the images.

    config: of its run. stop: says when to stop. captured: whether the forwards of precise statistics are captured.
    """

    config: Config
    model: nn.Module
    data: Data
    device: torch.device
    stop: StopRequest
    processes: Processes = ALONE
    captured: bool = False

    def controls(self, wanted: Collection[str], steps_done: dict[str, Any] | None = None) -> dict[str, Any]:
        """What `mbn.records.controls.MEASURED` lists under the wanted names. Afterwards the network is what it was,
        with the scheduled values of the end of training.

        steps_done: the results of steps that need not be done again; those that are done now are added to it.
        Errors: StoppedError after a signal.
        """
        change = METHODS[self.config.norm.name].change
        length, training = iterations(self.config), self.model.training
        if change:  # lambda, r_max and d_max as at the end of training
            change.put(self.model, *scheduled(self.config, length - 1, length)["method"])
        self.model.eval()
        steps: dict[str, Callable[[], Any]] = {"precise statistics": self._precise} if "precise" in wanted else {}
        if "rules" in wanted:
            steps |= {"training error": self._train_error, **self._rules()}
        done = {} if steps_done is None else steps_done
        try:
            with (
                autocast(self.device, self.config.precision),
                tqdm(steps, unit="test", leave=False, disable=None) as bar,
            ):
                for name in bar:
                    bar.set_description(name)
                    if name not in done:
                        done[name] = steps[name]()
        finally:
            self.model.train(training)
        found = {name: done[name] for name in steps}
        controls = found.pop("precise statistics", {})
        if "rules" in wanted:
            controls = controls | {"train_error": found.pop("training error"), "rules": found or None}
        return controls

    def evaluation(self) -> Evaluation:
        """Loss and errors on the test images by what the layers remember; the network must be in eval mode.

        Errors: StoppedError after a signal.
        """
        with autocast(self.device, self.config.precision):
            return self._evaluated(self._test())

    def _precise(self) -> dict[str, Any]:
        """The test error with statistics measured again over an epoch of training images, and the population gap.

        The images are augmented as in training, because the weights were trained with the statistics of augmented
        images.
        """
        config = self.config
        epoch = islice(self.data.train_batches(0, config.batch_size), iterations_per_epoch(config))
        with kept(self.model):
            gap = take_precise_statistics(self.model, self._alike(epoch), self.captured)
            return {"test_error_precise": self.evaluation().error, "population_gap": gap}

    def _rules(self) -> Rules:
        length, size = iterations(self.config), self.config.batch_size
        first = max(0, length - LAST_BATCHES)

        def last() -> Iterator[Batch]:
            return self._alike(islice(self.data.train_batches(first, size), length - first))

        found = rules(self.model, size, self._test, self._test_in_batches, last, self.processes)
        return {name: partial(uncaptured, measure, self.device) for name, measure in found.items()}

    def _train_error(self) -> float:
        """Error in percent on the augmented images of the first epoch, which are the same in batches of any size."""
        images = self.config.dataset.train_images
        size = min(images, batch_size_for(self.config, self.device))
        epoch = islice(self.data.train_batches(0, size), -(-images // size))
        return self._evaluated(self._alike(epoch)).error

    def _evaluated(self, batches: Iterable[Batch]) -> Evaluation:
        return uncaptured(lambda: evaluate(self.model, batches, self.processes), self.device)

    def _test(self) -> Iterator[Batch]:
        """The test images, this process's part of them."""
        return self.stop.checked(self.data.test_batches(batch_size_for(self.config, self.device)))

    def _test_in_batches(self, size: int) -> Iterator[Batch]:
        """The test images in their order, in batches of size; of each batch this process's share, as in training."""
        return self._alike(self.data.test_batches(size, each=True))

    def _alike(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, of which all processes have as many."""
        return self.processes.checked(self.stop, batches)
