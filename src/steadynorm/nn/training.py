"""What happens to statistics in one training forward: pool, decide, remember, update."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import compat
from steadynorm.kernels.spec import Call, statistics_dtype
from steadynorm.nn import checks, recomputation
from steadynorm.statistics import (
    Context,
    Moments,
    Normalizer,
    Policy,
    RunningStatistics,
    batches_seen,
    step,
)


@dataclass(eq=False, slots=True)
class TrainingStep(Call):
    """One training forward: reads the layer's running statistics, and writes them in place."""

    replicas: Any = None
    owner: str = "batch_norm"

    may_repeat: bool = field(default=False, init=False)
    """Whether this may be the first run of a checkpointed region."""
    repeats: Tensor | None = field(default=None, init=False)
    """In its second run the layer's running mean, by which the first is remembered."""

    def recompute(self) -> None:
        """Take copies of the buffers, which have moved already, in their place."""
        self.repeats, self.may_repeat, self.blends = self.running_mean, False, False
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        copies = (t if t is None else t.clone() for t in buffers)
        self.running_mean, self.running_var, self.num_batches_tracked = copies

    def by_policy_alone(self) -> bool:
        """Where nothing is pooled, kept out, or remembered for a recomputation."""
        remembered = self.repeats is not None or self.may_repeat
        needs = self.policy is not None and self.policy.needs_running
        return self.replicas is None and not self.skip_nonfinite and not (remembered and needs)

    def decide(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """Moments pooled over replicas and what normalizes; moves the running statistics."""
        assert batch is not None  # a training step always measures its batch
        assert self.policy is not None
        counts = self.policy.counts_samples
        samples: Any = self.valid_samples() if counts else self.x.shape[0]
        if self.replicas is not None:
            batch, samples = self.replicas.pool(batch, samples)
        self._refuse_one_value(batch, self.policy)
        running = self._running(self.policy)
        context = Context(samples, self.momentum, self.eps, torch)
        if self.memory is not None:
            self.memory.rate = self.policy.gradient_rate(samples)
        normalizer, after = step(
            self.policy, batch, running, context, skip_nonfinite=self.skip_nonfinite
        )
        if self.repeats is not None and self.policy.needs_running:
            normalizer = recomputation.recall(self.repeats, batch, self.owner)
        elif self.may_repeat and self.running_mean is not None:
            recomputation.remember(self.running_mean, batch, normalizer)
        if after is not None and after is not running:
            self._write(after)
        if self.replicas is not None:
            return self.replicas.own(batch), self.replicas.own(normalizer)
        return batch, normalizer

    def _refuse_one_value(self, batch: Moments, policy: Policy) -> None:
        """Where only the data tell, if reading them is cheap."""
        if batch.count.__class__ is not Tensor:  # a number, or a fake
            return
        if compat.is_traced() or compat.dispatch_modes():  # which record what reads a value
            return
        if batch.count.device.type == "cpu" and bool((batch.count == 1).any()):
            checks.one_value(self.x, policy, self.owner)

    def _running(self, policy: Policy) -> RunningStatistics | None:
        """The statistics now, in the type they are computed in; None where nothing is tracked."""
        mean, var = self.running_mean, self.running_var
        batches: Any = self.num_batches_tracked
        if mean is None or var is None:
            return None
        dtype = statistics_dtype(self.x)
        if torch.compiler.is_compiling() and not compat.is_exporting():
            mean, var, *rest = recomputation.snapshot(
                [mean, var] if batches is None else [mean, var, batches], policy.needs_running
            )
            batches = rest[0] if rest else None
        elif (
            batches is not None
            and batches.is_cpu
            and not (compat.is_traced() or compat.dispatch_modes())
        ):
            batches = int(batches)  # plain numbers are cheaper than scalar tensors
        if isinstance(batches, Tensor) and dtype == torch.float64:
            batches = batches.double()  # weights such as 1/(t + 1) would else be float32
        running = RunningStatistics(mean.to(dtype), var.to(dtype), batches)
        if policy.counts_batches and (isinstance(batches, Tensor) or batches == 0):
            seen = batches_seen(running, xp=torch)
            running = running._replace(batches=seen if isinstance(batches, Tensor) else int(seen))
        return running

    def _write(self, after: RunningStatistics) -> None:
        buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
        if compat.is_transforming():
            _WriteThroughTransforms.apply(*buffers, *after)  # type: ignore[no-untyped-call]
            return
        # Exported, a mode makes a subgraph of its own, which torch.export.save cannot write.
        with nullcontext() if compat.is_exporting() else torch.no_grad():
            _copy(buffers, after)


def _copy(buffers: tuple[Tensor | None, ...], values: tuple[Any, ...]) -> None:
    mean, var = buffers[:2]
    if mean is not None and var is not None and not (mean.is_cpu or compat.is_traced()):
        torch._foreach_copy_([mean, var], list(values[:2]))  # one launch
        buffers, values = buffers[2:], values[2:]
    for buffer, value in zip(buffers, values, strict=True):
        if isinstance(buffer, Tensor) and value is not None:
            if isinstance(value, Tensor):
                buffer.copy_(value)
            else:
                buffer.fill_(value)


class _WriteThroughTransforms(torch.autograd.Function):
    """Writes buffers below torch.func's transforms, which refuse to change what they captured."""

    @staticmethod
    def forward(*buffers_and_values: Tensor | None) -> Tensor:
        buffers, values = buffers_and_values[:3], buffers_and_values[3:]
        with torch.no_grad():
            _copy(buffers, values)
        return values[0].new_zeros(())  # type: ignore[union-attr]

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
        buffers, values = tensors[:3], list(tensors[3:])
        for i, (buffer, buffer_dim, value, dim) in enumerate(
            zip(buffers, in_dims[:3], values, in_dims[3:], strict=True)
        ):
            if buffer is None or value is None:
                continue
            if buffer_dim is None and dim is not None:
                raise RuntimeError(
                    "batch normalization under torch.func.vmap: every example is a batch of its "
                    "own, and they cannot all move the same running statistics. Give each its own, "
                    "by torch.func.stack_module_state and functional_call with in_dims=0; or call "
                    "eval(), or make the layer with track_running_stats=False or "
                    "statistics=sn.Frozen()."
                )
            if buffer_dim is not None:
                stacked = value.unsqueeze(0) if dim is None else value.movedim(dim, 0)
                first = buffer.movedim(buffer_dim, 0)
                values[i] = stacked.expand_as(first).movedim(0, buffer_dim)
        done: Tensor = _WriteThroughTransforms.apply(  # type: ignore[no-untyped-call]
            *buffers, *values
        )
        return done, None
