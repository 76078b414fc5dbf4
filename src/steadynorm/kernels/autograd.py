"""The one autograd function of every backend and policy, and the road that PyTorch sees through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import aten, compat
from steadynorm.kernels.activations import ACTIVATIONS, functions
from steadynorm.kernels.cpu import operators
from steadynorm.kernels.reference.torch_arrays import moments_at_once, reference
from steadynorm.kernels.spec import Backend, Call, Gradients, Packed, Saved, coefficients_of
from steadynorm.statistics import GradientCoefficients, Moments, attach, with_memory


class Normalize(torch.autograd.Function):
    """Forward and backward of a backend; second derivatives in plain operations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        backend: Backend,
    ) -> Tensor:
        y, (tensors, ctx.rest) = backend.forward(call)
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = (ctx.saved_tensors, ctx.rest), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = _second_order(ctx.backend, ctx.backend.unpack(saved), grad, needs)
        else:
            gradients = ctx.backend.backward(saved, grad, needs)
        return *gradients, None, None


normalize = compat.direct_apply(Normalize)


def _live(saved: Saved, own: Moments) -> Moments:
    """Differentiable moments over all replicas."""
    return own if saved.replicas is None else saved.replicas.link(own)


def _differentiable(saved: Saved, live: Moments | None) -> Tensor:
    """The map over x by what was decided, joined to moments that carry gradient."""
    x, weight, bias = saved[:3]
    normalizer = saved.normalizer
    if live is not None:
        normalizer = attach(normalizer, _constant(live), live)
    known = coefficients_of(normalizer, x, weight, bias, saved.eps)
    branch: dict[str, Any] = {
        "residual": saved.residual,
        "activation": saved.activation,
        "groups": saved.groups,
    }
    y: Tensor = reference.apply(x, *known[:3], **branch)
    return y


def _constant(live: Moments) -> Moments:
    return live._replace(var=live.var.detach(), mean_low=live.mean_low.detach())


def _second_order(backend: Any, saved: Saved, grad: Tensor, needs: Any) -> Gradients:
    """The backward in differentiable operations."""
    live = None
    if saved.batch is not None:
        live = _live(saved, reference.moments(saved.x, mask=saved.mask, groups=saved.groups))
    z = _differentiable(saved._replace(activation=None), live)
    g, y = grad, saved.y
    if saved.activation is not None:
        forward, gradient = functions(saved.activation, reference.xp)
        if saved.signs is not None:
            y = backend.stages.outputs_for(saved.signs, saved.x, saved.groups)
        elif y is None:
            y = z if ACTIVATIONS[saved.activation].source == "input" else forward(z)
        g = gradient(grad, y)
    wanted = [t if need else None for t, need in zip(saved[:3], needs, strict=False)]
    inputs = [t for t in wanted if t is not None]
    found: Any = torch.autograd.grad(z, inputs, g.to(z.dtype), create_graph=True) if inputs else ()
    gradients = iter(found)
    dx, dweight, dbias = (None if t is None else next(gradients) for t in wanted)
    if dx is not None and live is not None and saved.memory is not None:
        dx = dx + _remembered(saved, live, g)
    return dx, dweight, dbias, g.to(saved.residual_dtype) if needs[3] else None


def _remembered(saved: Saved, live: Moments, grad: Tensor) -> Tensor:
    """What the memory of the gradient takes off; itself it is a constant to derivatives."""
    assert saved.memory is not None
    assert saved.batch is not None
    x, known, normalizer = saved.x, saved.coefficients, saved.normalizer
    with torch.no_grad():
        sums: tuple[Tensor, ...] = reference.reduce_grad(
            grad.detach(), x, *known[:3], groups=saved.groups
        )
        if saved.replicas is not None:
            sums = saved.replicas.sum(torch.stack(sums)).unbind()
        memory = saved.memory.follow(normalizer, saved.batch, known.rho, *sums)
    normalizer = attach(normalizer, _constant(live), live)
    known = coefficients_of(normalizer, x, saved.weight, None, saved.eps)
    nothing = GradientCoefficients(0.0, 0.0)
    slope, constant = with_memory(nothing, memory, normalizer, known.scale, known.rho)
    part: Tensor = reference.apply(x, known.center, slope, constant, groups=saved.groups)
    return part if saved.mask is None else torch.where(saved.mask.unsqueeze(1), part, 0)


class Traced(Backend):
    """The call in operations that PyTorch differentiates, transforms, compiles or exports."""

    name = "traced"

    def supports(self, call: Call) -> str | None:
        """Only where PyTorch looks on."""
        return None if compat.is_traced() else "PyTorch neither compiles nor transforms this call"

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y, by operators that keep the kernels whole where compiled code may call these."""
        if call.memory is not None and not _may_remember():
            raise NotImplementedError(
                f"statistics={call.policy!r} keeps a memory that moves in the backward pass, which "
                f"torch.func, forward mode and torch.jit.trace do not follow. Use "
                f"sn.Steady(window=None) there."
            )
        x, measured = call.x, not call.by_running
        if call.by_running and _is_exported():
            return aten.one_operator(call), ((), None)
        by_operators = operators.serve(call)
        live = None
        if measured and by_device(call):
            live = moments_at_once(x)
        elif measured:
            moments = operators.moments if by_operators else reference.moments
            live = moments(x, mask=call.mask, groups=call.groups)
        batch, normalizer = call.decide(None if live is None else _constant(live))
        saved = Saved(
            x, call.weight, call.bias, call.residual, call.mask, None, None, batch, normalizer,
            None, call.eps, call.activation, call.groups, call.replicas, None, call.memory,
        )  # fmt: skip
        live = None if by_operators or live is None else _live(saved, live)
        y = operators.apply(saved) if by_operators else _differentiable(saved, live)
        return y, ((), None)


TRACED = Traced()


def by_device(call: Call) -> bool:
    """Whether the call is one of PyTorch's operator and its device's numerics will do."""
    return call.basic and not call.exact and not call.x.is_cpu and call.x.numel() > 0


def _may_remember() -> bool:
    """Whether the operator, whose backward moves the memory, can stand for the call."""
    return torch.compiler.is_compiling() and not compat.is_transforming()


def _is_exported() -> bool:
    if torch.compiler.is_compiling():
        return compat.is_exporting()
    return torch.onnx.is_in_onnx_export() or compat.is_jit_tracing()
