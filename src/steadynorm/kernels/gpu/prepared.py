"""Calls whose policy is decided inside the kernels: two launches forward, two backward.

One each way where a program holds a whole channel. Inference is one launch, and so is its backward
where no parameter needs a gradient. Calls of one kind are launched by what their first one noted
(replay.py); a call makes its results and fills in addresses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.reference import Groups
from steadynorm.kernels.reference.closed_form import Planned
from steadynorm.kernels.reference.differentiable import as_saved
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import Call, Gradients, Keep, Packed, Saved
from steadynorm.statistics import (
    Batch,
    Coefficients,
    Ghost,
    Moments,
    Normalizer,
    Policy,
    Renorm,
    Running,
    Steady,
)

from . import plan as plans
from . import policies, replay, visit
from .plan import laid_out_as
from .policies import ROWS
from .replay import ALIGNED, Replay, is_current
from .stages import KEPT, Read, partial_values, plan_of, run_apply, run_moments

FLOAT, MAPS = 4, 2
"""Bytes of a value of the rows; rows of the backward's map, slope and constant."""

NAMES: dict[type[Policy], str] = {
    Batch: "batch", Ghost: "batch", Steady: "steady", Running: "running", Renorm: "renorm",
}  # fmt: skip
"""What the kernels call the rule of a policy; Ghost is the batch's, group by group."""


class Kind:
    """What calls have in common that differ in nothing but values and addresses.

    A forward keeps one tensor for its backward, of x's type: the rows that policies.py names, two
    more for the map of the backward, then the sign bits where they serve.
    """

    def __init__(self, call: Call) -> None:
        x, residual = call.x, call.residual
        self.plan = plan = plan_of(x, call.groups)
        self.strides = x.stride()
        self.groups: Groups = call.groups
        self.starts = plans.starts(plan.groups, x.device)
        self.eps, self.activation = call.eps, call.activation
        self.residual_dtype = None if residual is None else residual.dtype
        self.copies_residual = residual is not None and residual.stride() != x.stride()
        self.measured = not call.by_running
        """Whether gradient flows through the statistics."""
        self.kept = Keep.needed(call.activation, residual=residual is not None, compiled=True)
        self.decision = None if call.by_running else _decision(call)
        row = len(call.groups or (0,)) * x.shape[1]
        self.maps_at = ROWS * row * FLOAT
        self.signs_at = -(-(ROWS + MAPS) * row * FLOAT // ALIGNED) * ALIGNED
        self.sign_bytes = plan.sign_bytes if self.kept is Keep.SIGNS else 0
        self.values = -(-(self.signs_at + self.sign_bytes) // x.element_size())
        self.shape = (len(call.groups or (0,)), x.shape[1])
        self.tickets, self.partials = self._workspace(x)
        """What a reduction of the forward needs; no tickets where no program waits for others."""
        self.partials_of_backward = partial_values(x, plan, 2)
        # Without and with a backward to follow; and by what the backward is asked for.
        self.replays_forward: list[Replay | None] = [None, None]
        self.replays_backward: dict[Any, Replay | None] = {}

    def _workspace(self, x: Tensor) -> tuple[int, int]:
        if self.decision is None:
            return 0, 0
        if self.plan.whole:  # one program waits for the others where these may read what it moves
            waits = self.decision.constants["COUNTS"] or self.decision.constants["FIRST"]
            return int(waits), 0
        return (0, 0) if self.plan.alone else (self.plan.blocks, partial_values(x, self.plan, 4))

    def views(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows (ROWS, G, C), the map's rows (2, G, C) and the sign bits of what a forward keeps."""
        raw = kept.view(torch.uint8)
        rows = raw[: self.maps_at].view(torch.float32).view(ROWS, *self.shape)
        maps = raw[self.maps_at :][: self.maps_at // ROWS * MAPS].view(torch.float32)
        signs = raw[self.signs_at :][: self.sign_bytes] if self.sign_bytes else None
        return rows, maps.view(MAPS, *self.shape), signs

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y, and what the backward needs; a training call moves the running statistics."""
        x, residual, mask = call.x, call.residual, call.mask
        if self.copies_residual and residual is not None:
            residual = laid_out_as(residual, x)
        if mask is not None:
            mask = mask.contiguous()
        gradient = call.gradient
        y = torch.empty_like(x)
        kept = x.new_empty(self.values) if gradient or self.measured else None
        weight, bias, mean, var = call.weight, call.bias, call.running_mean, call.running_var
        batches, stream, space = call.num_batches_tracked, plans.stream_of(x), None
        if self.tickets:
            space = plans.workspace(x, stream, self.tickets, self.partials)
        again = self.replays_forward[gradient]
        # Written out: a loop over the tensors takes 0.8 µs more.
        if again is None or not (is_current(x) and again(stream, (
            x.data_ptr(), 0 if residual is None else residual.data_ptr(),
            0 if mask is None else mask.data_ptr(), y.data_ptr(),
            0 if kept is None else kept.data_ptr() + self.signs_at,
            0 if self.starts is None else self.starts.data_ptr(),
            *((0, 0) if space is None else space.addresses),
            0 if kept is None else kept.data_ptr(),
            0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if mean is None else mean.data_ptr(), 0 if var is None else var.data_ptr(),
            0 if batches is None else batches.data_ptr(),
        ))):  # fmt: skip
            rows, _, signs = (None,) * 3 if kept is None else self.views(kept)
            tensors = (
                x, residual, mask, y, signs if gradient else None, self.starts,
                *((None, None) if space is None else space[:2]), rows, weight, bias, mean, var,
                batches,
            )  # fmt: skip
            if again is None:
                self.replays_forward[gradient] = replay.note(
                    tensors, _launch_forward, self, *tensors
                )
            else:
                _launch_forward(self, *tensors)
        if self.measured:
            if mean is not None and var is not None:
                written = (mean, var) if batches is None else (mean, var, batches)
                torch.autograd.graph.increment_version(written)
            if call.memory is not None and call.policy is not None:
                call.memory.rate = call.policy.gradient_rate(x.shape[0])
        saved = (
            x, weight, bias, residual if self.kept is Keep.REBUILT else None, mask,
            y if self.kept is Keep.OUTPUT else None, kept,
        )  # fmt: skip
        return y, (saved, Planned(self, self.eps, call.memory))

    def backward(self, tensors: Any, left: Planned, grad: Tensor, needs: Any) -> Gradients:
        """The gradients, all work per channel inside the kernels."""
        x, weight, bias, residual, mask, y, kept = self._as_saved(*tensors)
        memory = left.memory
        need_x, need_weight, need_bias, need_residual = needs
        plan, grad = self.plan, laid_out_as(grad, x)
        through = need_x and self.measured
        whole, sums = through and plan.whole, through or need_weight or need_bias
        dx = torch.empty_like(x) if need_x else None
        dresidual = torch.empty_like(x) if need_residual and self.activation is not None else None
        dweight = torch.empty_like(weight) if need_weight else None
        dbias = torch.empty_like(bias) if need_bias else None
        before, state, rate, first = _memory(memory if through else None)
        stream, space, extra = plans.stream_of(x), None, y if residual is None else residual
        if sums and not whole:
            space = plans.workspace(x, stream, plan.blocks, self.partials_of_backward)
        first_kept, has_maps = kept.data_ptr(), through and not whole
        key = needs if memory is None else (needs, first, rate)
        again = self.replays_backward.get(key)
        if again is None or not (is_current(x) and again(stream, (
            grad.data_ptr(), x.data_ptr(), 0 if extra is None else extra.data_ptr(),
            first_kept + self.signs_at, 0 if mask is None else mask.data_ptr(),
            0 if dx is None else dx.data_ptr(), 0 if dresidual is None else dresidual.data_ptr(),
            0 if self.starts is None else self.starts.data_ptr(),
            *((0, 0) if space is None else space.addresses), first_kept, first_kept + self.maps_at,
            0 if dweight is None else dweight.data_ptr(), 0 if dbias is None else dbias.data_ptr(),
            0 if before is None else before.data_ptr(), 0 if state is None else state.data_ptr(),
        ))):  # fmt: skip
            rows, maps, signs = self.views(kept)
            launched = (
                grad, x, extra, signs, mask, dx, dresidual, self.starts,
                *((None, None) if space is None else space[:2]), rows, maps if has_maps else None,
                dweight, dbias, before, state,
            )  # fmt: skip
            launches = (self, whole, sums, first, rate, *launched)
            if again is None:
                self.replays_backward[key] = replay.note(launched, _launch_backward, *launches)
            else:
                _launch_backward(*launches)
        same = need_residual and self.activation is None
        return dx, dweight, dbias, grad if same else dresidual

    def unpack(self, tensors: Any, left: Planned) -> Saved:
        """What a forward left, as the stages leave it."""
        x, weight, bias, residual, mask, y, kept = self._as_saved(*tensors)
        rows, _, signs = self.views(kept)
        rows = rows if self.groups is not None else rows[:, 0]

        def row(k: Any) -> Tensor:
            found: Tensor = rows[k.value]
            return found

        batch = None
        if self.measured:
            count = row(policies.COUNT)[..., :1]
            means = (policies.MEAN, policies.VAR, policies.MEAN_LOW)
            batch = Moments(count, *(row(k) for k in means))
        normal = ("CENTER", "CENTER_LOW", "SPREAD", "GAIN", "OFFSET", "SHARE")
        normalizer = Normalizer(*(row(getattr(policies, name)) for name in normal))
        known = Coefficients(
            *(row(getattr(policies, name)) for name in ("CENTER", "SCALE", "SHIFT", "RHO"))
        )
        return Saved(
            x, weight, bias, residual, mask, y, signs, batch, normalizer, known, self.eps,
            self.activation, self.groups, None, self.residual_dtype, left.memory,
        )  # fmt: skip

    def _as_saved(
        self, x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, y: Any, kept: Any
    ) -> tuple[Any, ...]:
        """The forward's tensors in the layout that the kernels read."""
        x = as_saved(x, self.strides)
        y, residual = (t if t is None else as_saved(t, self.strides) for t in (y, residual))
        return x, weight, bias, residual, mask, y, kept


KINDS: dict[Any, Kind] = {}
"""By `key_of`."""
MOST_KINDS = 4096


def key_of(call: Call) -> tuple[Any, ...]:
    """What tells a call's kind."""
    x, residual = call.x, call.residual
    weight, bias, mean, memory = call.weight, call.bias, call.running_mean, call.memory
    return (
        x.shape, x.stride(), x.dtype, x.device, call.groups, call.policy, call.activation,
        call.momentum, call.eps, None if residual is None else residual.stride(),
        call.mask is None, None if mean is None else mean.dtype, call.num_batches_tracked is None,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        None if memory is None else memory.state.dtype,
    )  # fmt: skip


def kind_of(call: Call) -> Kind:
    """The kind of a call that the backend supports."""
    key = key_of(call)
    found = KINDS.get(key)
    if found is None:
        if len(KINDS) >= MOST_KINDS:
            KINDS.clear()
        found = KINDS[key] = Kind(call)
    return found


def decidable(call: Call) -> bool:
    """Whether the kernels can take the decision that the call would."""
    if call.by_running:
        return call.__class__ is Call and call.groups is None
    if call.policy.__class__ not in NAMES or not call.by_policy_alone():
        return False
    if call.momentum is None and call.running_mean is not None and call.num_batches_tracked is None:
        return False  # refused, in words, where the call decides
    memory = call.memory
    if call.mask is not None and call.policy.counts_samples:
        return False  # the number of samples that it leaves is one reduction more
    return memory is None or (memory.__class__ is Memory and memory.state.is_contiguous())


class _Decision(NamedTuple):
    """The arguments of `policies.decide` that a call's settings give."""

    pace: float
    prior: float
    known: float
    constants: dict[str, Any]


def _decision(call: Call) -> _Decision:
    policy, momentum = call.policy, call.momentum
    pace, prior, known, samples = momentum or 0.0, 0.0, -1.0, call.x.shape[0]
    tracked = call.running_mean is not None and call.num_batches_tracked is not None
    first = momentum is None
    assert policy is not None
    constants: dict[str, Any] = {"POLICY": NAMES[type(policy)]}
    if isinstance(policy, Steady):
        pace, prior, first = samples / (samples + policy.horizon), policy.prior, True
        known = -1.0 if policy.window is None else float(samples)
    elif isinstance(policy, Running):
        first = True
    elif isinstance(policy, Renorm):
        constants |= {
            "R_MAX": float(policy.r_max), "D_MAX": float(policy.d_max), "WARMUP": policy.warmup,
            "R_RAMP": max(policy.r_ramp, 1), "D_RAMP": max(policy.d_ramp, 1),
        }  # fmt: skip
    constants |= {"FIRST": first and tracked, "COUNTS": tracked and policy.counts_batches}
    return _Decision(pace, prior, known, constants)


def _launch_forward(
    kind: Kind, x: Tensor, residual: Tensor | None, mask: Tensor | None, y: Tensor,
    signs: Tensor | None, starts: Tensor | None, tickets: Tensor | None, partials: Tensor | None,
    rows: Tensor | None, *parameters: Tensor | None,
) -> None:  # fmt: skip
    plan, fixed = kind.plan, kind.decision is None
    if kind.decision is not None:
        assert rows is not None
        *numbers, constants = kind.decision
        if plan.whole:
            replay.launch(
                visit.normalize, plan, x, x, residual, mask, y, signs, tickets, rows, *parameters,
                kind.eps, *numbers, *plan.sizes()[:3], ACT=kind.activation, **constants,
                **plan.held(), **plan.tile(bits=True),
            )  # fmt: skip
            return
        run_moments(x, plan, partials, tickets, starts, rows, mask, *parameters, kind.eps, *numbers,
                    **constants)  # fmt: skip
    run_apply(x, plan, y, starts, rows, residual, kind.activation, signs, *parameters, kind.eps,
              fixed=fixed)  # fmt: skip


def _launch_backward(
    kind: Kind, whole: bool, sums: bool, first: bool, rate: float, grad: Tensor, x: Tensor,
    extra: Tensor | None, signs: Tensor | None, mask: Tensor | None, dx: Tensor | None,
    dresidual: Tensor | None, starts: Tensor | None, tickets: Tensor | None,
    partials: Tensor | None, rows: Tensor, maps: Tensor | None, *results: Tensor | None,
) -> None:  # fmt: skip
    plan = kind.plan
    read = Read(x, plan, (grad, x, extra, signs), starts, kind.activation, KEPT[kind.kept])
    if whole:
        replay.launch(
            visit.normalize_grad, plan, read.x, *read.tensors, mask, dx, dresidual, rows, *results,
            rate, *plan.sizes()[:3], FIRST=first, **read.constants(),
        )  # fmt: skip
        return
    if sums:
        read.reduce(partials, tickets, rows, None, maps, *results, rate, first=first, mask=mask)
    if dx is not None or dresidual is not None:
        read.map(rows, maps, mask, dx, dresidual)


def _memory(memory: Memory | None) -> tuple[Tensor | None, Tensor | None, float, bool]:
    """What `policies.remember` reads and writes, and whether this is the first backward pass."""
    if memory is None:
        return None, None, 0.0, True
    first, state = memory.before is None, memory.state
    if memory.before is None:
        memory.before = torch.empty(state.shape, dtype=torch.float32, device=state.device)
        torch.autograd.graph.increment_version([state])
    return memory.before, state, float(memory.rate), first
