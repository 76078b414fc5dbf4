"""Batch normalization of sequences: statistics for each time step, one weight and bias for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from steadynorm.kernels import compat, dispatch
from steadynorm.kernels.activations import ActivationName
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import Call
from steadynorm.nn import recomputation
from steadynorm.nn.batchnorm import BatchNorm1d
from steadynorm.nn.functional import normalize
from steadynorm.statistics import (
    Context,
    Frozen,
    Ghost,
    Moments,
    Normalizer,
    Policy,
    PolicyName,
    RunningStatistics,
    batches_seen,
    of_running,
    step,
)


class TimeStep(BatchNorm1d):
    """One time step's statistics; weight and bias come with the call, since all steps share them.

    A `BatchNorm1d` like any other to whatever looks for layers: calibration, freezing, policies.
    """

    def forward(
        self,
        input: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        activation: ActivationName | None = None,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalize (N, C) by this step's statistics."""
        memory = self._buffers.get("gradient_memory") if self.training else None
        return normalize(
            input, self.running_mean, self.running_var, weight, bias, self.training,
            self.num_batches_tracked, activation, residual, mask, memory, self._settings,
            type(self).__name__,
        )  # fmt: skip


class StepNorm(_NormBase):
    """Batch normalization with statistics, and memories, for each of `max_length` time steps.

    Steps from `max_length` on use the last one's. In inference so do steps that no training batch
    has reached: they use those of the last step that was reached.
    """

    def __init__(
        self,
        num_features: int,
        max_length: int,
        gain: float,
        *,
        bias: bool,
        eps: float,
        momentum: float | None,
        statistics: Policy | PolicyName,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.gain = gain
        super().__init__(
            num_features, eps, momentum, True, track_running_stats=False, device=device, dtype=dtype
        )
        if not bias:
            self.register_parameter("bias", None)
        made = {"affine": False, "device": device, "dtype": dtype, "statistics": statistics}
        self.steps = torch.nn.ModuleList(
            TimeStep(num_features, eps, momentum, **made) for _ in range(max_length)
        )
        self.reached = 0  # how many steps, from the first on, training batches have reached

    def reset_parameters(self) -> None:
        """γ to `gain`, β to 0."""
        torch.nn.init.constant_(self.weight, self.gain)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def get_extra_state(self) -> Tensor:
        """How many steps training has reached."""
        return torch.tensor(self.reached)

    def set_extra_state(self, state: Tensor) -> None:
        """As `get_extra_state` gave it."""
        self.reached = int(state)

    @property
    def learns(self) -> bool:
        """Whether a forward moves the statistics."""
        return self.training and not isinstance(self.steps[0].statistics, Frozen)

    def index(self, time: int) -> int:
        """Which step's statistics serve time step `time`."""
        last = len(self.steps) if self.learns or not self.reached else self.reached
        return min(time, last - 1)

    def smallest_group(self, samples: int) -> int:
        """How many of `samples` are measured together at the least."""
        policy = self.steps[0].statistics
        return min(policy.lengths(samples), default=0) if isinstance(policy, Ghost) else samples

    def forward(
        self, input: Tensor, time: int, bias: Tensor | None = None, **extras: Any
    ) -> Tensor:
        """Normalize (N, C), the values of time step `time`; `bias` stands in for the own one.

        `extras` are `activation`, `residual` and `mask`, as of the layers.
        """
        index = self.index(time)
        if self.learns:
            self.reached = max(self.reached, index + 1)
        bias = self.bias if bias is None else bias
        y: Tensor = self.steps[index](input, self.weight, bias, **extras)
        return y

    def sequence(self, input: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Normalize the packed (sum of sizes, C) of which time step t has `sizes[t]` samples.

        All steps in one call of the kernels where nothing asks for one call a step.
        """
        if not self._can_join(input, len(sizes)):
            parts = input.split(sizes)
            return tuple(self(part, time) for time, part in enumerate(parts))
        steps = [self.steps[self.index(time)] for time in range(len(sizes))]
        if self.learns:
            self.reached = max(self.reached, len(sizes))
        y = dispatch.normalize(_AllSteps(steps, sizes, input, self.weight, self.bias, self.learns))
        return tuple(y.split(sizes))

    def _can_join(self, input: Tensor, length: int) -> bool:
        """Whether one call serves all steps: none is met twice, hooked, or set apart."""
        if compat.is_traced() or input.numel() == 0 or length < 2:
            return False
        if self.learns and (
            length > len(self.steps)
            or recomputation.is_recomputation()
            or recomputation.may_be_recomputed()
        ):
            return False
        first: Any = self.steps[0]
        if isinstance(first.statistics, Ghost):
            return False
        alike = _settings(first)
        return all(
            not step._forward_pre_hooks and not step._forward_hooks and _settings(step) == alike
            for step in self.steps[:length]
        )

    def extra_repr(self) -> str:
        """Sizes and settings; the steps repeat them."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.num_features}, max_length={len(self.steps)}, gain={self.gain}{bias}"


def _settings(step: Any) -> tuple[Any, ...]:
    if step.synchronize is not False or step.nonfinite != "propagate":
        return (step,)  # equal to no other step
    return step.statistics, step.training, step.momentum, step.eps, step.numerics


class _MemoryOfSteps(Memory):
    """The memories of all time steps, (2, T, C)."""

    def __init__(self, steps: list[Any]) -> None:
        self.states = [step.gradient_memory for step in steps]
        super().__init__(self.states[0])

    def read(self) -> Tensor:
        return torch.stack(self.states, 1)

    def write(self, after: Tensor) -> None:
        torch._foreach_copy_(self.states, list(after.unbind(1)))


class _AllSteps(Call):
    """Every time step is a group of samples with running statistics of its own."""

    def __init__(
        self,
        steps: list[Any],
        sizes: tuple[int, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
    ) -> None:
        policy = steps[0].statistics if training else None
        remembers = policy is not None and policy.gradient_rate(1) is not None
        memory = _MemoryOfSteps(steps) if remembers else None
        super().__init__(
            x, weight, bias, policy=policy, eps=steps[0].eps, groups=sizes, memory=memory
        )
        self.steps = steps

    def decide(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """One row of statistics for each step; training moves them."""
        first = self.steps[0]
        mean, var = (
            torch.stack([getattr(step, name) for step in self.steps])
            for name in ("running_mean", "running_var")
        )
        if batch is None:
            return None, of_running(RunningStatistics(mean, var, None))
        wide = batch.mean.dtype
        seen = torch.stack([step.num_batches_tracked for step in self.steps]).unsqueeze(1)
        samples = torch.tensor(self.groups, dtype=wide, device=mean.device).unsqueeze(1)
        running = RunningStatistics(mean.to(wide), var.to(wide), seen.to(wide))
        if first.statistics.counts_batches:
            running = running._replace(batches=batches_seen(running, xp=torch, rows=True))
        context = Context(samples, first.momentum, first.eps, torch)
        if self.memory is not None:
            self.memory.rate = first.statistics.gradient_rate(samples)
        batch = batch._replace(count=samples)
        normalizer, after = step(first.statistics, batch, running, context)
        if after is not None:
            self._write(after)
        return batch, normalizer

    @torch.no_grad()
    def _write(self, after: RunningStatistics) -> None:
        batches = torch.as_tensor(after.batches).flatten()
        for name, rows in (
            ("running_mean", after.mean),
            ("running_var", after.var),
            ("num_batches_tracked", batches),
        ):
            kept = [getattr(step, name) for step in self.steps]
            torch._foreach_copy_(kept, list(rows.unbind()))
