"""transformers: networks of one's own as a PreTrainedModel, its ResNet converted, and its Trainer."""

import pytest
import torch
import torch.nn.functional as F
from little import differences, loader, network, sgd, train
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mbn import (
    BatchRenorm1d,
    MemorizedBatchNorm2d,
    convert,
    second_forward,
    set_lambda,
    set_renorm,
    to_batch_norm,
)
from mbn.norm.base import norm_layers

pytestmark = pytest.mark.clients("transformers")


class LittleConfig(PretrainedConfig):
    model_type = "little"


class Little(PreTrainedModel):
    """A network with layers of two norms, written with them."""

    config_class = LittleConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = MemorizedBatchNorm2d(4, memory=3, lam=0.5)
        self.maps = nn.Linear(100, 6, bias=False)
        self.renorm = BatchRenorm1d(6, momentum=0.3, r_max=1.5, d_max=1.0, forwards=2)
        self.classes = nn.Linear(6, 4)
        self.post_init()

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        return self.classes(F.relu(self.renorm(self.maps(x.flatten(1)))))


def test_a_saved_and_loaded_network_has_its_settings_and_trains_as_before(figure, tmp_path):
    net = Little(LittleConfig())
    set_lambda(net, 0.9)
    set_renorm(net, 2.5, 3.5)
    train(net).save_pretrained(tmp_path)
    loaded, report = Little.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (loaded.norm.lam, loaded.renorm.r_max, loaded.renorm.d_max) == (0.9, 2.5, 3.5)
    assert differences(loaded, net) == 0
    assert differences(train(loaded), train(net)) == 0
    figure("lambda 0.9, r_max 2.5, d_max 3.5; difference 0 after 6 iterations more")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_loaded_in_half_precision_statistics_stay_in_float32(dtype, figure, tmp_path):
    net = train(Little(LittleConfig()))
    net.save_pretrained(tmp_path)
    half = Little.from_pretrained(tmp_path, dtype=dtype).train()
    assert half.norm.weight.dtype == half.conv.weight.dtype == dtype
    for ours, theirs in ((half.norm, net.norm), (half.renorm, net.renorm)):
        for name, buffer in ours.named_buffers():
            assert torch.equal(buffer, theirs.get_buffer(name))
    images = next(iter(loader()))[0].to(dtype)
    assert half(images).isfinite().all()
    second_forward(half, images)
    figure("the statistics have the bits of before")


def resnet_config():
    return ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=4
    )


class Logits(nn.Module):
    """The network as one whose output are the logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).logits


def images(n=4):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_a_resnet_of_the_library_converts_with_the_same_outputs_and_comes_back(figure, tmp_path):
    net = ResNetForImageClassification(resnet_config()).train()
    for _ in range(3):
        net(images())
    expected = net.eval()(images()).logits
    converted = convert(net)
    assert len(norm_layers(converted)) == 8
    difference = float((converted(images()).logits - expected).detach().abs().max())
    assert difference < 1e-6
    model = Logits(converted)
    train(model, [(images(), torch.tensor([0, 1, 2, 3]))] * 3)
    plain = to_batch_norm(converted.eval())
    plain.save_pretrained(tmp_path)
    again = ResNetForImageClassification.from_pretrained(tmp_path)
    back = float((again(images()).logits - converted(images()).logits).detach().abs().max())
    assert back < 1e-5
    figure(f"8 layers; {difference:.1g} apart after convert, {back:.1g} back in their own class")


class ConvertedResNet(ResNetForImageClassification):
    def __init__(self, config):
        super().__init__(config)
        convert(self, memory=3)


def test_a_class_that_converts_itself_is_loaded_and_trains_as_before(figure, tmp_path):
    net = ConvertedResNet(resnet_config())
    set_lambda(net, 0.9)
    data = [(images(), torch.tensor([0, 1, 2, 3]))] * 3
    train(Logits(net), data)
    net.save_pretrained(tmp_path)
    loaded, report = ConvertedResNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert {layer.lam for layer in norm_layers(loaded)} == {0.9}
    assert differences(train(Logits(loaded), data), train(Logits(net), data)) == 0
    figure("lambda 0.9; difference 0 after 3 iterations more")


def test_pretrained_weights_are_loaded_first_and_converted_then(figure, tmp_path):
    pretrained = ResNetForImageClassification(resnet_config()).train()
    for _ in range(3):
        pretrained(images())
    pretrained.save_pretrained(tmp_path)
    net = convert(ResNetForImageClassification.from_pretrained(tmp_path)).train()
    expected = convert(pretrained).train()
    assert all(layer.memory_weight < 0 for layer in norm_layers(net))  # as batches of a size not known yet
    data = [(images(), torch.tensor([0, 1, 2, 3]))] * 3
    assert differences(train(Logits(net), data), train(Logits(expected), data)) == 0
    figure("difference 0 after 3 iterations")


def test_a_batch_norms_file_in_a_class_that_converts_itself_is_reported_as_missing_keys(figure, tmp_path):
    """transformers sets tensors on its own and leaves the missing ones without values: load first, and convert then."""
    ResNetForImageClassification(resnet_config()).save_pretrained(tmp_path)
    _, report = ConvertedResNet.from_pretrained(tmp_path, output_loading_info=True)
    missing = {name.rpartition(".")[2] for name in report["missing_keys"]}
    assert missing == {"memory_mean", "memory_var", "memory_count", "memory_weight", "lam_tensor"}
    figure("its report names the memory and lambda")


def test_the_trainer_equals_the_plain_loop_to_the_bit(figure, tmp_path):
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, images, labels):
            return {"loss": F.cross_entropy(self.net(images), labels)}

    class Keeping(Trainer):
        def training_step(self, model, inputs, *args):
            self.batch = inputs
            return super().training_step(model, inputs, *args)

    class SecondForward(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            second_forward(model, **trainer.batch)

    model = Loss()
    plain = {"lr_scheduler_type": "constant", "max_grad_norm": 0}
    settings = TrainingArguments(tmp_path, num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True, **plain)
    trainer = Keeping(model, settings, optimizers=(sgd(model), None), callbacks=[SecondForward()])
    trainer.get_train_dataloader = lambda: [{"images": x, "labels": y} for x, y in loader()]
    trainer.train()
    assert differences(model.net, train(network())) == 0
    figure("difference 0 after 6 iterations")
