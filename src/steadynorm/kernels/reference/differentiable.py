"""A call in operations that PyTorch differentiates: its map, and its backward, to any order."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from steadynorm.kernels import compat
from steadynorm.kernels.activations import ACTIVATIONS, functions
from steadynorm.kernels.reference import padding
from steadynorm.kernels.reference.torch_arrays import reference
from steadynorm.kernels.spec import Gradients, Saved, coefficients_of, statistics_dtype
from steadynorm.statistics import GradientCoefficients, Moments, attach, with_memory

REFUSED_BY_TORCH = TorchVersion(torch.__version__) >= "2.14"


def live_moments(saved: Saved, own: Moments) -> Moments:
    """Differentiable moments over all replicas."""
    return own if saved.replicas is None else saved.replicas.link(own)


def differentiable(saved: Saved, live: Moments | None) -> Tensor:
    """The map over x by what was decided, joined to moments that carry gradient."""
    x, weight, bias = saved[:3]
    normalizer = saved.normalizer
    if live is not None:
        normalizer = attach(normalizer, without_gradient(live), live)
    known = coefficients_of(normalizer, x, weight, bias, saved.eps)
    names = ("mask", "residual", "activation", "groups")
    branch: dict[str, Any] = {name: getattr(saved, name) for name in names}
    y: Tensor = padding.apply(reference, x, known[:3], **branch)
    return y


def without_gradient(live: Moments) -> Moments:
    """The same moments without gradient."""
    return live._replace(var=live.var.detach(), mean_low=live.mean_low.detach())


def without_padding(saved: Saved, grad: Tensor) -> tuple[Saved, Tensor]:
    """Both with 0 where padding that is not finite would spoil a gradient; see padding.py."""
    x, y, residual = saved.x, saved.y, saved.residual
    if saved.mask is None or not any(_may_spoil(t) for t in (x, y, residual)):
        return saved, grad
    counts = padding.counting(reference, saved.mask, x, y, residual)
    grad, filled, y, residual = padding.zeroed(reference, counts, grad, x, y, residual)
    if saved.signs is not None:  # which follow x in memory
        filled = as_saved(filled, x.stride())
    return saved._replace(x=filled, y=y, residual=residual), grad


def _may_spoil(t: Tensor | None) -> bool:
    """Whether it holds NaN or infinity, where to look waits for no device and breaks no graph."""
    if t is None:
        return False
    recorded = compat.is_traced() or compat.dispatch_modes() > 0
    if recorded or not t.is_cpu or t.__class__ is not Tensor:
        return True
    return not math.isfinite(t.detach().sum(dtype=statistics_dtype(t)))


def as_saved(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor as it lay in memory when it was saved: hooks may give a copy of another layout."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def second_order(backend: Any, saved: Saved, grad: Tensor, needs: Any) -> Gradients:
    """The backward in differentiable operations."""
    saved, grad = without_padding(saved, grad)
    live = None
    if saved.batch is not None:
        live = live_moments(saved, reference.moments(saved.x, mask=saved.mask, groups=saved.groups))
    z = differentiable(saved._replace(activation=None, mask=None), live)
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


def in_operators(backend: Any, saved: Saved, grad: Tensor, needs: Any) -> Gradients:
    """The backward in operations that PyTorch sees through; nobody differentiates it again."""
    with torch.enable_grad():
        gradients = second_order(backend, saved, grad, needs)
    return tuple(g if g is None else g.clone() for g in gradients)  # without a graph


def several_at_once(backend: Any, saved: Saved, grad: Tensor, needs: Any) -> Gradients:
    """The backward for a batch of gradients, each of which would move the layer's memory."""
    if saved.memory is not None:
        raise NotImplementedError(
            "several gradients at once (is_grads_batched, vmap) cannot move one memory of the "
            "gradient. Ask for one after the other, or use sn.Steady(window=None)."
        )
    return in_operators(backend, saved, grad, needs)


def refuse_third_derivatives(y: Tensor, x: Tensor, weight: Tensor | None) -> None:
    """Of PyTorch's own operator, whose output y is: they come out wrong, and without an error.

    Its second derivative takes the saved mean and variance for constants; from 2.14 on torch
    refuses by itself.
    """
    if REFUSED_BY_TORCH or not (x.requires_grad and torch.is_grad_enabled()):
        return  # by the parameters alone no third derivative passes the statistics
    node: Any = y.grad_fn
    if compat.saved_hooks(True) is None:
        node._register_hook_dict(_HOOKED)
        return
    # As of activation checkpointing: these let nobody but the node take from it what it saved. The
    # hook lasts as long as y, so it must not keep a large x.
    followed = x if x.is_cpu else x.narrow(0, 0, 0).clone()
    node.register_prehook(lambda grads: (_followed(grads[0], followed, weight), *grads[1:]))


def _before_backward(grad: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return grad
    node = compat.current_node()
    return _followed(grad, node._saved_input, node._saved_weight)


def _followed(grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient, seen by a second derivative; with create_graph=False none can follow."""
    if not torch.is_grad_enabled():
        return grad
    followed: Tensor = _First.apply(grad, x, weight)  # type: ignore[no-untyped-call]
    return followed


# One table of hooks serves every node. `register_prehook` makes a table and a handle for each: with
# it a small step takes 13 µs longer, with this 5.
_HOOKED: Any = torch.empty(0, device="cpu")
_HOOKED._backward_hooks = {0: _before_backward}


class _First(torch.autograd.Function):
    """The gradient that a first derivative begins with; a second one meets it on the way to x."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None
        found: tuple[Tensor | None, ...] = _Second.apply(  # type: ignore[no-untyped-call]
            grad, *ctx.saved_tensors
        )
        return found


class _Second(torch.autograd.Function):
    """Adds nothing to a second derivative, and refuses a third."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor | None) -> Any:
        return (
            grad.clone(),
            torch.zeros_like(x),
            None if weight is None else torch.zeros_like(weight),
        )

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "batch normalization by PyTorch's own operator has wrong third derivatives: it takes "
            "the batch's mean and variance for constants in them. Make the layer with "
            'numerics="exact", which has derivatives of every order.'
        )


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
    normalizer = attach(normalizer, without_gradient(live), live)
    known = coefficients_of(normalizer, x, saved.weight, None, saved.eps)
    nothing = GradientCoefficients(0.0, 0.0)
    slope, constant = with_memory(nothing, memory, normalizer, known.scale, known.rho)
    part: Tensor = reference.apply(x, known.center, slope, constant, groups=saved.groups)
    return part if saved.mask is None else torch.where(saved.mask.unsqueeze(1), part, 0)
