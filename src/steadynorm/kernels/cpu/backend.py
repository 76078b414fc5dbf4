"""The compiled CPU kernels as a backend: prepared plans for most calls, stages for all others."""

from __future__ import annotations

from typing import Any

import torch

from steadynorm._extras import lacking
from steadynorm.kernels.reference.closed_form import RECORDED, ClosedForm
from steadynorm.kernels.spec import Call

from .readable import PLAIN, readable, unreadable_argument


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
        if self.is_recorded():
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
        unreadable = unreadable_argument(call)
        if unreadable is not None:
            return unreadable
        if x.__class__ not in PLAIN:
            return f"the input is a {x.__class__.__name__}"
        residual_dtype = None if residual is None else residual.dtype
        why: str | None = self.stages.unsupported(x.shape, x.stride(), x.dtype, residual_dtype)
        return why


CPU = CpuKernels("cpu", None, compiled=True)
