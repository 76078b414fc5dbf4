"""Calls whose policy is decided inside the kernels: two launches forward, two backward.

One each way where a program holds a whole channel. Inference is one launch, and so is its backward
where no parameter needs a gradient. Calls of one kind are launched by what their first one noted
(replay.py); a call makes its results and fills in addresses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import Call, Gradients, Groups, Keep, Packed, Saved
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
from .plan import alike
from .policies import ROWS
from .replay import Replay
from .stages import (
    KEPT,
    Read,
    new_rows,
    parts_and_tickets,
    plan_of,
    run_apply,
    run_moments,
)

NAMES: dict[type[Policy], str] = {
    Batch: "batch", Ghost: "batch", Steady: "steady", Running: "running", Renorm: "renorm",
}  # fmt: skip
"""What the kernels call the rule of a policy; Ghost is the batch's, group by group."""


class Kind:
    """What calls have in common that differ in nothing but values and addresses."""

    def __init__(self, call: Call) -> None:
        x, residual = call.x, call.residual
        self.plan = plan_of(x, call.groups)
        self.groups: Groups = call.groups
        self.starts = plans.starts(self.plan.groups, x.device)
        self.eps, self.activation = call.eps, call.activation
        self.residual_dtype = None if residual is None else residual.dtype
        self.measured = not call.by_running
        """Whether gradient flows through the statistics."""
        self.kept = Keep.needed(call.activation, residual=residual is not None, compiled=True)
        self.decision = None if call.by_running else _decision(call)
        self.forward: Replay | None = None
        self.backward: dict[Any, Replay | None] = {}


_kinds: dict[Any, Kind] = {}
MOST_KINDS = 4096


def kind_of(call: Call) -> Kind:
    """The kind of a call that the backend supports."""
    x, residual, mask = call.x, call.residual, call.mask
    weight, bias, memory = call.weight, call.bias, call.memory
    key = (
        x.shape, x.stride(), x.dtype, x.device, call.groups, call.policy, call.activation,
        call.momentum, call.eps, call.gradient, None if residual is None else residual.stride(),
        mask is None, call.running_mean is None, call.num_batches_tracked is None,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        None if memory is None else memory.state.dtype,
    )  # fmt: skip
    found = _kinds.get(key)
    if found is None:
        if len(_kinds) >= MOST_KINDS:
            _kinds.clear()
        found = _kinds[key] = Kind(call)
    return found


class Rest(NamedTuple):
    """What a forward leaves for its backward, but for tensors."""

    kind: Kind
    memory: Memory | None


def decidable(call: Call) -> bool:
    """Whether the kernels can take the decision that the call would."""
    if call.by_running:
        return call.__class__ is Call and call.groups is None
    if call.policy.__class__ not in NAMES or not call.by_policy_alone():
        return False
    if call.momentum is None and call.running_mean is not None and call.num_batches_tracked is None:
        return False  # refused, in words, where the call decides
    memory = call.memory
    # With a mask the number of samples that it leaves is one reduction more.
    return memory is None or (call.mask is None and memory.__class__ is Memory
                              and memory.state.is_contiguous())  # fmt: skip


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


def forward(call: Call) -> tuple[Tensor, Packed]:
    """y, and what the backward needs; a training call moves the running statistics."""
    kind, x = kind_of(call), call.x
    residual = None if call.residual is None else alike(call.residual, x)
    mask = None if call.mask is None else call.mask.contiguous()
    p, y = kind.plan, torch.empty_like(x)
    signs = None
    if kind.kept is Keep.SIGNS and call.gradient:
        signs = torch.empty(kind.plan.sign_bytes, dtype=torch.uint8, device=x.device)
    keeps = call.gradient or kind.measured
    rows = new_rows(x, ROWS, call.groups) if keeps else None
    running = (call.running_mean, call.running_var, call.num_batches_tracked)
    parts = tickets = None
    if kind.measured:
        parts, tickets = parts_and_tickets(x, p, 4)
        if p.whole:
            tickets = plans.tickets(1, x.device)
    tensors = (
        x, residual, mask, y, signs, kind.starts, parts, tickets, rows, call.weight, call.bias,
        *running,
    )  # fmt: skip
    kind.forward = replay.run(kind.forward, tensors, x, _launch_forward, kind, *tensors)
    if kind.measured:
        torch.autograd.graph.increment_version([t for t in running if t is not None])
        if call.memory is not None and call.policy is not None:
            call.memory.rate = call.policy.gradient_rate(x.shape[0])
    kept = kind.kept
    saved = (
        x, call.weight, call.bias, residual if kept is Keep.REBUILT else None, mask,
        y if kept is Keep.OUTPUT else None, signs, rows,
    )  # fmt: skip
    return y, (saved, Rest(kind, call.memory))


def _launch_forward(
    kind: Kind, x: Tensor, residual: Tensor | None, mask: Tensor | None, y: Tensor,
    signs: Tensor | None, starts: Tensor | None, parts: Tensor | None, tickets: Tensor | None,
    rows: Tensor | None, *parameters: Tensor | None,
) -> None:  # fmt: skip
    p, fixed = kind.plan, kind.decision is None
    if kind.decision is not None:
        assert rows is not None
        *numbers, constants = kind.decision
        if p.whole:
            replay.launch(
                visit.normalize, p, x, x, residual, mask, y, signs, tickets, rows, *parameters,
                kind.eps, *numbers, *p.sizes()[:3], ACT=kind.activation, **constants, **p.held(),
                **p.tile(bits=True),
            )  # fmt: skip
            return
        run_moments(x, p, parts, tickets, starts, rows, mask, *parameters, kind.eps, *numbers,
                    **constants)  # fmt: skip
    run_apply(x, p, y, starts, rows, residual, kind.activation, signs, *parameters, kind.eps,
              fixed=fixed)  # fmt: skip


def backward(saved: Packed, grad: Tensor, needs: Any) -> Gradients:
    """The gradients, all work per channel inside the kernels."""
    (x, weight, bias, residual, mask, y, signs, rows), (kind, memory) = saved
    need_x, need_weight, need_bias, need_residual = needs
    p, groups, activation = kind.plan, kind.groups, kind.activation
    grad = alike(grad, x)
    through = need_x and kind.measured
    whole, sums = through and p.whole, through or need_weight or need_bias
    dx = torch.empty_like(x) if need_x else None
    dresidual = torch.empty_like(x) if need_residual and activation is not None else None
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty_like(bias) if need_bias else None
    before, state, rate, first = _memory(memory if through else None)
    parts = tickets = maps = None
    if sums and not whole:
        parts, tickets = parts_and_tickets(x, p, 2, backward=True)
        maps = new_rows(x, 2, groups) if through else None
    tensors = (
        grad, x, y if residual is None else residual, signs, mask, dx, dresidual, kind.starts,
        parts, tickets, rows, maps, dweight, dbias, before, state,
    )  # fmt: skip
    key = (needs, first, rate)
    kind.backward[key] = replay.run(
        kind.backward.get(key), tensors, x, _launch_backward, kind, whole, sums, first, rate,
        *tensors,
    )  # fmt: skip
    same = need_residual and activation is None
    return dx, dweight, dbias, grad if same else dresidual


def _launch_backward(
    kind: Kind, whole: bool, sums: bool, first: bool, rate: float, grad: Tensor, x: Tensor,
    extra: Tensor | None, signs: Tensor | None, mask: Tensor | None, dx: Tensor | None,
    dresidual: Tensor | None, starts: Tensor | None, parts: Tensor | None, tickets: Tensor | None,
    rows: Tensor, maps: Tensor | None, *results: Tensor | None,
) -> None:  # fmt: skip
    p = kind.plan
    read = Read(x, p, (grad, x, extra, signs), starts, kind.activation, KEPT[kind.kept])
    if whole:
        replay.launch(
            visit.normalize_grad, p, read.x, *read.tensors, mask, dx, dresidual, rows, *results,
            rate, *p.sizes()[:3], FIRST=first, **read.constants(),
        )  # fmt: skip
        return
    if sums:
        read.reduce(parts, tickets, rows, None, maps, *results, rate, first=first)
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


def unpack(tensors: Any, rest: Rest) -> Saved:
    """What a forward left, as the stages leave it."""
    x, weight, bias, residual, mask, y, signs, rows = tensors
    kind = rest.kind
    rows = rows if kind.groups is not None else rows[:, 0]

    def row(k: Any) -> Tensor:
        found: Tensor = rows[k.value]
        return found

    batch = None
    if kind.measured:
        count = row(policies.COUNT)[..., :1]
        means = (policies.MEAN, policies.VAR, policies.MEAN_LOW)
        batch = Moments(count, *(row(k) for k in means))
    normal = ("CENTER", "CENTER_LOW", "SPREAD", "GAIN", "OFFSET", "SHARE")
    normalizer = Normalizer(*(row(getattr(policies, name)) for name in normal))
    known = Coefficients(
        *(row(getattr(policies, name)) for name in ("CENTER", "SCALE", "SHIFT", "RHO"))
    )
    return Saved(
        x, weight, bias, residual, mask, y, signs, batch, normalizer, known, kind.eps,
        kind.activation, kind.groups, None, kind.residual_dtype, rest.memory,
    )  # fmt: skip
