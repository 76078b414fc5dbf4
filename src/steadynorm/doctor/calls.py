"""One call of a batch norm in training, as a monitor reads it: tensors now, numbers later."""

from __future__ import annotations

from math import isnan, nan, tanh
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.evidence.graph import inside_checkpointing
from steadynorm.doctor.evidence.training import ChannelReading
from steadynorm.models.layers import Norm
from steadynorm.models.observe import input_of, moments_of

# Where the slope of a sigmoid is a twentieth of its largest: s(1 − s) = 1/80.
STEEP_UNTIL = 4.36
# By the activation inside a layer: outputs beyond these lie where a sigmoid (tanh) is flat.
EDGES = {
    "sigmoid": (1 / (1 + np.exp(STEEP_UNTIL)), 1 - 1 / (1 + np.exp(STEEP_UNTIL))),
    "tanh": (-tanh(STEEP_UNTIL), tanh(STEEP_UNTIL)),
}


class NormCall:
    """One call of a layer: tensors of a channel's size, which become numbers when the step is over;
    only then does a GPU have to be waited for, and only then is there a gradient.
    """

    def __init__(
        self, layer: str, step: int, eps: float, samples: int, values: Any, parts: Tensor
    ) -> None:
        self.layer, self.step, self.eps, self.samples = layer, step, eps, samples
        self._values = values
        self._parts = parts  # mean, var, running mean, running var, variance of samples' means
        self._dead: Tensor | None = None
        self._saturated: Tensor | None = None
        self._gradient: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def begin(
        cls, norm: Norm, module: nn.Module, args: Any, kwargs: Any, layer: str, step: int
    ) -> NormCall | None:
        """The moments of a layer's input, beside its running statistics as they are now."""
        x, mask = input_of(module, args, kwargs) or (None, None)
        if x is None or not x.is_floating_point() or not x.numel():
            return None
        count, mean, var, of_means = _moments(x, mask)
        none = torch.full_like(mean, nan)
        running = (norm.running_mean, norm.running_var)
        parts = [mean, var, *(none if t is None else t.to(mean.dtype) for t in running), of_means]
        return cls(layer, step, norm.eps, x.shape[0], count, torch.stack(parts))

    @torch.no_grad()
    def end(self, output: Tensor, activation: str | None) -> None:
        """The call's output, and later the gradient that reaches it."""
        z = output.detach()
        if z.numel():
            low, high = EDGES.get(activation or "", (-STEEP_UNTIL, STEEP_UNTIL))
            self._dead = z.amax([axis for axis in range(z.ndim) if axis != 1]) <= 0
            flat = torch.count_nonzero(z < low) + torch.count_nonzero(z > high)
            self._saturated = flat / z.numel()
        if output.requires_grad:
            self._gradient = torch.zeros(output.shape[1])  # until one comes
            output.register_hook(self._backward)
        elif not torch.is_grad_enabled() and not inside_checkpointing():
            self._gradient = torch.zeros(output.shape[1])  # a block under no_grad: none will come

    def _backward(self, gradient: Tensor) -> None:
        wide = torch.float32 if gradient.dtype.itemsize < 4 else None  # half would overflow
        axes = [axis for axis in range(gradient.ndim) if axis != 1]
        self._gradient = torch.linalg.vector_norm(gradient.detach(), dim=axes, dtype=wide)

    def by_channel(self) -> ChannelReading:
        """The call by channel."""
        mean, var, running_mean, running_var, of_means = self._parts.cpu().to(torch.float64).numpy()
        none = np.zeros(len(mean), bool)
        dead = none if self._dead is None else self._dead.cpu().numpy()
        no_gradient = none if self._gradient is None else self._gradient.cpu().numpy() == 0
        return ChannelReading(
            self.step, int(self._values), mean, var, running_mean, running_var, self.eps, dead,
            self.samples, of_means, no_gradient,
        )  # fmt: skip

    def saturated(self) -> float:
        """Share of outputs where a sigmoid is flat."""
        return nan if self._saturated is None else float(self._saturated)

    def gradient(self) -> float:
        """Norm of the gradient for the output; see `Reading`."""
        if self._gradient is None:
            return nan
        size = float(torch.linalg.vector_norm(self._gradient))
        return float("inf") if isnan(size) else size


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Count, mean and variance of a batch, and the variance of its samples' own means; NaN where a
    mask leaves samples of different sizes.
    """
    if mask is not None or x.ndim == 2:
        count, mean, var, _ = moments_of(x, mask)
        return count, mean, var, var if mask is None else torch.full_like(var, nan)
    samples, channels = x.shape[:2]
    # A sample's channel as a channel of one sample: one look at the input gives both.
    count, means, within, _ = moments_of(x.reshape(1, samples * channels, *x.shape[2:]), None)
    means, within = means.view(samples, channels), within.view(samples, channels)
    of_means = means.var(0, correction=0)
    return samples * count, means.mean(0), within.mean(0) + of_means, of_means
