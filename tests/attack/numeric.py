"""Random layers on random data against an 80-bit reference, in every type and layout."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import steadynorm as sn

TITLE = "numerics: random layers against 80-bit arithmetic"

TYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
MOST, USUALLY = 64, 3
"""Of float32's outputs none is off by more roundings, and 99 in 100 by this at most, where a
rounding is the type's machine epsilon times (1 + max|z|)."""
EPS = 1e-5
HUGE = 1e17  # the standard deviation up to which float32 sums of squares do not overflow


class Case(NamedTuple):
    """One layer and its input."""

    x: torch.Tensor
    grad: torch.Tensor
    training: bool
    momentum: float | None

    @property
    def title(self) -> str:
        """Enough to find it again, with the seed."""
        mode = "training" if self.training else "inference"
        kind = str(self.x.dtype).removeprefix("torch.")
        return f"{kind} {tuple(self.x.shape)} strides {self.x.stride()} {mode}"


def draw(rng: random.Random, dtype: torch.dtype) -> Case:
    """Any shape from one value to 100,000, any layout, means up to 10⁶ standard deviations."""
    seed = torch.Generator().manual_seed(rng.randrange(1 << 62))
    axes = rng.choice([0, 0, 1, 2, 2, 3])
    samples = rng.choice([2, 3, 7, 16, 33, 64, 256])
    channels = rng.choice([1, 2, 5, 16, 31, 64])
    space = [rng.choice([1, 2, 3, 7, 14, 28]) for _ in range(axes)]
    while samples * channels * math.prod(space) > 100_000:
        samples = max(2, samples // 2)
        space = [max(1, side // 2) for side in space]
    shape = (samples, channels, *space)
    values = torch.randn(shape, generator=seed, dtype=torch.float64)
    std = 10.0 ** rng.uniform(-2, 3)
    mean = 0.0 if rng.random() < 0.3 else std * 10.0 ** rng.uniform(-2, 6)
    if dtype == torch.float16:
        std, mean = min(std, 100.0), min(mean, 3e4)
    match rng.choice(["normal", "normal", "constant", "outlier", "two values"]):
        case "constant":
            values.zero_()
        case "outlier":
            values.view(-1)[rng.randrange(values.numel())] *= 30 if dtype == torch.float16 else 1e3
        case "two values":
            values.sign_()
    x = (values * std + mean).to(dtype)
    grad = torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype)
    layout = rng.choice(["contiguous", "channels last", "transposed", "sliced"])
    return Case(
        laid_out(x, layout), laid_out(grad, rng.choice(["contiguous", layout])),
        rng.random() < 0.7, rng.choice([0.1, None, 1.0]),
    )  # fmt: skip


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, otherwise in memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x


class Truth(NamedTuple):
    """What a layer should give, channels last, and what it follows from."""

    y: Any
    dx: Any
    mean: Any
    rho: Any
    g: Any
    axes: tuple[int, ...]


def truth(case: Case, running_mean: torch.Tensor, running_var: torch.Tensor) -> Truth:
    """In 80 bits, from the very numbers that the layer is given."""
    x, g = (wide(t.movedim(1, -1)) for t in (case.x, case.grad))
    axes = tuple(range(x.ndim - 1))
    mean, var = wide(running_mean), wide(running_var)
    if case.training:
        mean = x.mean(axes)
        var = ((x - mean) ** 2).mean(axes)
    rho = 1 / np.sqrt(var + np.longdouble(EPS))
    z = (x - mean) * rho
    through = g.mean(axes) + z * (g * z).mean(axes) if case.training else 0
    return Truth(z, rho * (g - through), mean, rho, g, axes)


def wide(t: torch.Tensor) -> Any:
    """As an array of 80-bit numbers."""
    return t.detach().double().numpy().astype(np.longdouble)


def layer(kind: Any, case: Case) -> tuple[Any, ...]:
    """A layer with statistics near the data's, its output, and the input's gradient."""
    made = kind(case.x.shape[1], EPS, case.momentum)
    if case.x.dtype == torch.float64:
        made.double()
    with torch.no_grad():
        rows = case.x.double().transpose(0, 1).flatten(1)
        made.running_mean.copy_(rows.mean(1) + 0.1 * rows.std(1, unbiased=False))
        made.running_var.copy_(rows.var(1, unbiased=False) * 1.5 + 1e-3)
    before = made.running_mean.clone(), made.running_var.clone()
    made.train(case.training)
    x = case.x.detach().requires_grad_()
    y = made(x)
    y.backward(case.grad)
    return made, y.detach(), x.grad, *before


def worst(found: torch.Tensor, right: Any) -> float:
    """The largest distance; infinity if anything is not finite."""
    there = wide(found.movedim(1, -1) if found.ndim > 1 else found)
    distance = float(np.abs(there - right).max())
    return distance if math.isfinite(distance) else math.inf


def axes_of(case: Case) -> int:
    return {2: 1, 3: 1, 4: 2, 5: 3}[case.x.ndim]


def check(case: Case, seen: list[float]) -> None:
    """Output, gradients and statistics of one layer."""
    n, dtype = axes_of(case), case.x.dtype
    made, y, dx, *before = layer(getattr(sn, f"BatchNorm{n}d"), case)
    _, torchs_y, torchs_dx, *_ = layer(getattr(torch.nn, f"BatchNorm{n}d"), case)
    right = truth(case, *before)
    eps = torch.finfo(dtype).eps
    assert y.dtype == dx.dtype == dtype

    size = 1 + float(np.abs(right.y).max())
    error = worst(y, right.y) / (eps * size)
    steep = float(right.rho.max() * np.abs(right.g).max()) * size**2
    slope_error = worst(dx, right.dx) / (eps * steep)
    if dtype == torch.float32:
        seen.append(error)
    # In half precision one rounding is free; float64 has no wider type to sum in, as torch has not.
    free = 0.5 if dtype.itemsize == 2 else MOST
    allowed = max(free, 1.001 * worst(torchs_y, right.y) / (eps * size))
    if dtype == torch.float32:
        allowed = MOST
    assert error <= allowed, f"off by {error:.3g} roundings"
    allowed = max(free, 1.001 * worst(torchs_dx, right.dx) / (eps * steep))
    assert slope_error <= allowed, f"input gradient off by {slope_error:.3g} roundings"

    own = torch.finfo(made.bias.dtype).eps
    lost = worst(made.bias.grad, right.g.sum(right.axes))
    assert lost <= MOST * own * float(np.abs(right.g).sum(right.axes).max()), (
        f"bias gradient off by {lost:.3g}"
    )
    if case.training and case.momentum in (None, 1.0):
        kept = worst(made.running_mean, right.mean)
        largest = float(np.abs(case.x.double().numpy()).max())
        assert kept <= 16 * own * largest, f"running mean off by {kept:.3g}"


def usually(seen: list[float]) -> None:
    """99 in 100 cases are within a few roundings."""
    at = sorted(seen)[math.ceil(0.99 * len(seen)) - 1]
    assert at <= USUALLY, f"the 99th percentile is {at:.3g} roundings"


def ghosts(rng: random.Random) -> None:
    """The cumulative average over ghosts is the mean of their means, in float64 too."""
    seed = torch.Generator().manual_seed(rng.randrange(1 << 62))
    size, steps = rng.choice([2, 8, 32]), rng.randrange(1, 12)
    made = sn.BatchNorm1d(3, momentum=None, statistics=sn.Ghost(size)).double()
    means = []
    for _ in range(steps):
        x = 100 + torch.randn(4 * size, 3, generator=seed, dtype=torch.float64)
        made(x)
        means.append(x.mean(0))
    error = float((made.running_mean - torch.stack(means).mean(0)).abs().max())
    assert error < 1e-12, f"running mean off by {error:.3g}"


def huge(rng: random.Random) -> None:
    """As long as the squares of 4,096 values can be summed in float32; then as torch at worst."""
    seed = torch.Generator().manual_seed(rng.randrange(1 << 62))
    shape = rng.choice([(64, 8), (4096, 8), (16, 8, 7, 7), (16, 8, 64, 64)])
    std = 10.0 ** rng.uniform(10, 19)
    x = torch.randn(shape, generator=seed) * std
    x = laid_out(x, rng.choice(["contiguous", "channels last"]))
    n = {2: 1, 4: 2}[len(shape)]
    values = wide(x.movedim(1, -1)).reshape(-1, 8)
    z = (values - values.mean(0)) / values.std(0)
    right = z.reshape(x.movedim(1, -1).shape)
    found = [worst(getattr(m, f"BatchNorm{n}d")(8)(x), right) for m in (sn, torch.nn)]
    bar = MOST * torch.finfo(x.dtype).eps * (1 + float(np.abs(z).max()))
    if std > HUGE:
        bar = max(bar, 1.001 * found[1])
    assert found[0] <= bar, f"{shape}, std {std:.3g}: off by {found[0]:.3g}, torch {found[1]:.3g}"


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """What holds for most cases is asked at the end."""
    seen: list[float] = []
    for _ in range(2500 if long else 120):
        for dtype in TYPES:
            case = draw(rng, dtype)
            yield case.title, partial(check, case, seen)
    for number in range(200 if long else 10):
        yield f"ghosts {number}", partial(ghosts, rng)
        yield f"huge values {number}", partial(huge, rng)
    yield "99 in 100 of float32", partial(usually, seen)
