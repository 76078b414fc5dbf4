"""The truth: what the documents define, in float64 NumPy, sharing no line with the package.

Of the package's policies only the settings are read (`prior`, `size`, ...), never a method.
Arrays are (N, C, *), masks (N, *), per-channel arrays (C,).
"""

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


class Moments(NamedTuple):
    count: int
    mean: Array
    var: Array  # biased


class Running(NamedTuple):
    mean: Array
    var: Array
    batches: int = 0


class Normal(NamedTuple):
    """`x̂ = (x - m)/√(u + ε)·r + d`, of which the share α of m and u came from the batch."""

    m: Array
    u: Array
    r: Array | float = 1.0
    d: Array | float = 0.0
    share: float = 0.0


class Result(NamedTuple):
    y: Array
    running: Running | None
    dx: Array | None = None
    dweight: Array | None = None
    dbias: Array | None = None
    dresidual: Array | None = None
    memory: Array | None = None


class Setting(NamedTuple):
    """What a layer is set to."""

    weight: Array | None = None
    bias: Array | None = None
    activation: str | None = None
    momentum: float | None = 0.1
    eps: float = 1e-5
    unbiased: bool = True  # of the running variance: torch's way; Keras and flax keep it biased


PLAIN = Setting()


def double(array: Any) -> Any:
    return None if array is None else np.asarray(array, dtype=np.float64)


def beside(values: Array | float, ndim: int) -> Array:
    """A per-channel array in the shape that broadcasts against (N, C, *)."""
    return np.reshape(values, (1, -1) + (1,) * (ndim - 2))


def moments(x: Array, mask: Array | None = None) -> Moments:
    rows = np.moveaxis(double(x), 1, 0).reshape(x.shape[1], -1)
    if mask is not None:
        rows = rows[:, mask.reshape(-1)]
    if rows.shape[1] == 0:
        return Moments(0, np.zeros(len(rows)), np.zeros(len(rows)))
    mean = rows.mean(1)
    return Moments(rows.shape[1], mean, np.square(rows - mean[:, None]).mean(1))


# Policies -------------------------------------------------------------------------------------


def renorm_bounds(policy: Any, batches: int) -> tuple[float, float]:
    """1 and 0 for `warmup` batches, then linearly to `r_max` and `d_max`."""
    since = max(0, batches - policy.warmup)
    risen_r = min(1.0, since / policy.r_ramp) if policy.r_ramp else float(since >= 0)
    risen_d = min(1.0, since / policy.d_ramp) if policy.d_ramp else float(since >= 0)
    return 1 + (policy.r_max - 1) * risen_r, policy.d_max * risen_d


def normal(
    policy: Any, batch: Moments, running: Running | None, samples: int, setting: Setting
) -> Normal:
    """What normalizes a training batch."""
    kind = type(policy).__name__
    if kind in {"Batch", "Ghost"}:
        return Normal(batch.mean, batch.var, share=1.0)
    assert running is not None
    if kind == "Frozen":
        return Normal(running.mean, running.var)
    if kind == "Steady":
        n = batch.count if policy.window is None else samples
        k = max(n / (n + policy.prior), 1 / (running.batches + 1))
        away = batch.mean - running.mean
        u = (1 - k) * running.var + k * batch.var + k * (1 - k) * away**2
        return Normal(running.mean + k * away, u, share=k)
    if kind == "Running":
        a = running_weight(running, setting)
        m = (1 - a) * running.mean + a * batch.mean
        return Normal(m, (1 - a) * running.var + a * batch.var, share=a)
    if kind == "Renorm":
        r_max, d_max = renorm_bounds(policy, running.batches)
        sigma = np.sqrt(running.var + setting.eps)
        r = np.clip(np.sqrt(batch.var + setting.eps) / sigma, 1 / r_max, r_max)
        d = np.clip((batch.mean - running.mean) / sigma, -d_max, d_max)
        return Normal(batch.mean, batch.var, r, d, share=1.0)
    raise NotImplementedError(kind)


def running_weight(running: Running, setting: Setting) -> float:
    """`Running`'s weight of the new batch."""
    first = 1 / (running.batches + 1)
    return first if setting.momentum is None else max(setting.momentum, first)


def updated(
    policy: Any, batch: Moments, running: Running, samples: int, setting: Setting
) -> Running:
    """Running statistics after a batch."""
    kind = type(policy).__name__
    t, n = running.batches, batch.count
    if kind == "Frozen" or n == 0:
        return running
    if kind == "Steady":
        a = max(samples / (samples + policy.horizon), 1 / (t + 1))
        away = batch.mean - running.mean
        var = (1 - a) * running.var + a * batch.var + a * (1 - a) * away**2
        return Running(running.mean + a * away, var, t + 1)
    if kind == "Running":
        a, kept = running_weight(running, setting), batch.var
    else:
        a = 1 / (t + 1) if setting.momentum is None else setting.momentum
        kept = batch.var * (n / (n - 1) if n > 1 and setting.unbiased else 1.0)
    return Running((1 - a) * running.mean + a * batch.mean, (1 - a) * running.var + a * kept, t + 1)


def ghost_lengths(samples: int, size: int) -> list[int]:
    """Groups of `size`; a last one smaller than 2 samples joins the one before it."""
    lengths = [min(size, samples - start) for start in range(0, samples, size)]
    if len(lengths) > 1 and lengths[-1] < min(2, size):
        last = lengths.pop()
        lengths[-1] += last
    return lengths


# Forward and backward -------------------------------------------------------------------------

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _normal_cdf(z: Array) -> Array:
    return 0.5 * (1 + _erf(z / math.sqrt(2)))


ACTIVATIONS = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    "silu": (
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) + z * _sigmoid(z) * (1 - _sigmoid(z)),
    ),
    "gelu": (
        lambda z: z * _normal_cdf(z),
        lambda z: _normal_cdf(z) + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    ),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + 0.5)),
    ),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(z)), lambda z: np.where(z > 0, 1, np.exp(z))),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "mish": (
        lambda z: z * np.tanh(np.logaddexp(0, z)),
        lambda z: (
            np.tanh(np.logaddexp(0, z)) + z * _sigmoid(z) * (1 - np.tanh(np.logaddexp(0, z)) ** 2)
        ),
    ),
}


def _both_ways(
    x: Array,
    batch: Moments,
    n: Normal,
    setting: Setting,
    mask: Array | None,
    residual: Array | None,
    grad: Array | None,
    memory: Array | None = None,
    rate: float = 0.0,
) -> Result:
    rho = beside(1 / np.sqrt(n.u + setting.eps), x.ndim)
    gamma = 1.0 if setting.weight is None else beside(double(setting.weight), x.ndim)
    beta = 0.0 if setting.bias is None else beside(double(setting.bias), x.ndim)
    r, d, m = (beside(v, x.ndim) for v in (n.r, n.d, n.m))
    hat = (x - m) * rho * r + d
    z = gamma * hat + beta + (0 if residual is None else residual)
    act, derivative = ACTIVATIONS[setting.activation]
    if grad is None:
        return Result(act(z), None)
    axes = (0, *range(2, x.ndim))
    g = grad * derivative(z)
    s1 = g.sum(axes, keepdims=True)
    s2 = (g * (x - m)).sum(axes, keepdims=True)
    through = n.share * (s1 + (x - beside(batch.mean, x.ndim)) * rho**2 * s2) / max(batch.count, 1)
    if mask is not None:
        through = np.where(np.expand_dims(mask, 1), through, 0)
    left = g - through
    if memory is not None:
        memory = remembered(memory, rate, left, hat, mask)
        part = beside(memory[0], x.ndim) + hat * beside(memory[1], x.ndim)
        left = left - (part if mask is None else np.where(np.expand_dims(mask, 1), part, 0))
    dx = gamma * r * rho * left
    dweight = (r * rho * s2 + d * s1).reshape(-1)
    return Result(act(z), None, dx, dweight, s1.reshape(-1), g, memory)


def remembered(memory: Array, rate: float, left: Array, hat: Array, mask: Array | None) -> Array:
    """Least squares of `left` on 1 and x̂: the batch's values weigh `rate`, the old memory the rest.

    Gradients count at all positions, x̂ and the number of values at the valid ones.
    """
    valid = np.ones_like(hat) if mask is None else np.expand_dims(mask, 1) * np.ones_like(hat)
    after = np.empty_like(memory)
    for c in range(hat.shape[1]):
        rows = np.stack([np.ones_like(hat[:, c]), hat[:, c]]).reshape(2, -1)
        n = valid[:, c].sum()
        if n == 0:
            after[:, c] = memory[:, c]
            continue
        matrix = (1 - rate) * np.eye(2) + rate * (rows * valid[:, c].reshape(-1)) @ rows.T / n
        right = (1 - rate) * memory[:, c] + rate * rows @ left[:, c].reshape(-1) / n
        after[:, c] = np.linalg.solve(matrix, right)
    return after


def train(
    x: Array,
    policy: Any,
    running: Running | None = None,
    setting: Setting = PLAIN,
    *,
    mask: Array | None = None,
    residual: Array | None = None,
    grad: Array | None = None,
    memory: Array | None = None,
) -> Result:
    """One training step of a layer: output, running statistics after it, gradients for `grad`.

    `memory`: what is remembered of the gradient, (2, C); None for no memory.
    """
    x, residual, grad = double(x), double(residual), double(grad)
    if running is not None:
        running = Running(double(running.mean), double(running.var), running.batches)
    samples = len(x)
    ghost = type(policy).__name__ == "Ghost"
    before, parts, start = running, [], 0
    for size in ghost_lengths(samples, policy.size) if ghost else [samples]:
        rows = slice(start, start + size)
        valid, extra, upper = (t if t is None else t[rows] for t in (mask, residual, grad))
        batch = moments(x[rows], valid)
        seen = samples  # with a mask, those with a valid position
        if valid is not None:
            seen = int(valid.reshape(len(valid), -1).any(1).sum())
        if batch.count == 0:
            assert before is not None
            chosen = Normal(before.mean, before.var)
        else:
            chosen = normal(policy, batch, before, seen, setting)
        rate = 0.0 if memory is None else seen / (seen + policy.window)
        given = (batch, chosen, setting, valid, extra, upper, memory, rate)
        parts.append(_both_ways(x[rows], *given))
        if running is not None:
            running = updated(policy, batch, running, seen, setting)
        start += size
    y = np.concatenate([part.y for part in parts])
    if grad is None:
        return Result(y, running)
    return Result(
        y,
        running,
        np.concatenate([part.dx for part in parts]),
        np.sum([part.dweight for part in parts], axis=0),
        np.sum([part.dbias for part in parts], axis=0),
        np.concatenate([part.dresidual for part in parts]),
        parts[-1].memory,
    )


def infer(
    x: Array,
    running: Running,
    setting: Setting = PLAIN,
    *,
    residual: Array | None = None,
    grad: Array | None = None,
) -> Result:
    """Inference: the running statistics normalize and stay."""
    x, residual, grad = double(x), double(residual), double(grad)
    chosen = Normal(double(running.mean), double(running.var))
    nothing = Moments(0, chosen.m * 0, chosen.u * 0)
    return _both_ways(x, nothing, chosen, setting, None, residual, grad)._replace(running=running)
