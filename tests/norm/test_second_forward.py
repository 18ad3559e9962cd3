"""Double forward propagation: which forward pass remembers, with which weights, and the warning if none did."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import KINDS, close, inputs, kinds, make, network, reference_of, remember, renew, snapshot, unchanged
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import mbn.norm.base as base
import mbn.norm.second_forward as home
from mbn import BatchNorm1d, BatchRenorm1d, MemorizedBatchNorm1d, convert, freeze, held, second_forward
from mbn.norm.base import BatchStatisticsNorm, norm_layers
from mbn.norm.memories import AllMemories, enter_noted
from mbn.norm.second_forward import phase

layers = pytest.mark.parametrize("layer", [BatchNorm1d, BatchRenorm1d, MemorizedBatchNorm1d])


@pytest.fixture
def no_warning_yet():
    """A process that has not warned yet, for the tests after this one too."""
    base.warn_once.cache_clear()
    yield
    base.warn_once.cache_clear()


@kinds
def test_each_layer_remembers_the_moments_under_the_new_weights(path, kind):
    """Algorithm 1 through a whole network, each layer normalising by what it remembers (without B) and B."""
    net = network(kind, forwards=2)
    refs = [reference_of(layer) for layer in norm_layers(net)]

    def by_hand(x, forward):
        left = iter(refs)
        for layer in net:
            ours = isinstance(layer, BatchStatisticsNorm)
            x = next(left).forward(x, layer.weight, layer.bias, forward) if ours else layer(x)
        return x

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for t in range(5):
        x, labels = inputs(2 + t % 3, 3, 5, 5, at=t), torch.arange(2 + t % 3) % 3
        optimizer.zero_grad()
        y = net(x)
        close(y, by_hand(x, forward=1), 1e-9)
        F.cross_entropy(y, labels).backward()
        optimizer.step()
        close(second_forward(net, x), by_hand(x, forward=2), 1e-9)
        for layer, ref in zip(norm_layers(net), refs, strict=True):
            for name, expected in ref.buffers().items():
                close(getattr(layer, name), expected, 1e-9)


@layers
def test_one_entry_per_second_forward(layer):
    """Gradient accumulation: two training forwards, one step, and then each micro-batch's second forward."""
    model, twin = layer(3, forwards=2), layer(3, forwards=1)
    a, b = torch.randn(4, 3), torch.randn(5, 3) + 1
    before = snapshot(model)
    assert unchanged(before, twin)
    (model(a).square().sum() + model(b).square().sum()).backward()
    assert unchanged(before, model)
    second_forward(model, a)
    second_forward(model, b)
    with torch.no_grad():
        twin(a)
        twin(b)
    assert unchanged(snapshot(twin), model)


@layers
def test_only_layers_of_two_forwards_in_training_mode_take_the_second(layer):
    """A layer of one forward has remembered the batch already, and a frozen one remembers nothing."""
    one, two, frozen = layer(3, forwards=1), layer(3, forwards=2), layer(3, forwards=2)
    net, x = nn.Sequential(one, two, frozen), torch.randn(4, 3)
    frozen.eval()
    net(x)
    before = [snapshot(part) for part in net]
    second_forward(net, x)
    assert [unchanged(*pair) for pair in zip(before, net, strict=True)] == [True, False, True]


def test_second_forward_passes_arguments_on_and_returns_the_output_without_gradients():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = MemorizedBatchNorm1d(3)

        def forward(self, x, *, factor):
            assert not torch.is_grad_enabled()
            return {"y": self.norm(x) * factor}

    model, x = Doubled(), torch.randn(4, 3, requires_grad=True)
    y = second_forward(model, x, factor=2)["y"]
    assert not y.requires_grad
    assert_close(y, 2 * F.batch_norm(x.detach(), None, None, training=True))
    assert torch.is_grad_enabled()


def test_second_forward_sees_the_new_weights_inside_one_autocast():
    """autocast caches bfloat16 copies of the weights until it ends, and the optimiser's step is inside it."""
    net, x = nn.Sequential(nn.Linear(3, 4, bias=False), MemorizedBatchNorm1d(4)), torch.randn(8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
        with torch.no_grad():
            net[0].weight.mul_(3)
        assert second_forward(net, x).dtype == torch.bfloat16
    assert_close(net[1].memory_mean[0], net[0](x).mean(0), atol=3e-2, rtol=3e-2)
    assert second_forward(net, x).dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MemorizedBatchNorm1d(3).eval(), r"in eval mode: call train\(\) on"),
        *((m, r"put them in with convert\(model\) before") for m in (nn.Linear(3, 3), nn.BatchNorm1d(3))),
        (MemorizedBatchNorm1d(3, forwards=1), r'convert\(model, norm="mbn", forwards=2\) before training'),
        (convert(nn.BatchNorm1d(3), norm="brn"), r'convert\(model, norm="brn", forwards=2\) before training'),
        (convert(nn.BatchNorm1d(3), norm="bn"), r'convert\(model, norm="bn", forwards=2\) before training'),
    ],
)
def test_second_forward_refuses_eval_mode_and_a_model_without_a_layer_of_two_forwards(model, words):
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=words) as caught:
        second_forward(model, torch.randn(4, 3))
    assert ". " not in str(caught.value)
    assert unchanged(before, model)


def test_second_forward_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"needs the module first, then its arguments, and not a Tensor$"):
        second_forward(inputs(4, 3))


def test_second_forward_refuses_a_network_of_which_only_the_wrapper_is_in_training_mode():
    net, x = network("mbn paper", forwards=2).eval(), inputs(4, 3, 5, 5)
    wrapper = nn.Sequential(net)
    with pytest.raises(RuntimeError, match=r"are in eval mode: call train\(\) on the module that holds them") as caught:
        second_forward(wrapper, x)
    assert ". " not in str(caught.value)
    freeze(net)
    before = snapshot(net)
    second_forward(wrapper, x)
    assert unchanged(before, net)


def test_in_a_network_in_eval_mode_the_layers_that_train_remember():
    """A common way to train only the head."""
    net, x = network("mbn paper", forwards=2).eval(), inputs(4, 3, 5, 5)
    first, *_, last = norm_layers(net)
    last.train()
    before = snapshot(first), snapshot(last)
    second_forward(net, x)
    assert unchanged(before[0], first)
    assert not unchanged(before[1], last)
    freeze(net)
    with pytest.raises(RuntimeError, match=r"call train\(\) on the module"):
        second_forward(net.eval(), x)


@layers
def test_after_a_failed_second_forward_the_next_forward_is_a_first_one(layer):
    model = nn.Sequential(layer(3, forwards=2), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        second_forward(model, torch.randn(4, 3))
    before = snapshot(model)
    model[0](torch.randn(4, 3))
    assert unchanged(before, model)
    if layer is not BatchNorm1d:  # whose averages move in the forward, as torch's do
        assert unchanged(before, nn.Sequential(layer(3), model[1]))


class Siamese(nn.Module):
    """Calls its layers once for each of its inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, *xs):
        return [self.layers(x) for x in xs]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bn"])  # whose averages move once a call
@pytest.mark.parametrize("number", [1, 2])
def test_a_layer_that_is_called_twice_in_a_second_forward_takes_both_in_as_one_batch(kind, number):
    """And normalises both by what it remembered before, whichever comes first. The number of layers decides the way."""
    a, b = inputs(4, 3), inputs(6, 3, at=2)
    models = [Siamese(*(make(kind, dims=2, forwards=2) for _ in range(number))) for _ in range(3)]
    for model in models:
        second_forward(model, torch.arange(15.0).view(5, 3).double())
    model, swapped, joint = models
    ya, yb = second_forward(model, a, b)
    assert_close(second_forward(swapped, b, a), [yb, ya])
    second_forward(joint, torch.cat([a, b]))
    assert_close(swapped.state_dict(), model.state_dict(), atol=1e-12, rtol=1e-12)
    # A layer behind it meets other inputs, because each call was normalised by its own batch.
    assert_close(joint.layers[0].state_dict(), model.layers[0].state_dict(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("base", [MemorizedBatchNorm1d, BatchRenorm1d])
def test_a_subclass_may_enter_its_batches_in_its_own_way(base, together):
    class Own(base):
        def enter(self, mu, s2, n):
            self.entered = (mu, s2, n)

    layer, x = Own(3, forwards=2), torch.randn(4, 3)
    before, memories = snapshot(layer), AllMemories([layer]) if together else None
    if together:
        with torch.no_grad(), home.phase([layer], "second"):
            layer(x)
        memories.enter()
    else:
        second_forward(layer, x)
    assert layer.entered[2] == 4
    assert_close(layer.entered[0], x.mean(0))
    assert unchanged(before, layer)


@pytest.mark.parametrize("reentrant", [True, False])
@kinds
def test_activation_checkpointing_changes_nothing(kind, reentrant):
    """The forward that it repeats in the backward remembers nothing, and meets the memory of the first one."""
    net = network(kind, forwards=2)
    twin = copy.deepcopy(net)
    for t in range(3):
        x = inputs(4, 3, 5, 5, at=t).requires_grad_()
        for model, y in ((net, net(x)), (twin, checkpoint(twin, x, use_reentrant=reentrant))):
            model.zero_grad()
            y.square().sum().backward()
            second_forward(model, x)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert unchanged(snapshot(net), twin)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["mbn paper", "brn"])
def test_a_repeated_forward_that_remembers_does_so_once_and_warns_once(kind, reentrant, no_warning_yet):
    """With forwards=1 it meets a memory that holds its batch already: its gradients are not those of the first one."""
    net = network(kind, forwards=1)
    twin = copy.deepcopy(net)
    for t in range(2):
        x = inputs(4, 3, 5, 5, at=t).requires_grad_()
        net(x).square().sum().backward()
        messages = said(lambda: checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward())  # noqa: B023
        assert [("forwards=2" in message, "gradients" in message) for message in messages] == [(True, True)] * (t == 0)
        assert unchanged(snapshot(net), twin)


def test_with_one_forward_each_call_is_an_entry():
    model = Siamese(MemorizedBatchNorm1d(3, forwards=1))
    model(torch.randn(4, 3), torch.randn(5, 3))
    assert model.layers[0].memory_count[:3].tolist() == [5, 4, 0]


@layers
@pytest.mark.parametrize("forwards", [1, 2])
def test_held_layers_normalise_as_always_and_remember_nothing(layer, forwards):
    model, x = layer(3, forwards=forwards), torch.randn(4, 3)
    for _ in range(2):
        remember(model, x + 1)
    before, twin = snapshot(model), copy.deepcopy(model)
    with held(model):
        y = model(x)
    assert unchanged(before, model)
    assert torch.equal(y, twin(x))
    remember(model, x)
    assert not unchanged(before, model)
    model.eval()  # no warning


class Sometimes(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.use = layer, True

    def forward(self, x):
        return self.layer(x) if self.use else x


def warned(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
    model.train()
    return [str(w.message) for w in caught]


@layers
def test_eval_after_forgotten_second_forwards_warns_once_in_a_process(layer, no_warning_yet):
    model, x = nn.Sequential(layer(3, forwards=2), layer(3, forwards=2)), torch.randn(4, 3)
    model(x)
    model(x)
    (message,) = warned(model)
    assert "second_forward(model, inputs)" in message
    for _ in range(2):
        model(x)
    assert warned(model) == []


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_warning_of_eval_points_to_the_call_however_deep_the_layer_is(depth, no_warning_yet):
    model = MemorizedBatchNorm1d(3)
    for _ in range(depth):
        model = nn.Sequential(model)
    for _ in range(2):
        model(torch.randn(4, 3))
    with pytest.warns(UserWarning, match="remembered nothing") as caught:
        model.eval()
    assert caught[0].filename == __file__


@layers
def test_eval_after_one_iteration_without_a_second_forward_warns_too(layer, no_warning_yet):
    """One training forward alone may be a probe; after a step it is not."""
    model = layer(3, forwards=2)
    model(torch.randn(4, 3))
    renew(model)
    assert len(warned(model)) == 1


@layers
@pytest.mark.parametrize("case", ["second forward", "one forward", "held", "evaluation", "nothing", "probe", "unused"])
def test_no_warning_without_a_forgotten_second_forward(layer, case, no_warning_yet):
    model, x = nn.Sequential(layer(3, forwards=1 if case == "one forward" else 2)), torch.randn(4, 3)
    if case in ("second forward", "one forward"):
        model(x)
    if case == "second forward":
        second_forward(model, x)
    if case == "held":
        with held(model):
            model(x)
    if case == "evaluation":
        model.eval()
        model(x)
    if case == "probe":  # to learn the output's shape, say
        model(x)
    if case == "unused":  # a layer that both kinds of forward do not always use
        model.append(Sometimes(layer(3, forwards=2)))
        for _ in range(2):
            model(x)
        model[1].use = False
        second_forward(model, x)
    assert warned(model) == []
    model.train()
    assert warned(model) == []


@layers
@pytest.mark.parametrize("how", ["no_grad", "detached", "compiled"])
def test_forwards_for_another_network_after_a_second_forward_are_not_forgotten(layer, how, no_warning_yet):
    """A generator's, in several steps of its critic: no weight of it changes."""
    torch._dynamo.reset()
    model, x = layer(3, forwards=2), torch.randn(4, 3)
    forward = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    for _ in range(3):
        forward(x).sum().backward()
        renew(model)
        second_forward(model, x)
        for _ in range(2):
            with torch.no_grad() if how == "no_grad" else contextlib.nullcontext():
                forward(x)
    assert warned(model) == []
    for _ in range(2):
        model(x).sum().backward()
        renew(model)
    assert len(warned(model)) == 1


def test_a_warning_made_an_error_is_raised_again_next_time(no_warning_yet):
    model = MemorizedBatchNorm1d(3)
    for _ in range(2):
        model.train()
        model(torch.randn(4, 3))
        renew(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="second_forward"):
                model.eval()


# The call's place in the iteration.


def said(loop):
    """The warnings of a training loop."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop()
    return [str(w.message) for w in caught]


def loop(model, order, iterations=3, optimizer=None, forward=None):
    """Train, with the parts of an iteration in this order."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(4, 3) for _ in range(2)]
    parts = {
        "forward": lambda: sum((forward or model)(x).square().sum() for x in batches).backward(),
        "step": optimizer.step,
        "zero": optimizer.zero_grad,
        "second": lambda: [second_forward(model, x) for x in batches],
    }
    for _ in range(iterations):
        for part in order.split():
            parts[part]()


def small(layer):
    return nn.Sequential(nn.Linear(3, 3), layer(3, forwards=2), nn.Linear(3, 3), layer(3, forwards=2))


@layers
@pytest.mark.parametrize("order", ["forward second step zero", "zero forward second step"])
def test_a_second_forward_before_the_step_warns_once_in_a_process(layer, order, no_warning_yet):
    model = small(layer)
    (message,) = said(lambda: loop(model, order))
    assert message.endswith("call second_forward after optimizer.step()")
    assert said(lambda: loop(model, order)) == []


def test_the_warning_points_to_the_call(no_warning_yet):
    with pytest.warns(UserWarning, match="before the optimizer's step") as caught:
        loop(small(MemorizedBatchNorm1d), "forward second step zero")
    assert caught[0].filename == __file__


@layers
@pytest.mark.parametrize(
    "order", ["forward step zero second", "zero forward step second", "zero forward step second step"]
)
def test_a_second_forward_after_the_step_does_not_warn(layer, order, no_warning_yet):
    """The loop's two micro-batches are accumulated gradients: two first forwards, one step, two second forwards."""
    assert said(lambda: loop(small(layer), order)) == []


class Skipped(torch.optim.SGD):
    """Every second step is skipped, as a GradScaler does where a gradient is not finite."""

    steps = 0

    def step(self):
        self.steps += 1
        if self.steps % 2:
            super().step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Skipped])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"foreach": True}])
def test_right_loops_do_not_warn_whatever_the_optimizer_does(optimizer, how, no_warning_yet):
    for trained in ((0, 1, 2, 3), (0, 2)):  # with the layers' own parameters, and without
        model = small(MemorizedBatchNorm1d)
        parameters = [p for i in trained for p in model[i].parameters()]
        assert said(lambda: loop(model, "forward step zero second", 5, optimizer(parameters, lr=0.0, **how))) == []  # noqa: B023


def test_a_forward_between_the_step_and_the_second_forward_does_not_count(no_warning_yet):
    """As the discriminator's in the generator's step."""
    assert said(lambda: loop(small(MemorizedBatchNorm1d), "forward step zero forward second")) == []


@pytest.mark.parametrize("case", ["plain", "no_grad", "held"])
def test_a_layer_of_which_nothing_is_known_does_not_warn(case, no_warning_yet):
    model = small(MemorizedBatchNorm1d)
    if case == "plain":
        model = nn.Sequential(nn.Linear(3, 3), MemorizedBatchNorm1d(3, affine=False))

    def forward(x):
        if case == "no_grad":
            with torch.no_grad():
                model(x)
        with contextlib.nullcontext() if case == "plain" else held(model):
            return model(x)

    assert said(lambda: loop(model, "forward second step zero", forward=forward)) == []


def test_parameters_that_stand_in_during_a_forward_are_not_taken_for_the_layers_own(no_warning_yet):
    """As those that sharded training gathers. These have been written as often as the own ones will be by the step."""
    model = small(MemorizedBatchNorm1d)

    @torch.no_grad()
    def gathered(p):
        full = nn.Parameter(p.clone())
        for _ in range(p._version + 1):
            full.mul_(1)
        return full

    def forward(x):
        with torch.no_grad():
            for p in model.parameters():
                p.grad = torch.ones_like(p)  # as if gradients had been scattered
        return torch.func.functional_call(model, {name: gathered(p) for name, p in model.named_parameters()}, (x,))

    assert said(lambda: loop(model, "forward step zero second", forward=forward)) == []


def test_nothing_is_noted_under_a_transform_or_of_inference_tensors():
    model = nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, forwards=2))
    parameters, x = dict(model.named_parameters()), torch.randn(2, 4, 3)
    loss = lambda p, x: torch.func.functional_call(model, p, (x,)).square().sum()  # noqa: E731
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    assert model[1].forward_versions == ()
    with torch.inference_mode():
        layer = MemorizedBatchNorm1d(3)
        layer(x[0])
        second_forward(layer, x[0])
    with pytest.raises(RuntimeError, match="cannot be saved for backward"):  # torch's own error, not one of versions
        layer(x[0])


@layers
def test_everything_trains_where_one_autocast_holds_several_iterations(layer):
    """In torch 2.6 the casts that a second forward left in autocast's cache had no gradient."""
    model, x = small(layer), torch.randn(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(x).square().sum().backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            second_forward(model, x)


@layers
def test_a_compiled_block_may_be_called_any_number_of_times(layer):
    """As in a recurrent network: beyond eight variants torch.compile gives up."""
    torch._dynamo.reset()
    block, x = small(layer).double(), torch.randn(4, 3, dtype=torch.float64)
    plain = copy.deepcopy(block)
    compiled = torch.compile(block, backend="eager", fullgraph=True)

    def unrolled(f):
        def forward(x):
            for _ in range(12):
                x = f(x)
            return x

        return forward

    for module, f in ((block, compiled), (plain, plain)):
        with torch.no_grad(), phase(norm_layers(module), "second"):
            unrolled(f)(x)
        enter_noted(norm_layers(module))
    assert_close(block.state_dict(), plain.state_dict(), atol=1e-12, rtol=1e-12)


@layers
def test_what_is_noted_is_in_no_state_dict_and_compiled_forwards_neither_note_nor_read_it(layer):
    torch._dynamo.reset()
    model, x = small(layer), torch.randn(4, 3)
    keys = model.state_dict().keys()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loop(model, "forward step zero second", iterations=1, forward=compiled)
    assert model[1].forward_versions == model[1].second_versions == ()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):  # an epoch's last, smaller batch is often not compiled
            loop(model, "forward step zero second", iterations=1, forward=compiled)
            model(x).sum().backward()
            assert model[1].forward_versions
    assert model.state_dict().keys() == keys
