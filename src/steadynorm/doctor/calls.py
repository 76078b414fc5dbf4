"""One call of a batch norm in training, as a monitor reads it: tensors now, numbers later."""

from __future__ import annotations

from math import isnan
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.run import Look
from steadynorm.kernels.dispatch import stages_for
from steadynorm.models.surgery.layers import Norm
from steadynorm.nn import checks
from steadynorm.nn.batchnorm import SteadyNorm

# Where the slope of a sigmoid is a twentieth of its largest: s(1 − s) = 1/80.
STEEP_UNTIL = 4.36


class Call:
    """One call of a layer: tensors of a channel's size, which become numbers when the step is over;
    only then does a GPU have to be waited for, and only then is there a gradient.
    """

    def __init__(self, layer: str, step: int, eps: float, values: Any, parts: Tensor) -> None:
        self.layer, self.step, self.eps = layer, step, eps
        self._values, self._parts = values, parts  # mean, var, running mean, running var
        self._dead: Tensor | None = None
        self._saturated: Tensor | None = None
        self._gradient: Tensor | None = None

    @torch.no_grad()
    def leave(self, output: Tensor, activation: Any) -> None:
        """The call's output, and later the gradient that reaches it."""
        z = output.detach()
        axes = [axis for axis in range(z.ndim) if axis != 1]
        if z.numel():
            self._dead = z.amax(axes) <= 0
            self._saturated = _beyond(z, activation) / z.numel()
        if output.requires_grad:
            self._gradient = torch.zeros(())  # until one comes
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        wide = torch.float32 if gradient.dtype.itemsize < 4 else None  # half would overflow
        self._gradient = torch.linalg.vector_norm(gradient.detach(), dtype=wide)

    def look(self) -> Look:
        """The call by channel."""
        mean, var, running_mean, running_var = self._parts.cpu().to(torch.float64).numpy()
        dead = np.zeros(len(mean), bool) if self._dead is None else self._dead.cpu().numpy()
        values = int(self._values)
        return Look(self.step, values, mean, var, running_mean, running_var, self.eps, dead)

    def saturated(self) -> float:
        """Share of outputs where a sigmoid is flat."""
        return float("nan") if self._saturated is None else float(self._saturated)

    def gradient(self) -> float:
        """Norm of the gradient for the output; see `Reading`."""
        if self._gradient is None:
            return float("nan")
        size = float(self._gradient)
        return float("inf") if isnan(size) else size


@torch.no_grad()
def met(norm: Norm, layer: nn.Module, args: Any, kwargs: Any, name: str, step: int) -> Call | None:
    """The moments of what reaches a layer, beside its running statistics as they are now."""
    x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point() or not x.numel():
        return None  # the layer itself says best what is wrong
    mask = kwargs.get("mask") if isinstance(layer, SteadyNorm) else None
    if mask is not None:
        mask = checks.expanded_mask(mask, x, type(layer).__name__)
    count, mean, var, _ = stages_for(x).moments(x.detach(), mask=mask)
    none = torch.full_like(mean, float("nan"))
    running = (norm.running_mean, norm.running_var)
    parts = torch.stack([mean, var, *(none if t is None else t.to(mean.dtype) for t in running)])
    return Call(name, step, norm.eps, count, parts)


def _beyond(z: Tensor, activation: str | None) -> Tensor:
    """How many outputs lie where a sigmoid is flat; of a layer with one inside, where it was."""
    if activation == "sigmoid":
        low = 1 / (1 + torch.tensor(STEEP_UNTIL, dtype=torch.float64).exp()).item()
        return torch.count_nonzero(z < low) + torch.count_nonzero(z > 1 - low)
    edge = STEEP_UNTIL
    if activation == "tanh":
        edge = torch.tensor(edge, dtype=torch.float64).tanh().item()
    return torch.count_nonzero(z > edge) + torch.count_nonzero(z < -edge)
