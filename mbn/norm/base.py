"""What all layers with batch statistics share: shapes, precision, state, and which forward pass remembers."""

import functools
import operator
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_unary

from .functional import (
    affine_normalize,
    batch_moments,
    gathered,
    in_dtype,
    in_its_layout,
    in_one_layout,
    is_capturing,
    is_exporting,
    is_transformed,
    joint_batch_norm,
    joint_moments,
    one_after_another,
    pool,
    renormalized_batch_norm,
    side_by_side,
    statistics_dtype,
    values_per_channel,
)

# A batch's mean and biased variance (C,), and the number of values they were taken over.
Note = tuple[Tensor, Tensor, int | Tensor]


def one_note(notes: tuple[Note, ...]) -> Note:
    """Several notes as that of one batch."""
    if len(notes) == 1:
        return notes[0]
    mus, s2s, ns = zip(*notes, strict=True)
    mu, s2, n = pool(torch.stack(mus), torch.stack(s2s), counts_of(ns, mus[0]))
    return mu, s2, n.reshape(1)


def counts_of(ns: tuple[int | Tensor, ...], like: Tensor) -> Tensor:
    """Numbers of values, as integers or tensors of shape (1,), as one tensor of like's dtype."""
    if all(isinstance(n, int) for n in ns):
        return torch.tensor(ns, device=like.device, dtype=like.dtype)
    return torch.cat([like.new_full((1,), n) if isinstance(n, int) else n.to(like.dtype) for n in ns])


class Joint(NamedTuple):
    """The batch of all processes in group together: its mean and biased variance (C,), and n (1,)."""

    mu: Tensor
    s2: Tensor
    n: Tensor
    group: Any


def check_number(name: str, value: object, holds: Callable[[], bool], wanted: str) -> None:
    """Raise ValueError where value is not as wanted; holds compares it, which a string or a list does not allow."""
    try:
        right = holds()
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def whole(value: Any) -> int:
    """A whole number as an int. Errors: TypeError for what is none, which a bool is not either."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


class BatchStatisticsNorm(nn.Module):
    """Base of BatchNorm, MemorizedBatchNorm and BatchRenorm.

    Input and output: (N, C) or (N, C, *spatial), as many dimensions as the subclass's `input_dims` allows. Any memory
    layout. The output has the input's dtype; statistics have at least float32, whatever the module's dtype. An empty
    batch gives an empty output and is not remembered (BatchNorm counts it, as torch's does).

    The layer's `phase` decides what a training forward does with its batch's statistics:
    `"first"` remembers them only if forwards is 1, `"second"` only if it is 2, `"held"` never.
    `second_forward` and `held` set the phase; a copy of the layer starts in `"first"`. Evaluation uses
    `test_statistics()` and changes nothing.

    With sync=True the batches of all processes in the group are normalised as one. A training forward sends one message
    of 2 C + 1 numbers, its backward one of 2 C: every process must run both, also with an empty batch. torch.compile
    works; with fullgraph=True it refuses a process with fewer than two values a channel.

    Errors: ValueError for an input of the wrong shape or with one value a channel that no memory adds to, and for a
    setting that is out of bounds, such as an eps that is not above 0; RuntimeError where the statistics have been cast
    to half precision, and with sync=True for second derivatives, `torch.func` and a process outside the group.

    With group_size=N the images of a training batch are cut, in their order, into groups of N (the last one may be
    smaller), and each is normalised as a batch of its own. What is remembered is of all groups, once a batch. With
    sync=True too the groups are each process's own, and only what is remembered is of all processes: the forward that
    remembers sends the one message, the backward none.
    """

    input_dims: tuple[int, ...] = ()
    # Buffers that keep at least float32 when the module is cast to a narrower type.
    statistics: tuple[str, ...] = ("running_mean",)
    # The settings that `convert` passes on, in the order of the signature.
    settings: tuple[str, ...] = ()
    # The buffer that holds the settings which a schedule changes, if there are any: so that a compiled or captured
    # iteration uses new values. `known` holds the same as Python numbers, which are not rounded.
    scheduled: str = ""
    known: tuple[float, ...] = ()

    # `versions()` at the first training forward since the last `second_forward`, and at that call; empty if unknown.
    forward_versions: tuple[tuple[int, int], ...] = ()
    second_versions: tuple[tuple[int, int], ...] = ()
    # Batches that wait for the end of the second forward. More than one if the layer was called more than once.
    noted: tuple[Note, ...] = ()
    # Mean and biased variance (C,) and number (1,) of all values that training forwards have normalised, changed in
    # place; None where nobody asks. Not by a hook: compiled code and a direct call of forward run none.
    tally: tuple[Tensor, Tensor, Tensor] | None = None
    # True while an `AllMemories` enters the batches of this layer and others at once.
    deferred = False
    # True between `freeze` and `unfreeze`: the layer stays in eval mode.
    frozen = False
    # The mode that a frozen layer would be in without `freeze`.
    unfrozen_mode = True
    # Whether gamma and beta needed gradients before `freeze`.
    needed_gradients: tuple[bool, ...] = ()
    # torch sets it in the copies that nn.DataParallel makes for one forward.
    _is_replica = False
    # Whether there was a training forward since the last second forward, whether there were several or a compiled one,
    # and whether there ever was a second forward.
    _waiting = False
    _forgotten = False
    _second_run = False
    # Whether training forwards normalise by what is remembered, so that it matters when a batch is.
    uses_what_it_remembers = True
    # The images of a batch that are normalised together; None for all.
    group_size: int | None = None
    # Of a converted layer: the old one without its tensors, for the way back.
    origin: nn.Module | None = None
    # The modules inside that are applied to the normalised x, in this order: a BatchNorm's own activation or dropout.
    followed_by: tuple[str, ...] = ()

    running_mean: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float,
        affine: bool,
        bias: bool,
        forwards: int,
        group_size: int | None,
        sync: bool | None,
        process_group: Any,
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_number("forwards", forwards, lambda: whole(forwards) in (1, 2), "1 or 2")
        check_number("sync", sync, lambda: sync in (None, True, False), "True, False or None")
        check_number("eps", eps, lambda: eps > 0, "above 0")
        check_number(
            *("group_size", group_size, lambda: group_size is None or whole(group_size) >= 1),
            "a whole number of at least 1 or None",
        )
        self.num_features = num_features
        self.eps = eps
        self.group_size = None if group_size is None else whole(group_size)
        self.affine = affine
        self.forwards = whole(forwards)
        self.phase = "first"
        # What forwards write is there from the start: for new attributes torch 2.11 compiles again.
        self.noted, self.deferred, self.tally = (), False, None
        self._waiting, self._forgotten, self._second_run = False, False, False
        self.sync = (process_group is not None or None) if sync is None else bool(sync)
        self._process_group = _Shared(process_group)
        like = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_features, **like)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **like)) if affine and bias else None
        # Device and dtype of the buffers.
        self._like: dict[str, Any] = {"device": device, "dtype": statistics_dtype(dtype or torch.get_default_dtype())}
        self.register_buffer("running_mean", torch.zeros(num_features, **self._like))

    # What a subclass defines.

    def normalize_training(self, x: Tensor, remember: bool, joint: Joint | None) -> Tensor:
        """Normalise x as in training. If remember is true, the layer also remembers the statistics of x.

        joint: the batch that x is a part of, if it is one of several processes; x itself may be empty then.
        """
        y, mu, s2 = self.normalize(x, remember, joint)
        if remember:
            self.take(mu, s2, values_per_channel(x) if joint is None else joint.n)
        return y

    def normalize(self, x: Tensor, remember: bool, joint: Joint | None) -> tuple[Tensor, Tensor, Tensor]:
        """y, and what is to be remembered of x: a mean and a variance. As `normalize_training`, but remembers nothing.

        x may have k C channels, which are k batches side by side: so are what is returned of it.
        """
        raise NotImplementedError

    def together(self, mu: Tensor, s2: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is remembered of k batches at once: mu, s2 (k, C) and n (k,) as (C,), (C,) and ()."""
        raise NotImplementedError

    def enter(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> None:
        """Take one batch's mean and biased variance (C,) over n values into what the layer remembers."""
        raise NotImplementedError

    def check_single_value(self, x: Tensor) -> None:
        """Raise ValueError if x, with one value a channel, cannot be normalised with a gradient that is not zero."""
        where = "" if self.group_size is None else f" in a group of the batch (group_size={self.group_size})"
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}{where}")

    def test_statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and variance (C,) by which evaluation would normalise now."""
        raise NotImplementedError

    def set_test_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Let evaluation normalise by this mean and variance (C,) from now on."""
        raise NotImplementedError

    def normalizing(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> tuple[Tensor, Tensor]:
        """The mean and sqrt(variance + eps) that would normalise a batch of these moments in training now."""
        raise NotImplementedError

    def reset_running_stats(self) -> None:
        """Forget everything that training has remembered."""
        raise NotImplementedError

    # What they share.

    def reset_parameters(self) -> None:
        """Back to the start, as nn.BatchNorm does: gamma 1, beta 0, nothing remembered. Settings stay."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # torch's name for it
        if isinstance(x, Proxy):  # torch.fx: a layer is one node of the graph, as torch's own are
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        if type(x) is not Tensor and not torch.compiler.is_compiling() and has_torch_function_unary(x):
            # A subclass is asked once, as it is by F.batch_norm: the output of a Function that it wraps in every
            # operation would be a view, which may not be changed in place.
            return handle_torch_function(BatchStatisticsNorm.forward, (x,), self, x)
        if x.dim() not in self.input_dims:
            wanted = " or ".join(f"{d}D" for d in self.input_dims)
            raise ValueError(f"{type(self).__name__} expects a {wanted} input, not {x.dim()}D")
        if not torch.jit.is_tracing() and x.shape[1] != self.num_features:  # a trace warns of what depends on sizes
            raise ValueError(f"{type(self).__name__} expects {self.num_features} channels, not {x.shape[1]}")
        if self.running_mean.dtype.itemsize < 4:
            raise RuntimeError(
                f"{type(self).__name__} needs its statistics in float32 and not {self.running_mean.dtype}: "
                "leave buffers out of the cast (with FSDP's MixedPrecision, buffer_dtype=torch.float32)"
            )
        y = self._train(x) if self.training else in_its_layout(self._evaluate(in_one_layout(x)), x)
        for name in self.followed_by:
            y = self._modules[name](y)  # type: ignore[misc]
        return y

    def _evaluate(self, x: Tensor) -> Tensor:
        mu, s2 = self.test_statistics()
        if x.dtype == torch.float64:  # as in training
            mu, s2 = in_dtype(mu, x.dtype), in_dtype(s2, x.dtype)
        weight, bias = self._affine(x)
        if is_exporting() and x.dtype == mu.dtype:  # one operation, which ONNX fuses with a convolution
            return F.batch_norm(x, mu, s2, weight, bias, False, 0.0, self.eps)
        return affine_normalize(x, mu, s2, weight, bias, self.eps)

    def _train(self, x: Tensor) -> Tensor:
        remember = self.phase == ("first", "second")[self.forwards - 1]
        if self.phase == "first" and self.forwards == 2:
            self._note_first_forward()
        if remember and self.phase == "first" and self.uses_what_it_remembers and in_backward():
            warn_once(REPEATED)
            remember = False
        if self.tally is not None:
            self._add_to_tally(x, *self.tally)
        if self.group_size is not None:
            return self._train_in_groups(x, remember)
        joint = self.joint_batch(x)
        n = values_per_channel(x)
        if n <= 1 and joint is not None:
            n = 2 if is_capturing(x) else int(joint.n.item())  # a captured graph cannot ask
        if n == 0:
            return self.normalize_empty(x, remember)
        if n == 1:
            self.check_single_value(x)
        return in_its_layout(self.normalize_training(in_one_layout(x), remember, joint), x)

    def normalize_empty(self, x: Tensor, remember: bool) -> Tensor:
        """As in torch: nothing to normalise, and gradients of zero."""
        return F.batch_norm(x, None, None, *self._affine(x), True, 0.0, self.eps)

    def _groups(self, x: Tensor) -> list[tuple[Tensor, int]]:
        """x in one or two parts, each with its number of groups: the full groups, then the rest."""
        n, size = x.shape[0], self.group_size or x.shape[0]
        groups, rest = n // size, n % size  # not divmod, which torch.compile does not know of sizes that change
        cut = n - rest
        parts = [(x[:cut], groups)] if groups else []
        return [*parts, (x[cut:], 1)] if rest or not groups else parts

    def _train_in_groups(self, x: Tensor, remember: bool) -> Tensor:
        """Normalise each group of images as a batch of its own, and remember all of them at once."""
        processes = self.joint_group()
        ys: list[Tensor] = []
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        if x.numel() == 0:
            if not remember or processes is None:
                return self.normalize_empty(x, remember)
            self._take_groups(x, seen, processes)
            return self.normalize_empty(x, False)
        for part, groups in self._groups(x):
            n = values_per_channel(part) // groups
            if n == 1:
                self.check_single_value(part[:1])
            beside = side_by_side(part, groups)
            y, mu, s2 = self.normalize(in_one_layout(beside), remember, None)
            ys.append(one_after_another(in_its_layout(y, beside), groups, part.stride(1) == 1))
            seen.append((mu.view(groups, -1), s2.view(groups, -1), mu.new_full((groups,), n)))
        if remember:
            self._take_groups(x, seen, processes)
        return torch.cat(ys) if len(ys) > 1 else ys[0]

    @torch.no_grad()
    def _take_groups(self, x: Tensor, seen: list[tuple[Tensor, Tensor, Tensor]], processes: Any) -> None:
        """Remember as one batch what was seen of the groups of x, which may be empty, and of other processes'."""
        n = values_per_channel(x)
        if seen:
            mu, s2, _ = self.together(*(torch.cat(each) for each in zip(*seen, strict=True)))
        else:
            mu = s2 = torch.zeros(self.num_features, device=x.device, dtype=statistics_dtype(x.dtype))
        if processes is None:
            self.take(mu, s2, n)
            return
        mu, s2, total = self.together(*gathered(mu, s2, mu.new_full((1,), n), processes))
        if n == 0 and not is_capturing(x) and int(total.item()) == 0:
            self.normalize_empty(x, True)
        else:
            self.take(mu, s2, total.reshape(1))

    def take(self, mu: Tensor, s2: Tensor, n: int | Tensor) -> None:
        """Remember a batch: now, or at the end of the second forward with what other calls of the layer have noted."""
        if not self.waits:
            self.enter(mu, s2, n)
            return
        notes = (*self.noted, (mu, s2, n))
        # Code would be compiled again for every other number of notes.
        self.noted = (one_note(notes),) if torch.compiler.is_compiling() else notes

    @property
    def waits(self) -> bool:
        """Whether this forward only notes its batch, which `enter_noted` or an `AllMemories` enters later.

        A replica of nn.DataParallel is gone after its forward; the first one writes into the layer's own buffers.
        """
        return (self.phase == "second" or self.deferred) and not self._is_replica

    def joint_batch(self, x: Tensor) -> Joint | None:
        """The joint batch that x is a part of; None where x is the whole batch."""
        group = self.joint_group()
        return None if group is None else Joint(*joint_moments(x, group), group)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, int | Tensor]:
        """mu, s2 and n by which a training forward would normalise x: of this process's batch, or of the joint one."""
        joint = self.joint_batch(x)
        return (*batch_moments(x), values_per_channel(x)) if joint is None else (joint.mu, joint.s2, joint.n)

    @torch.no_grad()
    def _add_to_tally(self, x: Tensor, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        """Take the values of x into their mean, variance and number (Chan et al. 1979), in place.

        A batch that is empty (in all processes), or whose moments are not finite in a channel, is left out.
        """
        if x.numel() == 0 and self.joint_group() is None:
            return
        new_mean, new_variance, new_n = self.moments(x)
        finite = (new_mean.isfinite() & new_variance.isfinite()).all()
        new_mean, new_variance = (torch.where(finite, new, 0) for new in (new_mean, new_variance))
        counted = finite.to(n.dtype) * new_n
        n += counted
        share = counted / n.clamp(min=1)
        distance = new_mean - mean
        mean += share * distance
        variance.mul_(1 - share).add_(share * new_variance).add_(share * (1 - share) * distance.square())

    @torch.no_grad()
    def training_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and sqrt(variance + eps) (C,) that would normalise x in training now. Changes nothing.

        With group_size they have a row for each group, and none for an empty x.
        """
        if self.group_size is None:
            return self.normalizing(*self.moments(x))
        if x.numel() == 0:
            none = self.running_mean.new_zeros(0, self.num_features, dtype=statistics_dtype(x.dtype))
            return none, none
        rows = []
        for part, groups in self._groups(x):
            mu, s2 = (each.view(groups, -1) for each in batch_moments(side_by_side(part, groups)))
            rows.append(self.normalizing(mu, s2, values_per_channel(part) // groups))
        means, sigmas = zip(*rows, strict=True)
        return torch.cat(means), torch.cat(sigmas)

    def renormalize(self, x: Tensor, mu: Tensor, s2: Tensor, r: Tensor, d: Tensor, joint: Joint | None) -> Tensor:
        """y = gamma ((x - mu) / sqrt(s2 + eps) * r + d) + beta, with mu and s2 of x, or of the joint batch."""
        weight, bias = self._affine(x)
        if joint is None:
            return renormalized_batch_norm(x, mu, s2, r, d, weight, bias, self.eps)
        return joint_batch_norm(x, mu, s2, 1 / joint.n, weight, bias, self.eps, joint.group, r, d)

    def _note_first_forward(self) -> None:
        """Keep what `eval()` and `second_forward` need to know to warn of a second forward that is missing."""
        if torch.compiler.is_compiling():
            self._forgotten = True  # without reading anything: code would be compiled again for another value
            return
        self._forgotten = self._forgotten or self._waiting
        self._waiting = True
        if not self.forward_versions and torch.is_grad_enabled():
            self.forward_versions = self.versions()

    def second_forward_was_run(self) -> None:
        """Called after each second forward, whether it used the layer or not."""
        self._waiting = self._forgotten = False
        self._second_run = True

    def _forget_forwards(self) -> None:
        """Take the layer for a new one: no second forward is missing."""
        self.forward_versions, self.second_versions = (), ()
        self._waiting = self._forgotten = self._second_run = False

    def joint_group(self) -> Any:
        """The processes over which training takes this layer's statistics; None for this one alone."""
        if not several_processes():
            return None
        if not self.sync:
            self._tell_of_processes()
            return None
        group = self.process_group or dist.group.WORLD
        size = dist.get_world_size(group)
        if size < 1:
            raise RuntimeError("this process is not in process_group: give the layers of each process its own group")
        if size > 1 and not torch.compiler.is_compiling() and is_transformed():
            raise RuntimeError("sync=True does not work under torch.func and forward-mode AD: use sync=False there")
        return group if size > 1 else None

    def _tell_of_processes(self) -> None:
        if self.sync is None and not torch.compiler.is_compiling() and several_processes():
            warn_once(OF_PROCESSES)

    @property
    def process_group(self) -> Any:
        """The processes of sync=True; None for all."""
        return self._process_group.value

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """gamma and beta in the statistics' precision, as torch's kernels need them for an x in half precision."""
        dtype = statistics_dtype(x.dtype)
        weight = None if self.weight is None else self._for_each(x, in_dtype(self.weight, dtype))
        return weight, None if self.bias is None else self._for_each(x, in_dtype(self.bias, dtype))

    def _for_each(self, x: Tensor, statistic: Tensor) -> Tensor:
        """A (C,) tensor for an x of k C channels, which are k batches side by side."""
        if torch.jit.is_tracing() and not (self.training and self.group_size):  # a trace warns of what depends on sizes
            return statistic
        batches = x.shape[1] // self.num_features
        return statistic if batches == 1 else statistic.repeat(batches)

    def versions(self) -> tuple[tuple[int, int], ...]:
        """Which tensors gamma and beta are, and how often each was written, as autograd counts it: their versions.

        Only of parameters: what stands in for one (under torch.func, or a parametrization) says nothing about the
        optimiser's step. Inference tensors have no version.
        """
        return tuple(
            (id(p), p._version)
            for p in (self.weight, self.bias)
            if isinstance(p, nn.Parameter) and not p.is_inference()
        )

    def train(self, mode: bool = True) -> Self:
        if self.frozen:
            self.unfrozen_mode, mode = mode, False
        if mode:
            self._tell_of_processes()  # which compiled code cannot
        if not mode and self._waiting | self._forgotten:
            stepped = bool(self.forward_versions) and self.versions() != self.forward_versions
            # Several forwards alone say it only where there never was a second one: a generator may have some between.
            if stepped or (self._forgotten and not self._second_run):
                warn_once(FORGOTTEN)
            self._waiting = self._forgotten = False
        return super().train(mode)

    # Settings that a schedule changes.

    def scheduled_values(self) -> tuple[float, ...]:
        """The numbers in the buffer `scheduled`: as they were set where it still holds them, else as it holds them."""
        tensor: Tensor = getattr(self, self.scheduled)
        try:
            values = tensor.flatten().tolist()
        except (RuntimeError, NotImplementedError):  # on the meta device, or under a transform: there are none to read
            return self.known
        rounded = torch.tensor(self.known, dtype=tensor.dtype, device="cpu").tolist()  # not the default device
        return tuple(
            known if value == as_held else _shortest(value, tensor.dtype)
            for known, as_held, value in zip(self.known, rounded, values, strict=True)
        )

    @torch.no_grad()
    def set_scheduled_values(self, *values: float) -> None:
        """Put new numbers into the buffer `scheduled`, in place."""
        self.known = values
        tensor: Tensor = getattr(self, self.scheduled)
        for element, value in zip(tensor.view(-1), values, strict=True):
            element.fill_(value)

    # State.

    def _apply(self, fn, recurse: bool = True):
        kept = {name: getattr(self, name) for name in self.statistics}
        values = self.scheduled_values() if self.scheduled else ()
        self.deferred = False  # its buffers are its own again
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            wide = statistics_dtype(after.dtype)
            if after.dtype != wide:
                # Cast the tensor from before: on the way through half precision it would lose bits.
                setattr(self, name, before.to(device=after.device, dtype=wide))
        if values:  # in float64 they would keep float32's rounding, and after to_empty there is nothing
            self.set_scheduled_values(*values)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Load a state in at least float32, with the layer's own schedule's values where it has none."""
        for name in self.statistics:
            value = state_dict.get(prefix + name)
            if value is not None and value.dtype.itemsize < 4:
                state_dict[prefix + name] = value.float()
        like = state_dict.get(prefix + "running_mean")
        if self.scheduled and like is not None and prefix + self.scheduled not in state_dict:
            own: Tensor = getattr(self, self.scheduled)
            values = torch.tensor(self.scheduled_values(), dtype=own.dtype, device=like.device)
            state_dict[prefix + self.scheduled] = values.reshape(own.shape)
        if args[0].get("assign_to_params_buffers"):
            self.deferred = False  # its buffers are its own again
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._forget_forwards()

    def __prepare_scriptable__(self) -> "BatchStatisticsNorm":
        raise RuntimeError(
            f"torch.jit.script cannot read {type(self).__name__}: script to_batch_norm(model), which is equal in eval "
            "mode, or use torch.export or torch.jit.trace"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy enters its batches on its own, and not in a second forward that someone else has begun.
        self.deferred = False
        self.phase, self.noted, self.tally = "first", (), None
        self._forget_forwards()

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in self.settings]
        if self.sync:
            shown.append("sync=True")
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}, {', '.join(shown)}"


class _Shared:
    """Holds a process group, which a deep copy of the layer shares because it cannot be copied."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def in_backward() -> bool:
    """Whether autograd is at work in this thread: a forward is then one that activation checkpointing repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_trained(mean: Tensor, var: Tensor, tracked: Tensor | None) -> bool:
    """Whether a BatchNorm's running statistics come from data. The counter alone does not say so: files may lack it.

    A new BatchRenorm becomes a BatchNorm of variance 1 - eps, which is not from data either.
    """
    if mean.is_meta or isinstance(mean, FakeTensor) or not bool((mean.isfinite() & var.isfinite()).all()):
        return False
    return (tracked is not None and bool(tracked > 0)) or bool(((mean != 0) | ((var - 1).abs() > 0.01)).any())


def _shortest(value: float, dtype: torch.dtype) -> float:
    """The decimal number of fewest digits that is this value in dtype: 0.9 and not 0.8999999761581421."""
    decimals = (float(f"{value:.{digits}g}") for digits in range(6, 18))
    return next((d for d in decimals if torch.tensor(d, dtype=dtype, device="cpu").item() == value), value)


FORGOTTEN = (
    "eval() follows training forwards that remembered nothing (forwards=2), so evaluation uses statistics from before "
    "them: call second_forward(model, inputs) after each optimizer.step()"
)
REPEATED = (
    "a forward was repeated in the backward pass (activation checkpointing), where layers with forwards=1 meet a "
    "memory that holds the batch already: gradients are wrong; use convert(..., forwards=2) and second_forward"
)
OF_PROCESSES = (
    "there are several processes, and each takes the statistics of mbn's layers over its own batch (also after "
    "convert_sync_batchnorm): convert(model, sync=True) takes them over all processes; to keep one memory a process, "
    "say sync=False and let DistributedDataParallel broadcast no buffers: forward_sync_buffers=False, or "
    "broadcast_buffers=False in an older torch"
)


# Folders whose lines no warning names: torch's, and ours.
_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


@functools.cache
def warn_once(text: str) -> None:
    """Warn only once in a process: otherwise every layer, in every iteration, would warn of the same mistake.

    The warning names the line of the user's own code by which it came about.
    """
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)


def norm_layers(module: nn.Module) -> list[BatchStatisticsNorm]:
    """All of our layers with batch statistics inside module, each once, in the order of registration.

    Errors: TypeError where module is no nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a module is needed, such as Network(), and not {module!r}")
    return [layer for layer in module.modules() if isinstance(layer, BatchStatisticsNorm)]
