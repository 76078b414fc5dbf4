"""Batch normalization of sequences: statistics for each time step, one weight and bias for all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from steadynorm.kernels import compat, dispatch
from steadynorm.kernels.activations import ActivationName
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import Call
from steadynorm.nn import checks, recomputation
from steadynorm.nn.batchnorm import BatchNorm1d
from steadynorm.nn.functional import normalize
from steadynorm.nn.hooks import hooked
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
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Normalize (N, C) by this step's statistics, or in inference by those given."""
        mean, var = (self.running_mean, self.running_var) if statistics is None else statistics
        memory = self._buffers.get("gradient_memory") if self.training else None
        return normalize(
            input, mean, var, weight, bias, self.training,
            self.num_batches_tracked, activation, residual, mask, memory, self._settings,
            type(self).__name__,
        )  # fmt: skip


class Served(NamedTuple):
    """The layer that a time step calls, and the statistics for it; None: the layer's own."""

    layer: TimeStep
    statistics: tuple[Tensor, Tensor] | None = None


class StepNorm(_NormBase):
    """Batch normalization with statistics, and memories, for each of `max_length` time steps.

    Steps from `max_length` on use the last one's. In inference steps that no batch has reached use
    those of the last step that was reached. The statistics themselves tell which those are, so
    that whatever copies, averages or broadcasts them takes along how far training came.
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

    def reset_parameters(self) -> None:
        """γ to `gain`, β to 0."""
        torch.nn.init.constant_(self.weight, self.gain)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Earlier versions saved, as extra state, how many steps training had reached."""
        state.pop(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def policy(self) -> Policy:
        """That of every time step."""
        return self._time_steps()[0].statistics

    def _time_steps(self) -> list[TimeStep]:
        """All time steps, if no tool has put other layers in their place."""
        steps: list[Any] = list(self.steps)
        first = steps[0]
        if not isinstance(first, TimeStep):
            raise TypeError(
                f"BatchNormLSTM: its time steps must be TimeStep layers; got "
                f"{type(first).__name__}, as torch.nn.SyncBatchNorm.convert_sync_batchnorm makes. "
                f"Use sn.convert(model, synchronize=True), which leaves the LSTM as it is."
            )
        return steps

    def serving(self, start: int, length: int) -> list[Served]:
        """What serves each of the `length` time steps from `start` on.

        Where training moves nothing, steps not reached yet need the last one that was. On CPU that
        is looked up; elsewhere to look would wait for the device, and in a graph it would be fixed
        for ever, so there the statistics are selected by a tensor.
        """
        last = len(self.steps) - 1
        times = [min(time, last) for time in range(start, start + length)]
        layers = self._time_steps()
        called = [layers[time] for time in times]
        furthest: Any = layers[max(times, default=last)]
        if learns(called) or (_can_be_read(furthest) and int(furthest.num_batches_tracked)):
            return [Served(layer) for layer in called]
        running = _stacked(layers)
        touched = batches_seen(running, xp=torch, rows=True).flatten() != 0
        if _can_be_read(furthest):
            reached = touched.nonzero().flatten().tolist()
            last = reached[-1] if reached else last
            return [Served(layers[min(time, last)]) for time in times]
        reach = (touched * torch.arange(1, last + 2, device=touched.device)).amax()
        reach = torch.where(reach == 0, last, reach - 1)
        rows = torch.arange(start, start + length, device=touched.device).minimum(reach)
        selected = (running.mean[rows].unbind(), running.var[rows].unbind())
        found = zip(times, *selected, strict=True)
        return [Served(layers[time], (mean, var)) for time, mean, var in found]

    def smallest_group(self, samples: int) -> int:
        """How many of `samples` are measured together at the least."""
        policy = self.policy
        return min(policy.lengths(samples), default=0) if isinstance(policy, Ghost) else samples

    def forward(
        self,
        input: Tensor,
        time: int,
        bias: Tensor | None = None,
        *,
        served: Served | None = None,
        **extras: Any,
    ) -> Tensor:
        """Normalize (N, C), the values of time step `time`; `bias` stands in for the own one.

        `served` is what `serving` gave for it, if it was asked for the whole sequence. `extras` are
        `activation`, `residual` and `mask`, as of the layers.
        """
        layer, statistics = self.serving(time, 1)[0] if served is None else served
        bias = self.bias if bias is None else bias
        y: Tensor = layer(input, self.weight, bias, statistics=statistics, **extras)
        return y

    def sequence(self, input: Tensor, sizes: tuple[int, ...], start: int = 0) -> tuple[Tensor, ...]:
        """Normalize (sum of sizes, C), packed: time step `start` + t has `sizes[t]` samples.

        All steps in one call of the kernels where nothing asks for one call a step.
        """
        served = self.serving(start, len(sizes))
        if not self._can_join(input, [one.layer for one in served]):
            parts = enumerate(zip(input.split(sizes), served, strict=True), start)
            return tuple(self(part, time, served=one) for time, (part, one) in parts)
        training = learns([served[0].layer])  # the others' modes are the same
        self._check(input, served, sizes, training)
        y = dispatch.normalize(_AllSteps(served, sizes, input, self.weight, self.bias, training))
        return tuple(y.split(sizes))

    def _check(
        self, input: Tensor, served: list[Served], sizes: tuple[int, ...], training: bool
    ) -> None:
        """Refuse what one call a step would refuse, before anything changes."""
        first: Any = served[0].layer
        owner = type(first).__name__
        checks.epsilon(first.eps, owner, positive=training)
        for one in served:
            mean, var = one.statistics or (one.layer.running_mean, one.layer.running_var)
            checks.tensors(input, mean, var, self.weight, self.bias, owner)
        if training and min(sizes) == 1:
            checks.one_value(input[:1], first.statistics, owner)

    def _can_join(self, input: Tensor, layers: list[Any]) -> bool:
        """Whether one call serves all steps: none is met twice, hooked, or set apart."""
        few = input.numel() == 0 or len(layers) < 2
        if few or compat.is_traced() or compat.has_global_hooks():
            return False
        if learns(layers) and (
            len(set(layers)) < len(layers)
            or recomputation.is_recomputation()
            or recomputation.may_be_recomputed()
        ):
            return False
        if isinstance(layers[0].statistics, Ghost):
            return False
        alike = _settings(layers[0])
        return all(not hooked(layer) and _settings(layer) == alike for layer in layers)

    def extra_repr(self) -> str:
        """Sizes and settings; the steps repeat them."""
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.num_features}, max_length={len(self.steps)}, gain={self.gain}{bias}"


def learns(steps: Iterable[Any]) -> bool:
    """Whether a forward of these time steps moves statistics: by their own modes, as any layer's.

    Fine-tuning often puts every batch norm alone into inference, and knows nothing of `StepNorm`.
    """
    return any(step.training and not isinstance(step.statistics, Frozen) for step in steps)


def _can_be_read(step: Any) -> bool:
    """Whether the value of a step's statistics is at hand: no graph, no device to wait for."""
    count = step.num_batches_tracked
    return type(count) is Tensor and count.device.type == "cpu" and not compat.is_traced()


def _stacked(steps: list[Any]) -> RunningStatistics:
    """The running statistics of all steps, one row for each."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    mean, var, batches = (torch.stack([getattr(step, name) for step in steps]) for name in names)
    return RunningStatistics(mean, var, batches.unsqueeze(1))


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
        served: list[Served],
        sizes: tuple[int, ...],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
    ) -> None:
        steps: list[Any] = [one.layer for one in served]
        policy = steps[0].statistics if training else None
        remembers = policy is not None and policy.gradient_rate(1) is not None
        memory = _MemoryOfSteps(steps) if remembers else None
        super().__init__(
            x, weight, bias, policy=policy, eps=steps[0].eps, groups=sizes, memory=memory
        )
        self.steps = steps
        self.given = [one.statistics for one in served]

    def decide(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """One row of statistics for each step; training moves them."""
        first = self.steps[0]
        if batch is None:
            given = [one for one in self.given if one is not None]
            if not given:
                return None, of_running(_stacked(self.steps)._replace(batches=None))
            mean, var = (torch.stack(rows) for rows in zip(*given, strict=True))
            return None, of_running(RunningStatistics(mean, var, None))
        running = _stacked(self.steps)
        wide, device = batch.mean.dtype, batch.mean.device
        running = RunningStatistics(*(torch.as_tensor(t, device=device).to(wide) for t in running))
        samples = torch.tensor(self.groups, dtype=wide, device=device).unsqueeze(1)
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
        batches = torch.as_tensor(after.batches, device=after.mean.device).flatten()
        for name, rows in (
            ("running_mean", after.mean),
            ("running_var", after.var),
            ("num_batches_tracked", batches),
        ):
            kept = [getattr(step, name) for step in self.steps]
            torch._foreach_copy_(kept, list(rows.unbind()))
