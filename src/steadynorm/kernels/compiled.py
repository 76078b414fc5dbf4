"""The CPU kernels as operators that torch.compile keeps whole, and a differentiable map by them.

What Inductor makes of batch normalization on CPU costs several times what these kernels do
(docs/speed.md). Two operators carry the forward: `moments`, and `normalize_by`, whose gradient is
the closed form by way of `gradients`. Statistics between them stay visible to the compiler.

Channel-sized arguments travel stacked, since an operator's results must not share memory.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from steadynorm.kernels.activations import kept_for_backward
from steadynorm.kernels.choice import cpu_kernels
from steadynorm.kernels.torch_arrays import reference
from steadynorm.statistics import (
    Coefficients,
    Moments,
    Normalizer,
    coefficients,
    gradient_factors,
    parameter_gradients,
)

# torch.library reads these annotations at run time; it knows Optional, not `|`.
MaybeTensor = Optional[Tensor]  # noqa: UP045
MaybeName = Optional[str]  # noqa: UP045
MaybeGroups = Optional[list[int]]  # noqa: UP045


def takes(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the compiler may call the CPU kernels on this input; asked while it traces."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        return False
    if x.numel() == 0 or (residual is not None and residual.dtype != x.dtype):
        return False
    return x.is_contiguous() or (x.ndim > 2 and x.movedim(1, -1).is_contiguous())


def moments(x: Tensor, mask: Tensor | None, groups: tuple[int, ...] | None) -> Moments:
    """Moments of the batch; nothing differentiates through them here."""
    lengths = None if groups is None else list(groups)
    counts, stacked = _moments(x.detach(), mask, lengths)
    mean, var, low = stacked.unbind()
    count: Any = counts
    if mask is None and groups is None:
        count = x.numel() // x.shape[1]
    return Moments(count, mean, var, low)


def normalize_by(
    normalizer: Normalizer,
    batch: Moments | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str | None,
    groups: tuple[int, ...] | None,
) -> Tensor:
    """The map over x by a settled normalizer, with the gradient of the closed form."""
    like = normalizer.mean
    constants = torch.stack(
        [part.expand_as(like) if isinstance(part, Tensor) else torch.full_like(like, part)
         for part in normalizer]
    )  # fmt: skip
    known = None
    if batch is not None:
        count = batch.count
        count = count.expand_as(like) if isinstance(count, Tensor) else torch.full_like(like, count)
        known = torch.stack([count, batch.mean, batch.var, batch.mean_low])
    lengths = None if groups is None else list(groups)
    y: Tensor = _normalize_by(
        x, weight, bias, residual, mask, constants, known, eps, activation, lengths
    )
    return y


@custom_op("steadynorm::moments", mutates_args=())
def _moments(x: Tensor, mask: MaybeTensor, groups: MaybeGroups) -> tuple[Tensor, Tensor]:
    found = cpu_kernels().moments(x, mask=mask, groups=None if groups is None else tuple(groups))
    count = found.count
    if not isinstance(count, Tensor):
        count = found.mean.new_full((1,), count)
    return count.clone(), torch.stack([found.mean, found.var, found.mean_low])


@_moments.register_fake
def _(x: Tensor, mask: MaybeTensor, groups: MaybeGroups) -> tuple[Tensor, Tensor]:
    rows = () if groups is None else (len(groups),)
    made = x.new_empty((3, *rows, x.shape[1]), dtype=reference.statistics_dtype(x))
    return made.new_empty((*rows, 1)), made


def _coefficients(constants: Tensor, weight: MaybeTensor, bias: MaybeTensor, eps: float) -> Any:
    gamma = None if weight is None else weight.to(constants.dtype)
    beta = None if bias is None else bias.to(constants.dtype)
    normalizer = Normalizer(*constants.unbind())
    return normalizer, coefficients(normalizer, gamma, beta, eps)


@custom_op("steadynorm::normalize_by", mutates_args=())
def _normalize_by(
    x: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    constants: Tensor,
    batch: MaybeTensor,
    eps: float,
    activation: MaybeName,
    groups: MaybeGroups,
) -> Tensor:
    _, known = _coefficients(constants, weight, bias, eps)
    y: Tensor = cpu_kernels().apply(
        x, known.center, known.scale, known.shift, residual=residual, activation=activation,
        groups=None if groups is None else tuple(groups),
    )  # fmt: skip
    return y


@_normalize_by.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@custom_op("steadynorm::gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    x: Tensor,
    y: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    place: Tensor,
    factors: Tensor,
    activation: MaybeName,
    groups: MaybeGroups,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual (empty unless wanted) and the two sums."""
    cpu = cpu_kernels()
    rows = None if groups is None else tuple(groups)
    branch: dict[str, Any] = {
        "y": y, "residual": residual, "activation": activation, "groups": rows
    }  # fmt: skip
    at = place.unbind()
    if mask is None:
        dx, dresidual, *sums = cpu.normalize_grad(
            grad, x, *at, *factors.unbind(), want_residual=want_residual, **branch
        )
        return dx, x.new_empty(0) if dresidual is None else dresidual, torch.stack(sums)
    from steadynorm.statistics import GradientFactors, gradient_coefficients

    sums = cpu.reduce_grad(grad, x, *at, **branch)
    slope, constant = gradient_coefficients(GradientFactors(*factors.unbind()), *sums)
    dx, dresidual = cpu.apply_grad(
        grad, x, *at, slope, constant, mask=mask, want_residual=want_residual, **branch
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual, torch.stack(sums)


@_gradients.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    y: MaybeTensor,
    residual: MaybeTensor,
    mask: MaybeTensor,
    place: Tensor,
    factors: Tensor,
    activation: MaybeName,
    groups: MaybeGroups,
    want_residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    extra = torch.empty_like(x) if want_residual else x.new_empty(0)
    return torch.empty_like(x), extra, torch.empty_like(place[:2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, mask, constants, batch, eps, activation, groups = inputs
    y, rebuilding = kept_for_backward(activation, output, residual, rebuilds=False)
    ctx.save_for_backward(x, weight, bias, rebuilding, mask, constants, batch, y)
    ctx.eps, ctx.activation, ctx.groups = eps, activation, groups
    ctx.want_residual = residual is not None and residual.requires_grad


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, mask, constants, batch, y = ctx.saved_tensors
    known: Coefficients
    normalizer, known = _coefficients(constants, weight, bias, ctx.eps)
    if batch is None:
        factors = torch.zeros_like(constants[:4])
    else:
        factors = torch.stack(gradient_factors(normalizer, Moments(*batch), known.scale, known.rho))
    # Without an activation the residual's gradient is the output's: no second copy of it.
    apart = ctx.want_residual and ctx.activation is not None
    dx, dresidual, sums = _gradients(
        grad, x, y, residual, mask, torch.stack(known[:3]), factors, ctx.activation, ctx.groups,
        apart,
    )  # fmt: skip
    dweight, dbias = parameter_gradients(normalizer, known.rho, sums[0], sums[1])
    return (
        dx,
        None if weight is None else dweight.sum_to_size(weight.shape).to(weight.dtype),
        None if bias is None else dbias.sum_to_size(bias.shape).to(bias.dtype),
        (dresidual if apart else grad) if ctx.want_residual else None,
        *(None,) * 6,
    )


register_autograd(_normalize_by, _backward, setup_context=_setup)
