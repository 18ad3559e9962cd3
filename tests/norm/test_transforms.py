"""torch.func, forward-mode AD, torch.fx, torch.export and TorchScript: where they take nn.BatchNorm they take ours."""

import copy
import io
import warnings

import pytest
import torch
from layer_kinds import KINDS, inputs, kinds, make, one_or_two, remember, renew, snapshot, trained, unchanged
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.testing import assert_close

from mbn import held, second_forward, to_batch_norm
from mbn.norm.base import norm_layers

# What torch itself calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
TIGHT = {"atol": 1e-10, "rtol": 1e-10}


def network(kind, forwards=1, dims=2):
    """From (N, 2) to (N, 2), or with a convolution from (N, 2, 3, 3), through a layer that has a memory."""
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(3) if kind == "torch" else trained(kind, dims=dims, forwards=forwards)
    first = nn.Linear(2, 3) if dims == 2 else nn.Conv2d(2, 3, 2)
    return nn.Sequential(first, layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double().eval()


def ready(net, *shape):
    """The network in training mode, its last layer's width known."""
    net(torch.zeros(shape, dtype=torch.float64))
    return net.train()


def batch():
    return inputs(4, 2)


def state(net):
    return dict(net.named_parameters()), {name: b.clone() for name, b in net.named_buffers()}


# torch.func.


@kinds
@one_or_two
def test_gradients_for_the_parameters_are_those_of_plain_autograd_and_the_buffers_move_alike(kind, forwards):
    """With buffers as inputs, as nn.BatchNorm needs them; functional_call writes into those that it is given."""
    net, x = ready(network(kind, forwards), 4, 2), batch()
    before = snapshot(net)
    parameters, buffers = state(net)

    def loss(parameters, buffers, x):
        return functional_call(net, (parameters, buffers), (x,)).pow(3).sum()

    got = grad(loss)(parameters, buffers, x)
    assert unchanged(before, net)
    net(x).pow(3).sum().backward()
    assert_close(got, {name: p.grad for name, p in net.named_parameters()}, **TIGHT)
    assert_close(buffers, dict(net.named_buffers()), **TIGHT)


@kinds
@one_or_two
def test_derivatives_for_the_input_are_those_of_plain_autograd(kind, forwards):
    """By reverse mode, by forward mode, and by one over the other: r and d are constants in all of them."""
    net, x = ready(network(kind, forwards), 4, 2), batch()
    parameters, buffers = state(net)

    def output(x):
        return functional_call(net, (parameters, {name: b.clone() for name, b in buffers.items()}), (x,))

    def loss(x):
        return output(x).pow(3).sum()

    with held(net):
        jacobian, second = plain_jacobian(net, x), plain_hessian(lambda x: net(x).pow(3).sum(), x)
    v, u = torch.randn_like(x), torch.randn(4, 2, dtype=torch.float64)
    y, pull = vjp(output, x)
    assert_close(pull(u)[0], torch.einsum("ijkl,ij->kl", jacobian, u), **TIGHT)
    assert_close(jvp(output, (x,), (v,)), (y, torch.einsum("ijkl,kl->ij", jacobian, v)), **TIGHT)
    for way in (jacrev, jacfwd):
        assert_close(way(output)(x), jacobian, **TIGHT)
    over_forward = [lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))]
    # torch's own rule for its batch norm is wrong there, in nn.BatchNorm as in ours.
    for way in (hessian, lambda f: jacrev(jacrev(f)), *(over_forward if kind != "bn" else [])):
        assert_close(way(loss)(x), second, **TIGHT)
    assert_close(jvp(grad(loss), (x,), (v,))[1], torch.einsum("ijkl,kl->ij", second, v), **TIGHT)


@kinds
def test_a_first_forward_of_two_needs_no_buffers_as_inputs_because_it_writes_none(kind):
    net, x = ready(network(kind, 2), 4, 2), batch()
    before = snapshot(net)
    jacobian = plain_jacobian(net, x)
    assert_close(jacrev(net)(x), jacobian, **TIGHT)
    assert_close(jacfwd(net)(x), jacobian, **TIGHT)
    assert_close(vmap(net)(torch.stack([x, 2 * x])), torch.stack([net(x), net(2 * x)]), **TIGHT)
    assert unchanged(before, net)


@pytest.mark.parametrize("kind", ["torch", *KINDS])
def test_with_one_forward_torch_refuses_to_write_buffers_that_are_no_inputs(kind):
    """The same error as for nn.BatchNorm, and nothing is written."""
    layer, x = (nn.BatchNorm1d(3) if kind == "torch" else make(kind, dims=2, forwards=1)).double(), inputs(4, 3)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"in-place operation \(aten::.*\) that would mutate a captured Tensor"):
        grad(lambda x: layer(x).sum())(x)
    kept = [name for name in before if name != "num_batches_tracked"]
    assert all(torch.equal(before[name], layer.state_dict()[name]) for name in kept)


class Second(nn.Module):
    """A second forward as a module, so that functional_call can hand it parameters and buffers."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return second_forward(self.net, x)


@kinds
@pytest.mark.parametrize(("forwards", "compiled"), [(1, False), (2, False), (1, True)])
def test_stacked_models_train_as_each_would_alone(kind, forwards, compiled):
    """The base model is on the meta device, as torch's tutorial on ensembles has it."""
    torch._dynamo.reset()
    nets = [ready(network(kind, forwards), 4, 2) for _ in range(3)]
    for t, net in enumerate(nets):
        renew(net)
        remember(net[1], inputs(5, 3, at=t))
    parameters, buffers = stack_module_state(nets)
    base, xs = copy.deepcopy(nets[0]).to("meta"), torch.stack([inputs(4, 2, at=t) for t in range(3)])

    def loss(parameters, buffers, x):
        return functional_call(base, (parameters, buffers), (x,)).pow(3).sum()

    step = vmap(grad(loss))
    if compiled:
        step = torch.compile(step, backend="eager", fullgraph=True)
    gradients = step(parameters, buffers, xs)
    if forwards == 2:
        own = {f"net.{name}": value for name, value in (parameters | buffers).items()}
        seconds = vmap(lambda own, x: functional_call(Second(base), own, (x,)))(own, xs)
    for i, (net, x) in enumerate(zip(nets, xs, strict=True)):
        net(x).pow(3).sum().backward()
        if forwards == 2:
            assert_close(seconds[i], second_forward(net, x), **TIGHT)
        assert_close({k: g[i] for k, g in gradients.items()}, {k: p.grad for k, p in net.named_parameters()}, **TIGHT)
        assert_close({k: b[i] for k, b in buffers.items()}, dict(net.named_buffers()), **TIGHT)


# Forward-mode AD.


@kinds
@one_or_two
def test_forward_mode_ad_gives_the_jacobians_product_and_leaves_no_tangent_behind(kind, forwards):
    net, x = ready(network(kind, forwards), 4, 2), batch()
    twin = copy.deepcopy(net)
    v = torch.randn_like(x)
    with held(net):
        jacobian = plain_jacobian(net, x)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, v)))
        for buffer in net.buffers():
            assert forward_ad.unpack_dual(buffer).tangent is None
    assert_close(tangent, torch.einsum("ijkl,kl->ij", jacobian, v), **TIGHT)
    assert_close(y, twin(x), **TIGHT)
    assert_close(net.state_dict(), twin.state_dict(), **TIGHT)


# torch.fx, torch.export and TorchScript.


def trained_alike(model, original, x):
    """Both train for some iterations, each with its own layers, and evaluate the same."""
    for t in range(3):
        results = []
        for net in (model, original):
            net.zero_grad()
            y = net(x + t)
            y.pow(3).sum().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
            again = second_forward(net, x + t) if any(layer.forwards == 2 for layer in norm_layers(net)) else None
            results.append([y, again])
        assert_close(*results, atol=0, rtol=0)
    assert unchanged(snapshot(original), model)
    assert torch.equal(model.eval()(x), original.eval()(x))


@kinds
@one_or_two
def test_a_traced_network_trains_and_evaluates_as_the_network(kind, forwards):
    net, x = ready(network(kind, forwards, 4), 4, 2, 3, 3), inputs(4, 2, 3, 3)
    traced = torch.fx.symbolic_trace(net)
    assert traced.get_submodule("1") is net[1]
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == list("01234")
    saved = io.BytesIO()
    torch.save(traced, saved)
    saved.seek(0)
    for model in (copy.deepcopy(traced), torch.load(saved, weights_only=False)):
        trained_alike(model, copy.deepcopy(net), x)


@pytest.mark.parametrize("kind", ["bn", "brn", "mbn paper"])
def test_torchvision_extracts_features_behind_our_layers_as_behind_torchs(kind):
    pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    net = ready(network(kind, 1, 4), 4, 2, 3, 3)
    assert get_graph_node_names(net) == get_graph_node_names(ready(network("torch", 1, 4), 4, 2, 3, 3))
    extractor, x = create_feature_extractor(copy.deepcopy(net), ["1", "4"]), inputs(4, 2, 3, 3)
    for mode in (True, False):
        expected = net.train(mode)[:2](x)
        features = extractor.train(mode)(x)
        assert torch.equal(features["1"], expected)
        assert torch.equal(features["4"], net[2:](expected))
    assert unchanged(snapshot(net), extractor)


@pytest.mark.parametrize("training", [True, False])
@kinds
@one_or_two
def test_an_exported_network_computes_and_remembers_as_the_network(kind, forwards, training):
    net, x = ready(network(kind, forwards, 4), 4, 2, 3, 3).train(training), inputs(4, 2, 3, 3)
    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(copy.deepcopy(net), (x,), dynamic_shapes=({0: size},), strict=False).module()
    kept = dict(exported.named_buffers())  # torch 2.6 leaves out those that nothing reads
    assert len(kept) >= 2
    for n in (4, 7):
        more = inputs(n, 2, 3, 3, at=n)
        assert_close(exported(more), net(more), **TIGHT)
        assert_close(kept, {name: net.get_buffer(name) for name in kept}, **TIGHT)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="of torch 2.7")
@kinds
def test_in_evaluation_an_exported_layer_is_one_operation_as_torchs(kind):
    """ONNX fuses it with the convolution before it."""

    def operations(net):
        graph = torch.export.export(net.float().eval(), (inputs(4, 2, 3, 3).float(),)).module().graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function" and "guard" not in node.name]

    ours, torchs = (operations(ready(network(name, 1, 4), 4, 2, 3, 3)) for name in (kind, "torch"))
    of_sigma = {"aten.square.default", "aten.sub.Tensor"} if kind == "brn" else set()  # of constants
    assert torchs.count("aten.batch_norm.default") == 1
    assert [name for name in ours if name not in of_sigma] == torchs


@pytest.mark.parametrize("group_size", [None, 2])
@kinds
def test_a_trace_in_evaluation_says_no_more_than_torchs(kind, group_size):
    net, x = ready(network(kind, 1, 4), 4, 2, 3, 3).eval(), inputs(4, 2, 3, 3)
    net[1].group_size = group_size
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(net, x)
    assert_close(traced(2 * x), net(2 * x), **TIGHT)


@pytest.mark.parametrize("training", [True, False])
@kinds
@one_or_two
def test_torchscript_traces_the_network(kind, forwards, training):
    net, x = ready(network(kind, forwards, 4), 4, 2, 3, 3).train(training), inputs(4, 2, 3, 3)
    traced = torch.jit.trace(copy.deepcopy(net), x, check_trace=False)
    if training and forwards == 1:
        net(x)  # tracing has run it once
    assert_close(traced(2 * x), net(2 * x), **TIGHT)
    assert_close(dict(traced.named_buffers()), dict(net.named_buffers()), **TIGHT)


@kinds
def test_torchscript_cannot_read_our_layers_and_says_what_can_be_scripted(kind):
    net, x = ready(network(kind, 1, 4), 4, 2, 3, 3).eval(), inputs(4, 2, 3, 3)
    with pytest.raises(RuntimeError, match=r"script to_batch_norm\(model\), which is equal in eval mode") as caught:
        torch.jit.script(net)
    assert ". " not in str(caught.value)
    assert_close(torch.jit.script(to_batch_norm(net))(x), net(x), **TIGHT)
