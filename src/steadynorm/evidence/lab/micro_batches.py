"""A layer that normalizes every micro-batch of a batch alone, in the order of a loop.

Accumulating the gradient of 64 batches of one takes 64 forward and backward passes. Here it takes
one: the stages run over all micro-batches at once, and only what is per channel follows their
order, by the package's own policies. `tests/evidence/lab/test_micro_batches.py` holds it to the
layers themselves, called once for each micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from steadynorm.kernels.reference.torch_arrays import reference
from steadynorm.statistics import (
    Context,
    GradientMemory,
    Moments,
    Normalizer,
    Policy,
    RunningStatistics,
    coefficients,
    gradient_coefficients,
    gradient_factors,
    parameter_gradients,
    remember,
    with_memory,
)


class MicroBatchNorm(_BatchNorm):
    """Batch normalization of (N, C) or (N, C, *) in micro-batches of `size` samples.

    In training N must be a multiple of `size`. Running statistics and the memory of the gradient
    move once for each micro-batch, the latter in the backward pass, so that there must be one
    backward for a forward.
    """

    gradient_memory: Tensor

    def __init__(self, num_features: int, policy: Policy, size: int) -> None:
        super().__init__(num_features)
        self.statistics, self.size = policy, size
        memory = torch.zeros(2, num_features)
        self.register_buffer("gradient_memory", memory, persistent=False)

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; in training, move what is remembered."""
        if not self.training:
            return super().forward(input)
        if input.shape[0] % self.size:
            raise ValueError(
                f"MicroBatchNorm: `input` must hold a multiple of {self.size} samples; "
                f"got {input.shape[0]}."
            )
        y: Tensor = _InOrder.apply(input, self.weight, self.bias, self)  # type: ignore[no-untyped-call]
        return y

    def decide(self, batch: Moments) -> Normalizer:
        """What normalizes each micro-batch; moves the running statistics."""
        buffers: Any = (self.running_mean, self.running_var, self.num_batches_tracked)
        mean, var, batches = (buffer.numpy() for buffer in buffers)
        running = RunningStatistics(mean, var, int(batches))
        context = Context(self.size, self.momentum, self.eps, np)
        before = []
        for row in zip(*batch, strict=True):
            before.append(running)
            running = self.statistics.update(Moments(*row), running, context)
        mean, var, batches = (np.stack(rows) for rows in zip(*before, strict=True))
        for buffer, value in zip(buffers, running, strict=True):
            buffer.copy_(torch.as_tensor(value))
        seen = RunningStatistics(mean, var, batches[:, None].astype(mean.dtype))
        return self.statistics.normalizer(batch, seen, context)

    def remember(self, batch: Moments, normalizer: Normalizer, *seen: Any) -> GradientMemory | None:
        """What is taken off in each micro-batch, (G, C); moves the memory of the gradient. `seen`:
        ρ and the two sums of the backward reduction.
        """
        rate = self.statistics.gradient_rate(self.size)
        if rate is None:
            return None

        def after(memory: Any) -> Any:  # every micro-batch, all from the same memory
            return np.stack(self.follow(GradientMemory(*memory), rate, normalizer, batch, *seen)[0])

        # It is affine in the memory: what nothing, a constant of 1 and a slope of 1 become is all.
        nothing, constant, slope = np.array([[0, 0], [1, 0], [0, 1]], batch.mean.dtype)
        new = after(nothing)
        kept = [after(unit) - new for unit in (constant, slope)]
        memory = self.gradient_memory.numpy().copy()
        before = []
        for added, *parts in zip(*(part.swapaxes(0, 1) for part in (new, *kept)), strict=True):
            before.append(memory)
            memory = added + parts[0] * memory[0] + parts[1] * memory[1]
        self.gradient_memory.copy_(torch.from_numpy(memory))
        found = GradientMemory(*np.stack(before, axis=1))
        return self.follow(found, rate, normalizer, batch, *seen)[1]

    def follow(
        self, memory: GradientMemory, rate: Any, *seen: Any
    ) -> tuple[GradientMemory, GradientMemory]:
        """The memory after a micro-batch, and what of it this micro-batch's gradient loses."""
        memory = remember(memory, rate, *seen, xp=np)
        return memory, memory


class _InOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: MicroBatchNorm) -> Tensor:
        groups = (layer.size,) * (len(x) // layer.size)
        batch = _moments(x.unflatten(0, (-1, layer.size)))
        normalizer = layer.decide(batch)
        parts = (part if np.isscalar(part) else torch.from_numpy(part) for part in normalizer)
        known = coefficients(Normalizer(*parts), weight, bias, layer.eps)
        ctx.save_for_backward(x)
        ctx.groups, ctx.layer, ctx.decided = groups, layer, (batch, normalizer, known)
        y: Tensor = reference.apply(x, *known[:3], groups=groups)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (batch, normalizer, known) = ctx.saved_tensors, ctx.decided
        maps: Any = (grad, x, *known[:3])
        sums = [t.numpy() for t in reference.reduce_grad(*maps, groups=ctx.groups)]
        scale, rho = known.scale.numpy(), known.rho.numpy()
        factors = gradient_factors(normalizer, batch, scale, rho)
        through = gradient_coefficients(factors, *sums)
        memory = ctx.layer.remember(batch, normalizer, rho, *sums)
        if memory is not None:
            through = with_memory(through, memory, normalizer, scale, rho)
        through_x: Any = [torch.from_numpy(part) for part in through]
        dx, _ = reference.apply_grad(*maps, *through_x, groups=ctx.groups)
        dweight, dbias = parameter_gradients(normalizer, rho, *sums)
        return dx, *(torch.from_numpy(part.sum(0)) for part in (dweight, dbias)), None


def _moments(x: Tensor) -> Moments:
    """Of (G, size, C, *), for each micro-batch. The reference's take ten times as long on so few
    values, since `torch.var_mean` does.
    """
    axes = (1, *range(3, x.ndim))
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square_().mean(axes)
    mean = mean.reshape(var.shape)
    count = np.full((len(x), 1), x[0, :, 0].numel())
    return Moments(count, mean.numpy(), var.numpy(), np.zeros_like(mean))
