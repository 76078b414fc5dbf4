"""The compiled CPU kernels as a backend: prepared plans for basic calls, stages for all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm._extras import lacking
from steadynorm.kernels.closed_form import ClosedForm
from steadynorm.kernels.spec import Call, Gradients, Saved, Tensors

from .readable import unreadable


class CpuKernels(ClosedForm):
    """Numba's machine code over raw memory; see loops.py. Loaded with the first call."""

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
        x, residual = call.x, call.residual
        for t in (
            x, residual, call.mask, call.weight, call.bias, call.running_mean, call.running_var,
            call.num_batches_tracked,
        ):  # fmt: skip
            if t is not None and (why := unreadable(t)) is not None:
                name = next(name for name, other in vars(call).items() if other is t)
                return f"`{name}` {why}"
        shape, strides, dtype = x.shape, x.stride(), x.dtype
        residual_dtype = None if residual is None else residual.dtype
        no: str | None = self.stages.unsupported(shape, strides, dtype, residual_dtype)
        if no is None and call.basic:
            activation, threads = call.activation, torch.get_num_threads()
            plan = self.prepared(shape, strides, dtype, activation, residual is not None, threads)
            call.plan = plan if plan.fits(call) else None
        return no

    def forward(self, call: Call) -> tuple[Tensor, tuple[Tensors, Any]]:
        """By the plan where there is one that the backward can go on with, else by stages."""
        if call.plan is None or (call.by_running and call.gradient):
            return super().forward(call)
        if call.by_running:
            return call.plan.infer(call), ((), None)
        result: tuple[Tensor, tuple[Tensors, Any]] = call.plan.train(call)
        return result

    def backward(self, saved: tuple[Tensors, Any], grad: Tensor, needs: Any) -> Gradients:
        """The gradients in closed form."""
        tensors, rest = saved
        if needs[0] and hasattr(rest, "plan"):
            gradients: Gradients = rest.plan.backward(tensors, grad, needs)
            return gradients
        return super().backward(saved, grad, needs)

    def expand(self, saved: tuple[Tensors, Any]) -> Saved:
        """What `forward` left, in full."""
        tensors, rest = saved
        if hasattr(rest, "plan"):
            expanded: Saved = rest.plan.expand(tensors, rest.eps)
            return expanded
        return super().expand(saved)


CPU = CpuKernels("cpu", None, compiled=True)
