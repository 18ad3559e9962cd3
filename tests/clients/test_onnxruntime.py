"""onnxruntime: a network in eval mode, exported with our layers and with torch's in their place."""

import onnxruntime
import pytest
import torch
from little import KINDS, network, train

from mbn import to_batch_norm

pytestmark = pytest.mark.clients("onnxruntime", "onnxscript", "onnx")


def difference(net, exported, dtype, folder):
    """Between the outputs of a network and of its exported form, for a batch of another size."""
    example, other = torch.randn(4, 3, 7, 7, dtype=dtype), torch.randn(9, 3, 7, 7, dtype=dtype)
    batch = torch.export.Dim("batch")
    torch.onnx.export(exported, (example,), folder / "net.onnx", dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    return float((torch.from_numpy(y) - net(other).detach()).abs().max())


@pytest.mark.parametrize("back", [False, True], ids=["our layers", "to_batch_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_network_has_the_same_outputs(kind, back, figure, tmp_path):
    net = train(network(kind)).eval()
    largest = difference(net, to_batch_norm(net) if back else net, torch.float32, tmp_path)
    assert largest < 1e-5
    figure(f"within {largest:.0e} with another batch size")


@pytest.mark.parametrize("back", [False, True], ids=["our layers", "to_batch_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_network_in_half_precision_has_the_same_outputs(kind, back, figure, tmp_path):
    """ONNX wants one precision, which to_batch_norm's layers have only after half()."""
    net = train(network(kind)).eval().half()
    largest = difference(net, to_batch_norm(net).half() if back else net, torch.float16, tmp_path)
    assert largest < 1e-2
    figure(f"within {largest:.0e} with another batch size")
