"""The GPU kernels as a backend: policies decided in the kernel where they can be, else by stages.

The kernels have been run in Triton's interpreter and compiled for devices, and never been measured
on one: so they serve only after `steadynorm.kernels.use("gpu")`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels.cpu.readable import PLAIN, name_of
from steadynorm.kernels.reference.closed_form import ClosedForm
from steadynorm.kernels.spec import HALF, Call, Gradients, Packed, Saved

TYPES = (torch.float32, *HALF)
NOT_ON_A_GPU = "the input is not on a GPU"
NOT_SWITCHED_ON = 'steadynorm.kernels.use("gpu") has not switched the GPU kernels on'


class GpuKernels(ClosedForm):
    """Triton's kernels; see stages.py and prepared.py. Loaded with the first call."""

    on = False
    interpreted = False
    """Whether tensors in this machine's memory serve: in Triton's interpreter, for tests."""
    prepared: Any = None
    refusal: str | None = None
    """Why the kernels cannot be loaded."""

    def load(self) -> str | None:
        """Import the kernels, and Triton with them. Says why it cannot be."""
        if self.prepared is None and self.refusal is None:
            try:
                from . import prepared, stages
            except ImportError as error:
                self.refusal = (
                    f"the GPU kernels cannot be loaded ({error}); Triton comes with PyTorch's "
                    f"builds for GPUs, or as pip install triton"
                )
            else:
                self.prepared, self.stages = prepared, stages
        return self.refusal

    def supports(self, call: Call) -> str | None:
        """Plain tensors on a GPU, of types and a layout that the kernels take."""
        if not (call.x.is_cuda or self.interpreted):  # first: CPU calls pass here too
            return NOT_ON_A_GPU
        if not self.on:
            return NOT_SWITCHED_ON
        return self.load() or self._unreadable(call) or self._unsupported(call)

    def _unreadable(self, call: Call) -> str | None:
        """Whether every tensor is nothing but memory on the input's device."""
        names = ("x", "weight", "bias", "residual", "mask", "running_mean", "running_var",
                 "num_batches_tracked")  # fmt: skip
        for name in names:
            t = getattr(call, name)
            if t is None:
                continue
            if t.__class__ not in PLAIN:
                return f"`{name}` is a {t.__class__.__name__}"
            if t.layout is not torch.strided or t.is_neg():
                return f"`{name}` is not plain memory"
            if t.device != call.x.device:
                return f"`{name}` is on {t.device}, the input on {call.x.device}"
        return None

    def _unsupported(self, call: Call) -> str | None:
        x, residual, mask = call.x, call.residual, call.mask
        if x.dtype not in TYPES:
            return f"the input is {name_of(x.dtype)}, not float32, float16 or bfloat16"
        if not x.numel():
            return "the input is empty"
        if x.is_cuda and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(x.device)
            if major < 8:
                return f"the device has compute capability {major}.{minor}, less than 8.0"
        if residual is not None and residual.dtype is not x.dtype:
            return f"the residual is {name_of(residual.dtype)}, the input {name_of(x.dtype)}"
        if mask is not None and mask.shape != (*x.shape[:1], *x.shape[2:]):
            return "every channel has its own valid positions"
        for name in ("weight", "bias", "running_mean", "running_var"):
            t = getattr(call, name)
            allowed = TYPES if name in {"weight", "bias"} else TYPES[:1]
            if t is not None and (t.dtype not in allowed or not t.is_contiguous()):
                return f"`{name}` is {name_of(t.dtype)}, or not contiguous"
        batches = call.num_batches_tracked
        if batches is not None and batches.dtype is not torch.int64:
            return f"`num_batches_tracked` is {name_of(batches.dtype)}, not int64"
        plan = self.stages.planned(x, call.groups)
        return plan if plan.__class__ is str else None

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """With the decision in the kernel where the policy alone takes it, else by stages."""
        if not self.prepared.decidable(call):
            return super().forward(call)
        result: tuple[Tensor, Packed] = self.prepared.forward(call)
        return result

    def backward(self, saved: Packed, grad: Tensor, needs: Any) -> Gradients:
        """The gradients in closed form."""
        if not hasattr(saved[1], "plan"):
            return super().backward(saved, grad, needs)
        gradients: Gradients = self.prepared.backward(saved, grad, needs)
        return gradients

    def unpack(self, saved: Packed) -> Saved:
        """What `forward` left, in full."""
        tensors, rest = saved
        if not hasattr(rest, "plan"):
            return super().unpack(saved)
        expanded: Saved = self.prepared.unpack(tensors, rest)
        return expanded


GPU = GpuKernels("gpu", None, compiled=True)
