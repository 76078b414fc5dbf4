"""The plain call on CPU: the batch's own statistics in training, the running ones in inference.

The same kernels as in `cpu.py`, which here also do what the layer keeps per channel: running
statistics, the factors of the backward, the parameters' gradients. Some forty small tensor
operations a step drop out. They take 100 µs when the caches hold their code, and three times that
after a kernel has streamed through 30 MB: as much as normalizing 10 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu_loops as at
from .cpu import (
    both_stages_backward,
    both_stages_forward,
    branch_of,
    calls,
    forward_kernel,
    results,
)
from .cpu_slabs import Slab, alike, real_type, shape_of
from .memory import empty_like

# Rows of what a training step leaves for its backward, (KEPT, C).
MEAN, LOW, VAR, SCALE, SHIFT, RHO, SLOPE_FACTOR, CONSTANT_FACTOR, KEPT = range(9)
_SLOTS = (
    at.CENTER, at.LOW, at.VAR, at.SCALE, at.SHIFT, at.RHO, at.SLOPE_FACTOR, at.CONSTANT_FACTOR,
)  # fmt: skip


def takes(x: Tensor, *per_channel: Tensor | None) -> bool:
    """Whether parameters and running statistics are as these kernels read and write them."""
    real, channels = real_type(x), x.shape[1]
    return all(
        t is None or (t.dtype is real and t.numel() == channels and t.is_contiguous() and t.is_cpu)
        for t in per_channel
    )


def _whole(x: Tensor) -> Slab:
    shape = shape_of(x)
    assert shape is not None  # the caller has asked whether these kernels take x
    return Slab(x, shape, 0, 0, shape.samples * shape.repeats)


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
) -> tuple[Tensor, Tensor]:
    """Normalize by the batch and move the running statistics; returns y and what backward needs."""
    calls["train"] += 1
    y = empty_like(x)
    kept = torch.empty((KEPT, x.shape[1]), dtype=real_type(x))
    if residual is not None:
        residual = alike(residual, x, "residual")
    slab = _whole(x)
    slab.values(at.RESIDUAL, residual)
    slab.values(at.Y, y)
    slab.each_row(_SLOTS, kept)
    for slot, t in (
        (at.WEIGHT, weight), (at.BIAS, bias), (at.RUNNING_MEAN, running_mean),
        (at.RUNNING_VAR, running_var),
    ):  # fmt: skip
        slab.shared(slot, t)
    slab.numbers((at.COUNT, at.EPS, at.MOMENTUM), (slab.count, eps, momentum))
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    both_stages_forward(slab, kernel, at.SETTLE | at.RECORD)
    return y, kept


def train_grad(
    grad: Tensor,
    x: Tensor,
    kept: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias."""
    calls["train_grad"] += 1
    branch = branch_of(grad, x, y, residual, activation)
    want = want_residual and activation is not None
    dx, dresidual = results(x, want, None)
    channels = x.shape[1]
    dweight = torch.empty(channels, dtype=kept.dtype)
    dbias = torch.empty(channels, dtype=kept.dtype)
    between = torch.empty((3, channels), dtype=kept.dtype)
    slab = _whole(x)
    branch.hand_over(slab)
    slab.values(at.DX, dx)
    slab.values(at.DRESIDUAL, dresidual)
    slab.each_row(_SLOTS, kept)
    slab.arguments[at.MEAN_LOW] = slab.arguments[at.MEAN_GAP] = slab.arguments[at.LOW]
    slab.each_row((at.SUM_GRAD_X, at.SLOPE, at.CONSTANT), between)
    slab.shared(at.SUM_GRAD, dbias)
    slab.shared(at.GRAD_WEIGHT, dweight)
    both_stages_backward(slab, x.dtype, activation, branch, want)
    if want_residual and activation is None:
        dresidual = grad
    return dx, dresidual, dweight, dbias


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
    """Normalize by the running statistics; nothing moves."""
    calls["infer"] += 1
    y = empty_like(x)
    between = torch.empty((2, x.shape[1]), dtype=real_type(x))
    if residual is not None:
        residual = alike(residual, x, "residual")
    slab = _whole(x)
    slab.values(at.RESIDUAL, residual)
    slab.values(at.Y, y)
    slab.each_row((at.SCALE, at.SHIFT), between)
    for slot, t in (
        (at.WEIGHT, weight), (at.BIAS, bias), (at.CENTER, running_mean), (at.VAR, running_var),
    ):  # fmt: skip
        slab.shared(slot, t)
    slab.numbers((at.EPS,), (eps,))
    kernel = forward_kernel(x.dtype, activation, add=residual is not None)
    slab.settle(kernel, at.SETTLE)
    slab.run(kernel, at.MAP)
    return y
