"""Whether a batch norm with its own forward computes what its parts say: it is tried."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.models.layers import Norm, exact
from steadynorm.models.untouched import set_training, untouched


def behaves(module: nn.Module, norm: Norm, *, training: bool = False) -> bool:
    """Whether a batch norm with its own forward computes what its parts say.

    In inference, or in training: then what it leaves in its running statistics counts too. It is
    called with random numbers, past its hooks, and left as it was.
    """
    if norm.running_mean is None:
        return False
    rank = {"1d": 2, "2d": 4, "3d": 5}.get("".join(re.findall(r"\dd", type(module).__name__)), 4)
    shape = (3, len(norm.running_mean), *(2 for _ in range(rank - 2)))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(norm.running_mean)
    with untouched(module), torch.no_grad():
        try:
            set_training(module, training)
            expected = _answers(module, norm, exact(x), training=training and not norm.frozen)
            got = [exact(module.forward(x.clone()))]
            if len(expected) > 1:
                got += [exact(getattr(module, name)) for name in ("running_mean", "running_var")]
        except Exception:  # noqa: BLE001  whatever a stranger raises, it is none of these
            return False
        eps = torch.finfo(x.dtype).eps  # before the statistics are put back
        return all(_close(a, b, eps) for a, b in zip(got, expected, strict=True))


def _answers(module: nn.Module, norm: Norm, x: Tensor, *, training: bool) -> list[Tensor]:
    """The output for x in float64, and in training the running statistics after it.

    Those only where `momentum` says what they are.
    """
    after: list[Tensor] = []
    if training:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        mean, var = x.mean(axes), x.var(axes, unbiased=False)
        momentum: Any = getattr(module, "momentum", None)
        if isinstance(momentum, float):
            kept = (exact(t) for t in (norm.running_mean, norm.running_var) if t is not None)
            batch = (mean, x.var(axes, unbiased=True))
            after = [old + momentum * (new - old) for old, new in zip(kept, batch, strict=True)]
        norm = norm._replace(running_mean=mean, running_var=var)
    scale, shift = (t.view(-1, *(1 for _ in range(x.ndim - 2))) for t in norm.in_inference())
    y = x * scale + shift
    if norm.activation is not None:
        y = copy.deepcopy(norm.activation).to("cpu", torch.float64)(y)
    return [y, *after]


def _close(got: Tensor, expected: Tensor, eps: float) -> bool:
    tolerance = 100 * eps * float(expected.abs().max().clamp(min=1))
    return got.shape == expected.shape and bool((got - expected).abs().max() <= tolerance)
