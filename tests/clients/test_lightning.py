"""Lightning: a callback like the README's, its checkpoints, precisions, processes and averaged weights."""

import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from little import KINDS, differences, loader, network, remembers_in_second, sgd, train, train_accumulating
from torch.multiprocessing import ProcessRaisedException
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from mbn import convert, second_forward, set_lambda, set_precise_statistics, set_renorm
from mbn.norm import base

pytestmark = pytest.mark.clients("lightning")
kinds = pytest.mark.parametrize("kind", KINDS)


class Classifier(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return sgd(self)


# As a callback and not as a hook of the module, which Lightning calls after ModelCheckpoint has saved.
class SecondForward(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):  # after the optimizer's step
        with trainer.precision_plugin.forward_context():  # the autocast of training_step
            second_forward(module.net, batch[0])


@pytest.fixture
def fit(tmp_path):
    def run(module, data, callbacks=(), ckpt_path=None, val=None, **settings):
        if remembers_in_second(module.net):
            callbacks = [SecondForward(), *callbacks]
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        usual = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path}
        kept = {"enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)}
        trainer = lightning.Trainer(callbacks=callbacks, **usual | quiet | kept | settings)
        trainer.fit(module, data, val, ckpt_path=ckpt_path)
        return module

    return run


@kinds
def test_training_equals_the_plain_loop_to_the_bit(kind, fit, figure):
    module = fit(Classifier(network(kind)), loader())
    assert differences(module.net, train(network(kind))) == 0
    figure("difference 0 after 6 iterations")


def test_manual_optimisation_equals_the_plain_loop_to_the_bit(fit, figure):
    class Manual(Classifier):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()

    module = fit(Manual(network()), loader())
    assert differences(module.net, train(network())) == 0
    figure("difference 0 after 6 iterations")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning's, which is meant here
@kinds
def test_a_resumed_run_has_the_lambda_and_the_bits_of_an_uninterrupted_one(kind, fit, figure, tmp_path):
    begun = Classifier(network(kind))
    if "mbn" in kind:
        set_lambda(begun, 0.9)
    if "brn" in kind:
        set_renorm(begun, 2, 3)
    saving = {"filename": "{step}", "every_n_train_steps": 6, "save_top_k": -1}
    whole = fit(begun, loader(), [ModelCheckpoint(tmp_path / "whole", **saving)], max_epochs=2)
    resumed = Classifier(network(kind))  # with the settings of the first iteration
    there, again = tmp_path / "whole" / "step=6.ckpt", ModelCheckpoint(tmp_path / "resumed", **saving)
    fit(resumed, loader(), [again], ckpt_path=there, max_epochs=2)
    assert differences(resumed.net, whole.net) == 0
    layer = resumed.net[1]
    if "mbn" in kind:
        assert layer.lam == 0.9
    if "brn" in kind:
        assert (layer.r_max, layer.d_max) == (2, 3)
    figure("lambda 0.9, r_max 2, d_max 3; difference 0 after 12 iterations")


def test_the_second_forward_has_the_autocast_of_the_training_step(fit, figure):
    module, plain = fit(Classifier(network()), loader(), precision="bf16-mixed"), network()
    optimizer = sgd(plain)
    for images, labels in loader():
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(plain(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            second_forward(plain, images)
    assert differences(module.net, plain) == 0
    assert differences(module.net, train(network())) > 0
    figure("difference 0 after 6 iterations in bf16-mixed")


def test_a_network_cast_to_bfloat16_keeps_float32_statistics(fit, figure):
    module = fit(Classifier(network()), loader(), precision="bf16-true")
    dtypes = {name: value.dtype for name, value in module.net[1].state_dict().items()}
    assert dtypes.pop("weight") == dtypes.pop("bias") == torch.bfloat16
    assert set(dtypes.values()) == {torch.float32}
    assert module.net[1].running_mean.abs().max() > 0
    figure(f"{len(dtypes)} statistics in float32")


def test_gradient_accumulation_remembers_after_the_step(fit, figure, monkeypatch):
    class AfterSteps(SecondForward):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    monkeypatch.setitem(globals(), "SecondForward", AfterSteps)
    module, plain = fit(Classifier(network()), loader(), accumulate_grad_batches=2), train_accumulating(network())
    assert differences(module.net, plain) == 0
    figure("difference 0 after 3 steps of 2 batches")


def test_a_forgotten_second_forward_is_said_at_the_validation(fit, figure, monkeypatch):
    class Validating(Classifier):
        def validation_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    base.warn_once.cache_clear()
    with warnings.catch_warnings(action="error", category=UserWarning):
        fit(Validating(network()), loader(), val=loader())
    monkeypatch.setitem(globals(), "SecondForward", lightning.Callback)
    with pytest.warns(UserWarning, match=r"call second_forward\(model, inputs\) after each optimizer.step\(\)"):
        fit(Validating(network()), loader(), val=loader())
    base.warn_once.cache_clear()
    figure("one warning; none where it was not forgotten")


def test_two_processes_with_sync_batchnorm_are_told_that_it_passes_over_the_layers(fit, figure):
    """sync_batchnorm=True exchanges torch's BatchNorm alone."""
    base.warn_once.cache_clear()
    with pytest.raises(ProcessRaisedException, match=r"convert\(model, sync=True\) takes them over all processes"):
        fit(Classifier(network()), loader(), devices=2, strategy="ddp_fork", sync_batchnorm=True)
    figure("a warning at the first iteration names convert(model, sync=True)")


@kinds
def test_two_processes_with_sync_equal_one_process_on_the_joint_batch(kind, fit, figure):
    class Half(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [each[self.global_rank :: 2] for each in batch]

    together = Half(convert(network(None), sync=True, **KINDS[kind]).double())
    two = {"devices": 2, "strategy": "ddp_fork", "sync_batchnorm": True, "use_distributed_sampler": False}
    fit(together, loader(8, torch.float64), **two)
    difference = differences(together.net, train(network(kind).double(), loader(8, torch.float64)))
    assert difference < 1e-12
    figure(f"{difference:.1e} after 3 iterations in float64")


def test_its_average_of_weights_equals_torchs_in_the_plain_loop(fit, figure):
    module = fit(Classifier(network()), loader(), [EMAWeightAveraging(decay=0.5)])
    net = network()
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.5), use_buffers=True)
    optimizer = sgd(net)
    for batch in loader():
        train(net, [batch], optimizer)
        average.update_parameters(net)
    assert differences(module.net, average.module) == 0
    figure("difference 0 after 6 iterations")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_network_that_fabric_has_set_up_equals_the_plain_loop(precision, figure):
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    net, plain = network(), network()
    model, optimizer = fabric.setup(net, sgd(net))
    for images, labels in loader():
        fabric.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
        second_forward(model, images)
    optimizer = sgd(plain)
    for images, labels in loader():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = plain(images)
        F.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            second_forward(plain, images)
    assert differences(net, plain) == 0
    figure("difference 0 after 6 iterations")


def test_precise_statistics_are_those_of_stochastically_averaged_weights(fit, figure):
    """StochasticWeightAveraging takes the statistics again for torch's BatchNorm alone."""
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    net = fit(Classifier(network()), loader(), [average], max_epochs=4).net
    with torch.no_grad():
        expected = net[0](torch.cat([images for images, _ in loader()])).mean((0, 2, 3))
    before = float((net[1].running_mean - expected).abs().max())
    set_precise_statistics(net, loader())
    after = float((net[1].running_mean - expected).abs().max())
    assert after < 1e-5 < 0.1 < before
    figure(f"a mean {before:.2g} off before, {after:.0e} after set_precise_statistics")
