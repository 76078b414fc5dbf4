"""Moments in float64 on the CPU, as NumPy reads them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from steadynorm.kernels.dispatch import stages_for
from steadynorm.statistics import Moments, merge


def wide_moments(x: Tensor, mask: Tensor | None, groups: tuple[int, ...] | None = None) -> Moments:
    """Moments in float64 on the CPU, a row for each group or one for all; empty rows left out."""
    count, *parts = stages_for(x).moments(x, mask=mask, groups=groups)
    counts = torch.as_tensor(count).to("cpu", torch.float64).reshape(-1, 1)
    nonempty = (counts > 0).flatten()
    mean, var, low = (p.to("cpu", torch.float64).reshape(-1, x.shape[1])[nonempty] for p in parts)
    return Moments(counts[nonempty], mean + low, var, torch.zeros_like(mean))


def joined(a: Moments | None, b: Moments) -> Moments:
    """Both together; None is nothing."""
    return b if a is None else merge(a, b)


def mean_and_var(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Of all values; the variance is biased."""
    return np.asarray((moments.mean + moments.mean_low).numpy()), np.asarray(moments.var.numpy())
