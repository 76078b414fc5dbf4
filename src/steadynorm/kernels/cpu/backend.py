"""The compiled CPU kernels as a backend: prepared plans for most calls, stages for all others."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from steadynorm._extras import lacking
from steadynorm.kernels import compat
from steadynorm.kernels.reference.closed_form import ClosedForm
from steadynorm.kernels.reference.differentiable import in_operators
from steadynorm.kernels.spec import RECORDED, Call, Gradients, Packed, Saved

from .readable import PLAIN, readable, unreadable

TENSORS = tuple(field.name for field in fields(Call))
"""The names of a call's arguments, its tensors first."""


class CpuKernels(ClosedForm):
    """Numba's machine code over raw memory; see loops.py. Loaded with the first call."""

    visit = True
    prepared: Any = None
    refusal: str | None = None
    """Why the kernels cannot be loaded."""

    def load(self) -> str | None:
        """Import the kernels; numba does not install on every platform. Says why it cannot be."""
        if self.stages is None and self.refusal is None:
            try:
                from . import prepared, stages
            except ImportError as error:
                self.refusal = f"the CPU kernels cannot be loaded ({lacking(error) or error})"
            else:
                self.prepared, self.stages = prepared.prepared, stages
        return self.refusal

    def supports(self, call: Call) -> str | None:
        """Tensors in memory that kernels can read, of a type and layout that they take."""
        if self.prepared is None and self.load() is not None:
            return self.refusal
        if compat.dispatch_modes():
            return RECORDED
        x, residual = call.x, call.residual
        if (call.basic or call.blends) and readable(x) and (residual is None or readable(residual)):
            plan = self.prepared(
                x.shape, x.stride(), x.dtype, None if residual is None else residual.dtype,
                call.activation, torch.get_num_threads(),
            )  # fmt: skip
            if plan.__class__ is str:
                return plan
            if plan.fits(call):
                call.plan = plan
                return None
        return self._refusal(call)

    def _refusal(self, call: Call) -> str | None:
        """Whether the stages take a call that has no plan, and why not."""
        x, residual = call.x, call.residual
        found = unreadable(
            x, call.weight, call.bias, residual, call.mask, call.running_mean, call.running_var,
            call.num_batches_tracked,
        )  # fmt: skip
        if found is not None:
            return f"`{TENSORS[found[0]]}` {found[1]}"
        if x.__class__ not in PLAIN:
            return f"the input is a {x.__class__.__name__}"
        residual_dtype = None if residual is None else residual.dtype
        why: str | None = self.stages.unsupported(x.shape, x.stride(), x.dtype, residual_dtype)
        return why

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """By the plan where there is one, else by stages."""
        if call.plan is None:
            return super().forward(call)
        if call.by_running and not call.gradient:
            return call.plan.infer(call), ((), None)
        result: tuple[Tensor, Packed] = call.plan.forward(call)
        return result

    def backward(self, saved: Packed, grad: Tensor, needs: Any) -> Gradients:
        """The gradients in closed form."""
        if compat.dispatch_modes():  # which record no kernel
            return in_operators(self, self.unpack(saved), grad, needs)
        tensors, rest = saved
        if needs[0] and hasattr(rest, "plan"):
            gradients: Gradients = rest.plan.backward(tensors, rest, grad, needs)
            return gradients
        return super().backward(saved, grad, needs)

    def unpack(self, saved: Packed) -> Saved:
        """What `forward` left, in full."""
        tensors, rest = saved
        if hasattr(rest, "plan"):
            expanded: Saved = rest.plan.unpack(tensors, rest)
            return expanded
        return super().unpack(saved)


CPU = CpuKernels("cpu", None, compiled=True)
