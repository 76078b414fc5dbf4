"""The plain call on CPU as an autograd node of its own: where the general one costs too much.

Policy `Batch` in training and the running statistics in inference, without mask and replicas, on
the kernels of `cpu_plain.py`. What is asked rarely (second derivatives, an input that needs no
gradient, gradients in inference) is the general node's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import cpu_plain, operators
from steadynorm.kernels.activations import kept_for_backward
from steadynorm.statistics import Moments, Normalizer, coefficients

takes = cpu_plain.takes


def train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """A plain training call; moves the statistics."""
    buffers = (running_mean, running_var, momentum, eps)
    if _needs_gradient(x, weight, bias, residual):
        y: Tensor = _Plain.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, residual, activation, buffers
        )
        return y
    return cpu_plain.train(x, weight, bias, *buffers, residual, activation)[0]


def infer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """Inference; nothing moves."""
    settings = (weight, bias, running_mean, running_var, eps, residual, activation)
    if _needs_gradient(x, weight, bias, residual):
        return operators.normalize_by_running(x, *settings)
    return cpu_plain.infer(x, *settings)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Plain(torch.autograd.Function):
    """Keeps what the general node keeps: input, output or residual, channel-sized statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
        buffers: tuple[Tensor | None, Tensor | None, float, float],
    ) -> Tensor:
        y, ctx.kept = cpu_plain.train(x, weight, bias, *buffers, residual, activation)
        ctx.activation, ctx.eps = activation, buffers[-1]
        output, residual = kept_for_backward(activation, y, residual, rebuilds=True)
        ctx.save_for_backward(x, weight, bias, residual, None, output)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() or not need_x:
            return _general(ctx, grad)
        x, _, _, residual, _, y = ctx.saved_tensors
        dx, dresidual, dweight, dbias = cpu_plain.train_grad(
            grad, x, ctx.kept, y, residual, ctx.activation, need_residual
        )
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dresidual,
            None,
            None,
        )


def _general(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The general node's backward, on what this forward has kept."""
    x, weight, bias = ctx.saved_tensors[:3]
    mean, low, var = (ctx.kept[i] for i in (cpu_plain.MEAN, cpu_plain.LOW, cpu_plain.VAR))
    batch = Moments(x.numel() // x.shape[1], mean, var, low)
    normalizer = Normalizer(mean, low, var, 1, 0, 1)
    ctx.settled = operators.Settled(
        batch, normalizer, coefficients(normalizer, weight, bias, ctx.eps)
    )
    ctx.call = operators.Call(ctx.eps, activation=ctx.activation)
    ctx.residual_dtype = x.dtype
    gradients: tuple[Tensor | None, ...] = operators.Normalize.backward(ctx, grad)
    return gradients
