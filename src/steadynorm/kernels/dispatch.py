"""Which backend serves a call, and why: the backends in order of preference, each asked in turn."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels import autograd
from steadynorm.kernels.aten import ATEN
from steadynorm.kernels.autograd import TRACED
from steadynorm.kernels.cpu.backend import CPU
from steadynorm.kernels.gpu.backend import GPU
from steadynorm.kernels.reference.closed_form import REFERENCE
from steadynorm.kernels.reference.torch_arrays import reference
from steadynorm.kernels.spec import Backend, Call
from steadynorm.statistics import Frozen, Policy, PolicyName, Steady, policy_from

BACKENDS: tuple[Backend, ...] = (TRACED, GPU, ATEN, CPU, REFERENCE)
"""In order of preference; the last takes every call."""


class Choice(NamedTuple):
    """The backend that serves (`traced`, `gpu`, `aten`, `cpu`, `reference`), and why no other."""

    kernel: str
    refusals: dict[str, str]

    @property
    def why(self) -> str:
        """Why none that is preferred serves the call."""
        return "; ".join(f"not {name}: {why}" for name, why in self.refusals.items())


def choose(call: Call) -> Backend:
    """The first backend that supports the call; the last supports all."""
    for backend in BACKENDS:
        if backend.on and backend.supports(call) is None:
            break
    return backend


def normalize(call: Call) -> Tensor:
    """`activation(γ·x̂ + β + residual)`, by the statistics that the call decides on."""
    backend = choose(call)
    if backend.differentiable:
        return backend.forward(call)[0]
    x, weight, bias, residual = call.x, call.weight, call.bias, call.residual
    # Written out: a generator costs 0.5 µs.
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        call.gradient = True
        y: Tensor = autograd.normalize(x, weight, bias, residual, call, backend)
        return y
    return backend.forward(call)[0]


def explain(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: Policy | PolicyName = "batch",
    activation: str | None = None,
    numerics: str = "device",
) -> Choice:
    """Which backend a layer with these arguments runs, and why: the dispatcher's own answer.

    >>> import torch
    >>> explain(torch.randn(2, 16, 4, 4)).kernel
    'aten'
    >>> explain(torch.randn(32, 64, 28, 28)).kernel
    'cpu'
    """
    policy = policy_from(statistics)
    tensors = (x, weight, bias, residual, mask, running_mean, running_var)
    by_running = not training or isinstance(policy, Frozen)
    settings: Any = {"activation": activation, "momentum": 0.1, "exact": numerics == "exact"}
    call = Call(*tensors, policy=None if by_running else policy, **settings)
    chosen = choose(call)
    preferred = BACKENDS[: BACKENDS.index(chosen)]
    return Choice(chosen.name, {b.name: b.supports(call) or "" for b in preferred})


def stages_for(x: Tensor) -> Any:
    """The module whose four stages serve this input: compiled ones, or the reference."""
    by_stages = Call(x, policy=Steady(), skip_nonfinite=True)  # no plan serves it
    return reference if CPU.supports(by_stages) else CPU.stages
