"""A call by the four stages: forward `moments`, `apply`; backward `reduce_grad`, `apply_grad`.

The gradient is the closed form of `statistics/normalizer.py`, for every policy. A backend with
kernels that serve a whole direction at once has a plan for such calls.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steadynorm.kernels import compat
from steadynorm.kernels.reference.differentiable import (
    as_saved,
    in_operators,
    without_padding,
)
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.reference.torch_arrays import reference
from steadynorm.kernels.spec import Backend, Call, Gradients, Keep, Packed, Saved, coefficients_of
from steadynorm.statistics import (
    GradientCoefficients,
    gradient_coefficients,
    gradient_factors,
    parameter_gradients,
    with_memory,
)

RECORDED = "a mode of PyTorch's dispatcher records operators, and no kernel is one"


class CallPlan(Protocol):
    """How kernels serve a whole direction of calls that differ only in values and addresses."""

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y, and what the backward needs: tensors, and a `Planned`."""

    def backward(self, tensors: Any, left: Planned, grad: Tensor, needs: Any) -> Gradients | None:
        """The gradients; None where the stages are the better way to them."""

    def unpack(self, tensors: Any, left: Planned) -> Saved:
        """What the forward left, as the stages leave it."""


class Planned(NamedTuple):
    """What a forward by a plan leaves for its backward, but for tensors."""

    plan: CallPlan
    eps: float
    memory: Memory | None
    share: float = 1.0
    """How much of the statistics is the batch's, where the tensors do not say it."""


class ClosedForm(Backend):
    """A backend over a module of stages.

    `compiled` stages rebuild z as they go, and write sign bits. Those that `visit` also have
    `normalize` and `normalize_grad`, which do both stages of a direction in one visit.
    """

    differentiable = False
    visit = False
    counted = False
    """Whether kernels run under modes of PyTorch's dispatcher: tests count launches by one."""

    def __init__(self, name: str, stages: Any, *, compiled: bool) -> None:
        self.name, self.stages, self.compiled = name, stages, compiled

    def is_recorded(self) -> bool:
        """Whether a mode such as make_fx records operators, of which a kernel is none."""
        return self.compiled and compat.dispatch_modes() > 0 and not self.counted

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """By the plan where the call has one; else measure, let the call decide, and map."""
        if call.plan is not None:
            planned: tuple[Tensor, Packed] = call.plan.forward(call)
            return planned
        stages, x, residual, mask = self.stages, call.x, call.residual, call.mask
        kept = Keep.needed(call.activation, residual=residual is not None, compiled=self.compiled)
        options = {"residual": residual, "activation": call.activation, "groups": call.groups}
        signs = y = local = None
        if kept is Keep.SIGNS and call.gradient:
            options["signs"] = signs = stages.empty_signs(x, call.groups)
        parameters = (x, call.weight, call.bias, call.eps)
        alone = call.policy is not None and call.policy.batch_alone and call.replicas is None
        if alone and self.visit and mask is None:
            y, local = stages.normalize(*parameters, **options)
        elif not call.by_running:
            local = stages.moments(x, mask=mask, groups=call.groups)
        batch, normalizer = call.decide(local)
        known = coefficients_of(normalizer, *parameters)
        if y is None:
            y = stages.apply(x, *known[:3], **options)
        tensors = (
            x, call.weight, call.bias, residual if kept is Keep.REBUILT else None, mask,
            y if kept is Keep.OUTPUT else None, signs,
        )  # fmt: skip
        dtype = None if residual is None else residual.dtype
        settings = (
            call.eps, call.activation, call.groups, call.replicas, dtype, call.memory, x.stride(),
        )  # fmt: skip
        return y, (tensors, (batch, normalizer, known, *settings))

    def unpack(self, saved: Packed) -> Saved:
        """What `forward` left, in full; sign bits follow x in memory."""
        tensors, left = saved
        if left.__class__ is Planned:
            planned: Saved = left.plan.unpack(tensors, left)
            return planned
        found = super().unpack(saved)
        if found.signs is None or found.strides is None:
            return found
        return found._replace(x=as_saved(found.x, found.strides))

    def backward(self, saved: Packed, grad: Tensor, needs: Any) -> Gradients:
        """The gradients in closed form."""
        if self.is_recorded():
            return in_operators(self, self.unpack(saved), grad, needs)
        tensors, left = saved
        if left.__class__ is Planned:
            gradients: Gradients | None = left.plan.backward(tensors, left, grad, needs)
            if gradients is not None:
                return gradients
        return self.gradients(self.unpack(saved), grad, needs)

    def gradients(self, saved: Saved, grad: Tensor, needs: Any) -> Gradients:
        """The gradients in closed form, from what was saved, in full."""
        need_x, need_weight, need_bias, need_residual = needs
        saved, grad = without_padding(saved, grad)
        stages, known, normalizer = self.stages, saved.coefficients, saved.normalizer
        if saved.y is not None and not self.compiled:  # once, not in both stages
            grad = stages.gradient_from_output(grad, saved.y, saved.activation, known.center.dtype)
            saved = saved._replace(y=None, activation=None)
        names = ("y", "residual", "activation", "groups", *(("signs",) if self.compiled else ()))
        read: dict[str, Any] = {name: getattr(saved, name) for name in names}
        maps = (grad, saved.x, *known[:3])
        factors = sums = dx = dresidual = None
        if need_x and saved.batch is not None:  # dx has terms by way of the moments
            factors = gradient_factors(normalizer, saved.batch, known.scale, known.rho)
        alone = saved.replicas is None and saved.mask is None and saved.memory is None
        if factors is not None and self.visit and alone:
            dx, dresidual, *sums = stages.normalize_grad(
                *maps, *factors, want_residual=need_residual, **read
            )
        else:
            if factors is not None or need_weight or need_bias:
                sums = stages.reduce_grad(*maps, **read)
            slope = constant = torch.zeros_like(known.scale)
            if factors is not None and sums is not None:
                total = sums
                if saved.replicas is not None:
                    total = saved.replicas.sum(torch.stack(list(sums))).unbind()
                slope, constant = gradient_coefficients(factors, *total)
                if saved.memory is not None and saved.batch is not None:
                    memory = saved.memory.follow(normalizer, saved.batch, known.rho, *total)
                    flowing = GradientCoefficients(slope, constant)
                    slope, constant = with_memory(
                        flowing, memory, normalizer, known.scale, known.rho
                    )
            if need_x or need_residual:
                dx, dresidual = stages.apply_grad(
                    *maps, slope, constant, mask=saved.mask, want_residual=need_residual, **read
                )
        dweight = dbias = None
        if sums is not None:
            dweight, dbias = parameter_gradients(normalizer, known.rho, *sums)
        return (
            dx if need_x else None,
            _like_parameter(dweight, saved.weight) if need_weight else None,
            _like_parameter(dbias, saved.bias) if need_bias else None,
            None if dresidual is None else dresidual.to(saved.residual_dtype),
        )


def _like_parameter(gradient: Any, parameter: Tensor | None) -> Tensor | None:
    """Summed over groups, in the parameter's type."""
    if parameter is None:
        return None
    result: Tensor = gradient.sum_to_size(parameter.shape).to(parameter.dtype)
    return result


REFERENCE = ClosedForm("reference", reference, compiled=False)
