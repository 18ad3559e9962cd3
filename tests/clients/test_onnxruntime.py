"""onnxruntime: a network in eval mode, exported with our layers and with torch's in their place."""

import onnxruntime
import pytest
import torch
from little import KINDS, network, train

from mbn import to_batch_norm

pytestmark = pytest.mark.clients("onnxruntime", "onnxscript", "onnx")


@pytest.mark.parametrize("back", [False, True], ids=["our layers", "to_batch_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_network_has_the_same_outputs(kind, back, figure, tmp_path):
    net = train(network(kind)).eval()
    exported = to_batch_norm(net) if back else net
    example, other = torch.randn(4, 3, 7, 7), torch.randn(9, 3, 7, 7)
    batch = torch.export.Dim("batch")
    torch.onnx.export(exported, (example,), tmp_path / "net.onnx", dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    difference = float((torch.from_numpy(y) - net(other).detach()).abs().max())
    assert difference < 1e-5
    figure(f"within {difference:.0e} with another batch size")
