"""A candidate for `Steady`: the gradient through the running variance is remembered, too.

    k = n/(n + prior), n of samples instead of positions, or in between
    dx = γ·ρ·( g - k·S₁/c - k·(x - μ)·ρ²·S₂/c - (1 - k)·x̂·R ),   S₁ = Σg, S₂ = Σg·(x - m)
    R ← R + a·(ρ·S₂/c - R),   a = N/(N + horizon)

with c the values per channel. The running variance holds a part 1 - k of what normalizes, and is
made of samples gone by. That part's gradient would have to reach those samples' weights; `Steady`
drops it. Then nothing tells a channel that growing only makes its running variance grow with it.
Here the present sample takes the part that it will have in later batches' statistics, at the
rate that earlier batches showed. So the whole share, k now and 1 - k remembered, flows again.

Plain PyTorch, for the lab only; replicas do not pool their statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class GradientMemoryNorm(_BatchNorm):
    """Batch normalization as above, of (N, C) and (N, C, *).

    `power`: n is N·(positions per sample)^power, so 0 counts samples and 1 positions. `remember`:
    False drops the last term of dx, which with power 1 is `Steady`.
    """

    gradient: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        prior: float = 4.0,
        horizon: float = 640.0,
        power: float = 0.0,
        remember: bool = True,
    ) -> None:
        super().__init__(num_features)
        self.prior, self.horizon = prior, horizon
        self.power, self.remember = power, remember
        self.register_buffer("gradient", torch.zeros(num_features))

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; in training, move the running statistics."""
        if not self.training or input.numel() == 0:
            return super().forward(input)
        with torch.no_grad():
            axes = (0, *range(2, input.ndim))
            samples = input.shape[0]
            positions = input.numel() / (samples * input.shape[1])
            first = 1 / (int(self.num_batches_tracked) + 1)  # type: ignore[arg-type]
            known = samples * positions**self.power
            share = max(known / (known + self.prior), first)
            weight = max(samples / (samples + self.horizon), first)
            mu, v = input.mean(axes), input.var(axes, correction=0)
            mean: Any = self.running_mean
            var: Any = self.running_var
            away = mu - mean
            m = mean + share * away
            u = (1 - share) * var + share * v + share * (1 - share) * away**2
            var.copy_((1 - weight) * var + weight * v + weight * (1 - weight) * away**2)
            mean.add_(weight * away)
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        parameters = (self.weight, self.bias)
        y: Tensor = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, *parameters, (mu, m, (u + self.eps).rsqrt()), share, weight, self
        )
        return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor, Tensor],
        share: float,
        rate: float,
        layer: GradientMemoryNorm,
    ) -> Tensor:
        mu, m, rho = (_per_channel(t, x) for t in statistics)
        hat = (x - m) * rho
        ctx.save_for_backward((x - mu) * rho, hat, rho * _per_channel(weight, x))
        ctx.share, ctx.rate, ctx.layer = share, rate, layer
        return hat * _per_channel(weight, x) + _per_channel(bias, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        own, hat, scale = ctx.saved_tensors
        layer, share = ctx.layer, ctx.share
        axes = (0, *range(2, grad.ndim))
        count = grad.numel() / grad.shape[1]
        dweight, dbias = (grad * hat).sum(axes), grad.sum(axes)
        layer.gradient += ctx.rate * (dweight / count - layer.gradient)
        through = share * (_per_channel(dbias, grad) + own * _per_channel(dweight, grad)) / count
        if layer.remember:
            through = through + (1 - share) * hat * _per_channel(layer.gradient, grad)
        return scale * (grad - through), dweight, dbias, None, None, None, None


def _per_channel(channel: Tensor, x: Tensor) -> Tensor:
    return channel.view(1, -1, *(1,) * (x.ndim - 2))
