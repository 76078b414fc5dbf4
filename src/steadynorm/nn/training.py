"""What happens to statistics in one training forward: pool, decide, remember, update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import choice, operators
from steadynorm.kernels.torch_arrays import reference
from steadynorm.nn import checks, recomputation
from steadynorm.nn.synchronize import Replicas
from steadynorm.statistics import Context, Moments, Normalizer, Policy, RunningStatistics, step


class Buffers:
    """A layer's running statistics: read in the statistics' type, written in place."""

    def __init__(
        self, mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None
    ) -> None:
        self.mean = mean
        self.var = var
        self.num_batches_tracked = num_batches_tracked

    def read(self, dtype: torch.dtype) -> RunningStatistics | None:
        """The statistics now; None where nothing is tracked."""
        if self.mean is None or self.var is None:
            return None
        mean, var = self.mean, self.var
        batches: Any = self.num_batches_tracked
        if torch.compiler.is_compiling() and not choice.is_exporting():
            mean, var, *rest = recomputation.snapshot(
                [mean, var] if batches is None else [mean, var, batches]
            )
            batches = rest[0] if rest else None
        elif batches is not None and batches.is_cpu and not choice.needs_plain_operations():
            batches = int(batches)  # plain numbers are cheaper than scalar tensors
        if isinstance(batches, Tensor) and dtype == torch.float64:
            batches = batches.double()  # weights such as 1/(t + 1) would else be float32
        return RunningStatistics(mean.to(dtype), var.to(dtype), batches)

    def write(self, after: RunningStatistics) -> None:
        """Store the statistics after a batch."""
        if self.mean is None or self.var is None:
            return
        if torch._C._are_functorch_transforms_active():
            _WriteThroughTransforms.apply(  # type: ignore[no-untyped-call]
                self.mean, self.var, self.num_batches_tracked, after.mean, after.var, after.batches
            )
            return
        with torch.no_grad():
            self.mean.copy_(after.mean)
            self.var.copy_(after.var)
            if self.num_batches_tracked is not None and after.batches is not None:
                if isinstance(after.batches, Tensor):
                    self.num_batches_tracked.copy_(after.batches)
                else:
                    self.num_batches_tracked.fill_(after.batches)


class _WriteThroughTransforms(torch.autograd.Function):
    """Writes buffers below torch.func's transforms, which refuse to change what they captured.

    Under `vmap` over buffers that are not batched themselves, the examples' updates are averaged:
    each example is one batch of its own, and all start from the same statistics.
    """

    @staticmethod
    def forward(
        mean: Tensor,
        var: Tensor,
        tracked: Tensor | None,
        new_mean: Tensor,
        new_var: Tensor,
        new_tracked: Tensor | None,
    ) -> Tensor:
        with torch.no_grad():
            mean.copy_(new_mean)
            var.copy_(new_var)
            if tracked is not None and new_tracked is not None:
                tracked.copy_(new_tracked)
        return new_mean.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, int | None]:
        old, new = tensors[:3], list(tensors[3:])
        old_dims, new_dims = in_dims[:3], in_dims[3:]
        for i, (kept, kept_dim, value, dim) in enumerate(
            zip(old, old_dims, new, new_dims, strict=True)
        ):
            if kept is None or value is None:
                continue
            if kept_dim is None and dim is not None:
                new[i] = value.to(torch.float64).mean(dim).to(value.dtype)
            elif kept_dim is not None:
                spread = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
                old_first = kept.movedim(kept_dim, 0)
                new[i] = spread.expand_as(old_first).movedim(0, kept_dim)
        done: Tensor = _WriteThroughTransforms.apply(  # type: ignore[no-untyped-call]
            *old, *new
        )
        return done, None


class TrainingStep(operators.Call):
    """One training forward's statistics."""

    def __init__(
        self,
        input: Tensor,
        policy: Policy,
        buffers: Buffers,
        momentum: float | None,
        eps: float,
        replicas: Replicas | None,
        nonfinite: str,
        owner: str,
        groups: tuple[int, ...] | None,
        activation: str | None,
    ) -> None:
        super().__init__(eps, groups=groups, activation=activation, replicas=replicas)
        self.own_moments = policy.batch_alone and replicas is None
        # Asked here: inside the autograd node gradient is off in any case.
        self.may_repeat = policy.needs_running and recomputation.may_be_recomputed()
        self.input = input
        self.policy = policy
        self.buffers = buffers
        self.momentum = momentum
        self.exchange = replicas
        self.nonfinite = nonfinite
        self.owner = owner

    def settle(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """Moments pooled over replicas and what normalizes; moves the running statistics."""
        assert batch is not None  # a training step always measures its batch
        samples: Any = self.input.shape[0]
        if self.exchange is not None:
            batch, samples = self.exchange.pool(batch, samples)
        self._check(batch)
        running = self.buffers.read(reference.statistics_dtype(self.input))
        context = Context(samples, self.momentum, self.eps, torch)
        normalizer, after = step(
            self.policy, batch, running, context, skip_nonfinite=self.nonfinite == "skip"
        )
        normalizer = self._move(batch, normalizer, None if after is running else after)
        if self.exchange is not None:
            return self.exchange.own(batch), self.exchange.own(normalizer)
        return batch, normalizer

    def _move(
        self, batch: Moments, normalizer: Normalizer, after: RunningStatistics | None
    ) -> Normalizer:
        """Store the running statistics, once, however often checkpointing runs the forward."""
        mean = self.buffers.mean
        if mean is None:
            return normalizer
        if recomputation.is_recomputation():
            leans = self.policy.needs_running
            return (leans and recomputation.recall(mean, batch)) or normalizer
        if self.may_repeat:
            recomputation.remember(mean, batch, normalizer)
        if after is not None:
            self.buffers.write(after)
        return normalizer

    def _check(self, batch: Moments) -> None:
        """Refuse one value per channel where only the data tell, if reading them is cheap."""
        if isinstance(batch.count, int) or choice.needs_plain_operations():
            return
        if batch.count.device.type == "cpu" and bool((batch.count == 1).any()):
            checks.values_per_channel(self.input, 1, self.policy, self.owner)
