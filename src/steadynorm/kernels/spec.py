"""What a call asks, what a backend is, and, in this one place, what a backward must keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.reference import Groups
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.reference.torch_arrays import valid_samples, xp
from steadynorm.statistics import (
    Batch,
    Coefficients,
    Moments,
    Normalizer,
    Policy,
    RunningStatistics,
    Steady,
    batches_seen,
    coefficients,
    of_running,
)

HALF = (torch.float16, torch.bfloat16)


class Keep(Enum):
    """What a backward takes the activation's derivative from."""

    NOTHING = "no activation"
    OUTPUT = "the output"
    REBUILT = "z, rebuilt from x, and from the residual where there is one"
    SIGNS = "one bit for each output"

    @classmethod
    def needed(
        cls, activation: str | None, *, residual: bool, compiled: bool, signs: bool = True
    ) -> Keep:
        """What the backward needs besides x and per-channel statistics.

        `compiled`: by kernels that rebuild z on the way, for which a comparison costs nothing and
        reading the output 2 of 7 tensors' traffic. `signs`: whether these may leave sign bits.
        """
        if activation is None:
            return cls.NOTHING
        row = ACTIVATIONS[activation]
        if row.source == "input":
            return cls.REBUILT
        if compiled and residual and signs and row.gate is not None:
            return cls.SIGNS
        return cls.REBUILT if compiled and not residual and row.source == "either" else cls.OUTPUT


statistics_dtype = xp.statistics_dtype


def coefficients_of(
    normalizer: Normalizer, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Coefficients:
    """`statistics.coefficients`, with parameters in the type that statistics of x have."""
    dtype = statistics_dtype(x)
    weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    return coefficients(normalizer, weight, bias, eps)


class Exchange(Protocol):
    """What one forward and its backward exchange with other replicas."""

    @property
    def name(self) -> str:
        """The group's, by which compiled code finds it."""

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of the backward reduction, added over replicas."""

    def link(self, live: Moments) -> Moments:
        """Differentiable moments of this process as differentiable pooled ones."""


@dataclass(eq=False, slots=True)
class Call:
    """One call of the layer: its tensors, its settings, and who decides what normalizes.

    Of a `basic` call a backend may do all in one piece: policy `Batch` in training, without mask,
    groups, replicas or another rule for the running averages than torch's; or inference, where
    there is no policy, without mask. Of any other it measures, lets the call `decide`, and maps.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    policy: Policy | None = None
    activation: str | None = None
    momentum: float | None = None
    eps: float = 1e-5
    groups: Groups = None
    replicas: Exchange | None = None
    skip_nonfinite: bool = False
    memory: Memory | None = None
    exact: bool = False  # no operator of an accelerator's own may serve the call
    gradient: bool = field(default=False, init=False)
    """Whether a backward may follow; the dispatcher says so."""
    plan: Any = field(default=None, init=False)
    """What the backend that supports the call has prepared for it."""
    by_running: bool = field(init=False)
    basic: bool = field(init=False)
    blends: bool = field(init=False)
    """As `basic`, for policy `Steady`: a backend may blend the statistics by `weights`."""

    def __post_init__(self) -> None:
        policy = self.policy.__class__
        self.by_running = self.policy is None  # the running statistics normalize
        alone = self.mask is None and self.replicas is None and not self.skip_nonfinite
        batch = policy is Batch and alone and self.momentum is not None
        self.basic = self.groups is None and (batch or (self.by_running and self.mask is None))
        self.blends = policy is Steady and alone and self.groups is None

    def weights(self, count: int) -> tuple[float, float]:
        """Of a call that `blends`, by its `count` of values per channel: k and a of `Steady`."""
        policy, samples, batches = self.policy, self.x.shape[0], self.num_batches_tracked
        assert isinstance(policy, Steady)
        if self.memory is not None:
            self.memory.rate = policy.gradient_rate(samples)
        seen = None if batches is None else int(batches)
        if seen == 0:
            assert self.running_mean is not None
            assert self.running_var is not None
            running = RunningStatistics(self.running_mean, self.running_var, 0)
            seen = int(batches_seen(running, xp=torch))
            if batches is not None and seen:
                batches.fill_(seen)  # so that the next batch does not replace them either
        share: float = policy.share(count, samples, seen, xp=torch)
        weight: float = policy.weight(samples, seen, xp=torch)
        return share, weight

    def valid_samples(self) -> Any:
        """How many samples have a position that the mask leaves valid; all without a mask."""
        mask = self.mask
        if mask is None:
            return self.x.shape[0]
        return valid_samples(mask).to(statistics_dtype(self.x))

    def by_policy_alone(self) -> bool:
        """Whether a kernel may decide in its place, by policy, settings and buffers alone."""
        return False

    def decide(self, batch: Moments | None) -> tuple[Moments | None, Normalizer]:
        """Moments and normalizer to use; called once a forward, with what the batch measures.

        Replicas pool here and running statistics move here. In inference `batch` is None, and the
        statistics normalize as they are now, copied: the buffers may move before the backward.
        """
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = statistics_dtype(self.x)
        mean, var = (t.to(dtype, copy=True) for t in (self.running_mean, self.running_var))
        return None, of_running(RunningStatistics(mean, var, None))


class Saved(NamedTuple):
    """What a forward leaves for its backward: first seven tensors, which autograd saves.

    Of y, residual and signs there is only what `Keep` says. `batch` is None if no gradient reaches
    x through it. All that follows is per channel, or a setting.
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mask: Tensor | None
    y: Tensor | None
    signs: Tensor | None
    batch: Moments | None
    normalizer: Normalizer
    coefficients: Any  # `Coefficients`
    eps: float
    activation: str | None
    groups: Groups
    replicas: Exchange | None
    residual_dtype: torch.dtype | None
    memory: Memory | None = None
    strides: tuple[int, ...] | None = None
    """Of x when it was saved; what saved-tensor hooks give back may lie otherwise."""


Packed = tuple[tuple[Any, ...], Any]  # tensors for autograd to save, and the rest
Gradients = tuple[Tensor | None, ...]  # of x, weight, bias, residual; None where none is needed


class Backend:
    """One way to run a call. If `differentiable`, PyTorch differentiates the forward by itself."""

    name: str
    differentiable = True
    on = True
    """Whether it is asked at all."""

    def supports(self, call: Call) -> str | None:
        """None for yes, else why not."""
        return None

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y, and what the backward needs."""
        raise NotImplementedError

    def backward(self, saved: Packed, grad: Tensor, needs: Any) -> Gradients:
        """The gradients of x, weight, bias and residual that are needed."""
        raise NotImplementedError

    def unpack(self, saved: Packed) -> Saved:
        """What `forward` left, in full, for derivatives of the backward itself."""
        return Saved(*saved[0], *saved[1])
