"""The GPU kernels as a backend: policies decided in the kernel where they can be, else by stages.

They serve only after `steadynorm.kernels.use("gpu")`: they have run on one card, where the host
took longer to launch them on small tensors than PyTorch for its own operators (docs/gpu.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels.cpu.readable import PLAIN, name_of, unreadable_argument
from steadynorm.kernels.reference.closed_form import RECORDED, ClosedForm
from steadynorm.kernels.spec import HALF, Call

TYPES = (torch.float32, *HALF)
PER_CHANNEL = {
    **dict.fromkeys(("weight", "bias"), TYPES),
    **dict.fromkeys(("running_mean", "running_var"), (torch.float32,)),
}
"""The types in which the kernels take what is per channel."""
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
        if not (call.x.is_cuda or self.interpreted):  # asked first: CPU calls come here too
            return NOT_ON_A_GPU
        if not self.on:
            return NOT_SWITCHED_ON
        if self.is_recorded():
            return RECORDED
        if self.prepared is None and self.load() is not None:
            return self.refusal
        prepared = self.prepared
        decidable = prepared is not None and prepared.decidable(call)
        if decidable and call.mask is None and _is_strided(call):
            known = prepared.KINDS.get(prepared.key_of(call))
            if known is not None and _fits(call):
                call.plan = known
                return None
        why = unreadable_argument(call, call.x.device) or self._unsupported(call)
        if why is None and decidable:
            call.plan = prepared.kind_of(call)
        return why

    def _unsupported(self, call: Call) -> str | None:
        x, residual, mask = call.x, call.residual, call.mask
        if x.__class__ not in PLAIN:
            return f"the input is a {x.__class__.__name__}"
        if x.dtype not in TYPES:
            return f"the input is {name_of(x.dtype)}, not float32, float16 or bfloat16"
        if not x.numel():
            return "the input is empty"
        if x.is_cuda and torch.version.hip is None:
            major, minor = _capability(x.device)
            if major < 8:
                return f"the device has compute capability {major}.{minor}, less than 8.0"
        if residual is not None and residual.dtype is not x.dtype:
            return f"the residual is {name_of(residual.dtype)}, the input {name_of(x.dtype)}"
        if mask is not None and mask.shape != (*x.shape[:1], *x.shape[2:]):
            return "every channel has its own valid positions"
        for name, types in PER_CHANNEL.items():
            t = getattr(call, name)
            if t is not None and not (t.dtype in types and t.is_contiguous()):
                return f"`{name}` is {name_of(t.dtype)}, or not contiguous"
        batches = call.num_batches_tracked
        if batches is not None and batches.dtype is not torch.int64:
            return f"`num_batches_tracked` is {name_of(batches.dtype)}, not int64"
        plan = self.stages.planned(x, call.groups)
        return plan if plan.__class__ is str else None


def _is_strided(call: Call) -> bool:
    """Whether input and residual have strides to ask for."""
    strided, residual = torch.strided, call.residual
    return call.x.layout is strided and (residual is None or residual.layout is strided)


def _fits(call: Call) -> bool:
    """Whether the tensors of a call of a known kind are memory that its kernels can use.

    Checks only what the key of the kind does not tell, and names nothing: small calls come here.
    """
    x, residual, batches = call.x, call.residual, call.num_batches_tracked
    device = x.get_device()
    if not _is_memory(x, device):
        return False
    if residual is not None and not (residual.dtype is x.dtype and _is_memory(residual, device)):
        return False
    for t in (call.weight, call.bias, call.running_mean, call.running_var):
        if t is not None and not (t.is_contiguous() and _is_memory(t, device)):
            return False
    if call.running_var is not None and call.running_var.dtype is not torch.float32:
        return False
    return batches is None or (batches.dtype is torch.int64 and _is_memory(batches, device))


def _is_memory(t: Tensor, device: int) -> bool:
    """Whether a strided tensor is nothing but memory on that device."""
    return (
        t.__class__ in PLAIN
        and t.get_device() == device
        and not t.is_neg()
        and not t._is_zerotensor()
    )


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    """A device's compute capability, which costs microseconds to ask for."""
    return torch.cuda.get_device_capability(device)


GPU = GpuKernels("gpu", None, compiled=True)
