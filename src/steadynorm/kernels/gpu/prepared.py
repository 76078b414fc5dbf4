"""Calls whose policy is decided inside the kernels: two launches forward, two backward.

One each way where a program holds a whole channel. Inference is one launch, and so is its backward
where no parameter needs a gradient.
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
from . import policies, visit
from .plan import Plan, alike, empty_like
from .policies import ROWS
from .stages import Read, empty_signs, launch, new_rows, plan_of, run_apply, run_moments

NAMES: dict[type[Policy], str] = {
    Batch: "batch", Ghost: "batch", Steady: "steady", Running: "running", Renorm: "renorm",
}  # fmt: skip
"""What the kernels call the rule of a policy; Ghost is the batch's, group by group."""


class Rest(NamedTuple):
    """What a forward leaves for its backward, but for tensors."""

    plan: Plan
    eps: float
    activation: str | None
    groups: Groups
    residual_dtype: torch.dtype | None
    memory: Memory | None
    measured: bool
    """Whether gradient flows through the statistics."""


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
    x, residual, groups = call.x, call.residual, call.groups
    residual = None if residual is None else alike(residual, x)
    kept = Keep.needed(call.activation, residual=residual is not None, compiled=True)
    p, y = plan_of(x, groups), empty_like(x)
    signs = empty_signs(x, groups) if kept is Keep.SIGNS and call.gradient else None
    keeps = call.gradient or not call.by_running
    rows = new_rows(x, ROWS, groups) if keeps else None
    mask = None if call.mask is None else call.mask.contiguous()
    running = (call.running_mean, call.running_var, call.num_batches_tracked)
    parameters = (call.weight, call.bias, *running)
    if not call.by_running:
        assert rows is not None
        *numbers, constants = _decision(call)
        if p.whole:
            launch(
                visit.normalize, p, x, x, residual, mask, y, signs, plans.tickets(1, x.device),
                rows, *parameters, call.eps, *numbers, *p.sizes()[:3], ACT=call.activation,
                **constants, **p.held(), **p.tile(bits=True),
            )  # fmt: skip
        else:
            run_moments(x, p, rows, mask, *parameters, call.eps, *numbers, **constants)
        torch.autograd.graph.increment_version([t for t in running if t is not None])
        if call.memory is not None and call.policy is not None:
            call.memory.rate = call.policy.gradient_rate(x.shape[0])
    if call.by_running or not p.whole:
        run_apply(
            x, p, y, rows, residual, call.activation, signs, *parameters, call.eps,
            fixed=call.by_running,
        )  # fmt: skip
    dtype = None if residual is None else residual.dtype
    tensors = (
        x, call.weight, call.bias, residual if kept is Keep.REBUILT else None, mask,
        y if kept is Keep.OUTPUT else None, signs, rows,
    )  # fmt: skip
    rest = Rest(p, call.eps, call.activation, groups, dtype, call.memory, not call.by_running)
    return y, (tensors, rest)


def backward(saved: Packed, grad: Tensor, needs: Any) -> Gradients:
    """The gradients, all work per channel inside the kernels."""
    (x, weight, bias, residual, mask, y, signs, rows), rest = saved
    need_x, need_weight, need_bias, need_residual = needs
    read = Read(
        grad, x, y=y, residual=residual, signs=signs, activation=rest.activation,
        groups=rest.groups,
    )  # fmt: skip
    through = need_x and rest.measured
    dweight = torch.empty_like(weight) if need_weight else None
    dbias = torch.empty_like(bias) if need_bias else None
    *memory, first = _memory(rest.memory if through else None)
    if through and rest.plan.whole:
        out = read.results(need_x=True, want=need_residual)
        launch(
            visit.normalize_grad, rest.plan, x, *read.tensors, mask, *out, rows, dweight, dbias,
            *memory, *rest.plan.sizes()[:3], FIRST=first, **read.constants(),
        )  # fmt: skip
    else:
        maps = new_rows(x, 2, rest.groups) if through else None
        if through or need_weight or need_bias:
            read.reduce(rows, None, maps, dweight, dbias, *memory, first=first)
        out = read.map(rows, maps, mask, need_x=need_x, want=need_residual)
    same = need_residual and rest.activation is None
    return out[0], dweight, dbias, read.tensors[0] if same else out[1]


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
    rows = rows if rest.groups is not None else rows[:, 0]

    def row(k: Any) -> Tensor:
        found: Tensor = rows[k.value]
        return found

    batch = None
    if rest.measured:
        count = row(policies.COUNT)[..., :1]
        means = (policies.MEAN, policies.VAR, policies.MEAN_LOW)
        batch = Moments(count, *(row(k) for k in means))
    normal = ("CENTER", "CENTER_LOW", "SPREAD", "GAIN", "OFFSET", "SHARE")
    normalizer = Normalizer(*(row(getattr(policies, name)) for name in normal))
    known = Coefficients(
        *(row(getattr(policies, name)) for name in ("CENTER", "SCALE", "SHIFT", "RHO"))
    )
    return Saved(
        x, weight, bias, residual, mask, y, signs, batch, normalizer, known, rest.eps,
        rest.activation, rest.groups, None, rest.residual_dtype, rest.memory,
    )  # fmt: skip
