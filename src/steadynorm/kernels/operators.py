"""The one autograd node of every policy, over the stages that serve its input. No arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steadynorm.kernels import aten as native
from steadynorm.kernels import compiled
from steadynorm.kernels.activations import ACTIVATIONS, kept_for_backward
from steadynorm.kernels.choice import (
    compiler_calls_cpu_kernels,
    is_exporting,
    needs_plain_operations,
    stages_for,
)
from steadynorm.kernels.reference import Groups
from steadynorm.kernels.torch_arrays import reference, xp
from steadynorm.statistics import (
    Coefficients,
    Moments,
    Normalizer,
    RunningStatistics,
    attach,
    coefficients,
    gradient_coefficients,
    gradient_factors,
    of_running,
    parameter_gradients,
)


class Exchange(Protocol):
    """What one forward and its backward exchange with other replicas."""

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of the backward reduction, added over replicas."""

    def link(self, live: Moments) -> Moments:
        """Differentiable moments of this process as differentiable pooled ones."""


class Call:
    """One call of the layer, but for the tensors that gradient flows to.

    A subclass says in `settle` what normalizes: replicas pool there, the policy decides there,
    running statistics move there. (A class and not a bundle of functions, for the compiler's sake.)
    """

    moments_needed = True
    own_moments = False
    """Whether the moments given to `settle` alone normalize: a kernel may then do both stages of
    the forward in one visit."""

    def __init__(
        self,
        eps: float,
        *,
        groups: Groups = None,
        activation: str | None = None,
        replicas: Exchange | None = None,
    ) -> None:
        self.eps = eps
        self.groups = groups
        self.activation = activation
        self.replicas = replicas

    def settle(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """Moments and normalizer to use; called once a forward.

        `batch` is what this process's batch measures, None unless `moments_needed`.
        """
        raise NotImplementedError


class _ByRunning(Call):
    """The running statistics normalize, whatever the batch."""

    moments_needed = False

    def __init__(self, mean: Tensor, var: Tensor, eps: float, activation: str | None) -> None:
        super().__init__(eps, activation=activation)
        self.mean = mean
        self.var = var

    def settle(self, batch: Moments | None) -> tuple[None, Normalizer]:
        """The buffers as they are now."""
        return None, of_running(RunningStatistics(self.mean, self.var, None))


class Settled(NamedTuple):
    """What a forward leaves for its backward, all channel-sized."""

    batch: Moments | None
    normalizer: Normalizer
    known: Coefficients


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    call: Call,
) -> Tensor:
    """`activation(γ·x̂ + β + residual)` by the statistics that `call` settles on."""
    if needs_plain_operations():
        return _traceable(x, weight, bias, residual, mask, call)
    if needs_gradient(x, weight, bias, residual):
        y: Tensor = Normalize.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, residual, mask, call
        )
        return y
    return _forward(x, weight, bias, residual, mask, call)[0]


def needs_gradient(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> bool:
    """Whether a backward may come. (Written out: a generator costs a small call 0.5 µs.)"""
    return torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )


def normalize_by_running(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Inference, and training on frozen statistics: nothing moves."""
    if _is_exported():
        return native.one_operator(
            x, weight, bias, running_mean, running_var, eps, residual, activation
        )
    dtype = reference.statistics_dtype(x)
    # A copy: the buffer itself may change between this forward and its backward.
    mean = running_mean.to(dtype, copy=True)
    call = _ByRunning(mean, running_var.to(dtype), eps, activation)
    return normalize(x, weight, bias, residual, None, call)


def _is_exported() -> bool:
    if torch.compiler.is_compiling():
        return is_exporting()
    return torch.onnx.is_in_onnx_export() or torch._C._is_tracing()


def _wide(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(reference.statistics_dtype(x))


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    call: Call,
    signs: Tensor | None = None,
) -> tuple[Tensor, Settled]:
    stages = stages_for(x, residual)
    outside = {"residual": residual, "activation": call.activation, "groups": call.groups}
    if signs is not None:
        outside["signs"] = signs
    weight, bias = _wide(weight, x), _wide(bias, x)
    if call.own_moments and mask is None and stages is not reference:
        y, local = stages.normalize(x, weight, bias, call.eps, **outside)
        batch, normalizer = call.settle(local)
        return y, Settled(batch, normalizer, coefficients(normalizer, weight, bias, call.eps))
    local = stages.moments(x, mask=mask, groups=call.groups) if call.moments_needed else None
    batch, normalizer = call.settle(local)
    known = coefficients(normalizer, weight, bias, call.eps)
    y = stages.apply(x, known.center, known.scale, known.shift, **outside)
    return y, Settled(batch, normalizer, known)


def _traceable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    call: Call,
) -> Tensor:
    """The same in operations that PyTorch itself differentiates, transforms and compiles."""
    if compiler_calls_cpu_kernels(x) and call.replicas is None and compiled.takes(x, residual):
        measured = compiled.moments(x, mask, call.groups) if call.moments_needed else None
        batch, normalizer = call.settle(measured)
        around = (call.eps, call.activation, call.groups)
        return compiled.normalize_by(normalizer, batch, x, weight, bias, residual, mask, *around)
    live = reference.moments(x, mask=mask, groups=call.groups) if call.moments_needed else None
    _, normalizer = call.settle(None if live is None else _constant(live))
    return _differentiable(x, weight, bias, residual, call, live, normalizer, call.activation)


def _constant(live: Moments) -> Moments:
    return live._replace(var=live.var.detach(), mean_low=live.mean_low.detach())


def _differentiable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    call: Call,
    live: Moments | None,
    normalizer: Normalizer,
    activation: str | None,
) -> Tensor:
    """The map over x by a settled normalizer, joined to moments that carry gradient."""
    if live is not None:
        if call.replicas is not None:
            live = call.replicas.link(live)
        normalizer = attach(normalizer, _constant(live), live)
    known = coefficients(normalizer, _wide(weight, x), _wide(bias, x), call.eps)
    return reference.apply(
        x,
        known.center,
        known.scale,
        known.shift,
        residual=residual,
        activation=activation,
        groups=call.groups,
    )


class Normalize(torch.autograd.Function):
    """Forward: `moments`, `apply`. Backward: `reduce_grad`, `apply_grad`, by the closed form.

    Keeps the input, the output or the residual where the activation's derivative needs it, and
    channel-sized statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        call: Call,
    ) -> Tensor:
        stages = stages_for(x, residual)
        compiled_ = stages is not reference
        signs = stages.signs_for(x, residual, call.activation, call.groups) if compiled_ else None
        y, ctx.settled = _forward(x, weight, bias, residual, mask, call, signs)
        ctx.call = call
        ctx.residual_dtype = None if residual is None else residual.dtype
        output, residual = kept_for_backward(
            call.activation, y, residual, signs, rebuilds=compiled_
        )
        ctx.save_for_backward(x, weight, bias, residual, mask, output, signs)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _second_order_backward(ctx, grad)
        x, weight, bias, residual, mask, y, signs = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        sums, dx, dresidual = _gradients(
            ctx.settled,
            ctx.call,
            _XSized(grad, x, y, residual, mask, signs),
            need_map=need_x or need_residual,
            need_sums=need_weight or need_bias,
            through=need_x and ctx.settled.batch is not None,
            want_residual=need_residual,
        )
        dweight = dbias = None
        if sums is not None:
            normalizer, known = ctx.settled.normalizer, ctx.settled.known
            dweight, dbias = parameter_gradients(normalizer, known.rho, *sums)
        return (
            dx if need_x else None,
            _parameter_gradient(dweight, weight, need_weight),
            _parameter_gradient(dbias, bias, need_bias),
            None if dresidual is None else dresidual.to(ctx.residual_dtype),
            None,
            None,
        )


class _XSized(NamedTuple):
    """What a backward reads: the gradient of the output and what the forward saved."""

    grad: Tensor
    x: Tensor
    y: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    signs: Tensor | None


def _gradients(
    settled: Settled,
    call: Call,
    saved: _XSized,
    *,
    need_map: bool,
    need_sums: bool,
    through: bool,
    want_residual: bool,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None, Tensor | None]:
    """The two sums, dx and dresidual; `through`: whether dx has terms by way of the moments."""
    grad, x, y, residual, mask, signs = saved
    batch, normalizer, known = settled
    stages = stages_for(x, residual)
    branch = {"y": y, "residual": residual, "activation": call.activation, "groups": call.groups}
    if signs is not None:
        branch["signs"] = signs
    place = (grad, x, known.center, known.scale, known.shift)
    factors = None
    if through and batch is not None:
        factors = gradient_factors(normalizer, batch, known.scale, known.rho)
        if call.replicas is None and mask is None and stages is not reference:
            dx, dresidual, total, moved = stages.normalize_grad(
                *place, *factors, want_residual=want_residual, **branch
            )
            return (total, moved), dx, dresidual
    sums = stages.reduce_grad(*place, **branch) if through or need_sums else None
    if not need_map:
        return sums, None, None
    slope = constant = torch.zeros_like(known.scale)
    if factors is not None and sums is not None:
        total, moved = sums
        if call.replicas is not None:
            total, moved = call.replicas.sum(torch.stack(sums)).unbind()
        slope, constant = gradient_coefficients(factors, total, moved)
    dx, dresidual = stages.apply_grad(
        *place, slope, constant, mask=mask, want_residual=want_residual, **branch
    )
    return sums, dx, dresidual


def _parameter_gradient(
    gradient: Tensor | None, parameter: Tensor | None, needed: bool
) -> Tensor | None:
    if gradient is None or parameter is None or not needed:
        return None
    return gradient.sum_to_size(parameter.shape).to(parameter.dtype)


def _second_order_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward in differentiable operations, for `create_graph=True`."""
    x, weight, bias, residual, mask, y, signs = ctx.saved_tensors
    call: Call = ctx.call
    batch, normalizer, _ = ctx.settled
    live = None if batch is None else reference.moments(x, mask=mask, groups=call.groups)
    z = _differentiable(x, weight, bias, residual, call, live, normalizer, None)
    g = grad
    if call.activation is not None:
        kind = ACTIVATIONS[call.activation]
        if signs is not None:
            y = stages_for(x, None).outputs_for(signs, x, call.groups)
        elif y is None:
            y = xp.activate(call.activation, z) if kind.from_output else z
        g = kind.gradient(grad, y, xp)
    wanted = [
        t if needed else None
        for t, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False)
    ]
    inputs = [t for t in wanted if t is not None]
    gradients = iter(
        torch.autograd.grad(z, inputs, g.to(z.dtype), create_graph=True) if inputs else ()
    )
    dx, dweight, dbias = (None if t is None else next(gradients) for t in wanted)
    dresidual = g.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None
    return dx, dweight, dbias, dresidual, None, None
