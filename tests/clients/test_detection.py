"""Detection and segmentation of torchvision: heads on several scales, losses in training mode, pooling to one pixel."""

import pytest
import torch
from little import sgd
from torch import nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from mbn import convert, second_forward
from mbn.norm.base import norm_layers

pytestmark = pytest.mark.clients("torchvision")
NONE = {"weights": None, "weights_backbone": None}


def targets(size):
    box = torch.tensor([[4.0, 4.0, size / 2, size / 2]])
    return {"boxes": box, "labels": torch.tensor([1])}


@pytest.mark.parametrize("norm", ["mbn", "brn", "bn"])
def test_a_detector_trains_on_two_images_and_evaluates(norm, figure):
    net = fasterrcnn_mobilenet_v3_large_320_fpn(**NONE, num_classes=3)
    convert(net, norm, forwards=2)
    images, wanted = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)], [targets(64), targets(64)]
    optimizer = sgd(net)
    for _ in range(2):
        losses = net.train()(images, wanted)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        second_forward(net, images, wanted)
    layers = norm_layers(net)
    assert all(layer.running_mean.isfinite().all() and layer.running_mean.any() for layer in layers)
    found = net.eval()(images)
    assert all(each["boxes"].isfinite().all() for each in found)
    figure(f"{len(layers)} layers, {len(losses)} losses")


@pytest.mark.parametrize("size", [1, 2])
def test_a_pooling_branch_of_one_value_a_channel_is_refused_as_torch_does_until_there_is_a_memory(size, figure):
    """deeplab pools each image to one pixel before a BatchNorm."""
    net = deeplabv3_mobilenet_v3_large(**NONE, num_classes=3)
    theirs, images = deeplabv3_mobilenet_v3_large(**NONE, num_classes=3), torch.rand(size, 3, 64, 64)
    convert(net)
    if size == 1:
        for each in (theirs, net):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                each(images)
        second_forward(net, torch.rand(2, 3, 64, 64))
    net(images)["out"].square().mean().backward()
    pooled = next(m for name, m in net.named_modules() if name.endswith("convs.4"))
    before = next(m for m in pooled.modules() if isinstance(m, nn.Conv2d))
    assert before.weight.grad.any()
    second_forward(net, images)
    figure("trains" if size > 1 else "refused without a memory, trains with one")
