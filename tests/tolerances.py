"""How far from float64 a result may be, by type and direction, each with its reason."""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch

Direction = Literal["forward", "backward", "statistics"]


class Tolerance(NamedTuple):
    """Largest error allowed, relative to the largest expected magnitude or to 1."""

    limit: float
    reason: str


TABLE: dict[tuple[torch.dtype, Direction], Tolerance] = {
    (torch.float64, "forward"): Tolerance(1e-13, "a few hundred roundings of 1e-16"),
    (torch.float64, "backward"): Tolerance(1e-12, "sums of products; cancellation in g - mean(g)"),
    (torch.float64, "statistics"): Tolerance(1e-13, "as forward"),
    (torch.float32, "forward"): Tolerance(
        1e-6, "6e-8 a rounding, a few; the project's bar, 2e-6 absolute at std 1, is `within_bar`"
    ),
    (torch.float32, "backward"): Tolerance(
        2e-6, "two sums over the batch, each as exact as the forward; 3e-7 is what we see"
    ),
    (torch.float32, "statistics"): Tolerance(5e-7, "stored in float32: 6e-8 a rounding, a few"),
    (torch.bfloat16, "forward"): Tolerance(
        8e-3, "8 bits: 3.9e-3 a rounding; two, where the activation is an operator of its own"
    ),
    (torch.bfloat16, "backward"): Tolerance(
        1.2e-2, "as forward, and the output, rounded, stands for the activation's input"
    ),
    (torch.float16, "forward"): Tolerance(1e-3, "11 bits: 4.9e-4 a rounding, two as above"),
    (torch.float16, "backward"): Tolerance(2e-3, "as bfloat16's, with three bits more"),
}


BAR = 2e-6  # DESIGN.md section 4: forward, float32, standard deviation 1, any mean up to 1e6


def error(actual: Any, expected: Any) -> float:
    """Largest absolute error over the largest expected magnitude, or over 1 if that is less."""
    if isinstance(actual, torch.Tensor):
        actual = actual.detach().to("cpu", torch.float64).numpy()
    actual, expected = (np.asarray(t, dtype=np.float64) for t in (actual, expected))
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape} where {expected.shape} is right")
    if expected.size == 0:
        return 0.0
    if not np.isfinite(expected).all():
        raise AssertionError("the expected values are not finite")
    scale = max(1.0, float(np.abs(expected).max()))
    return float(np.abs(actual - expected).max()) / scale  # NaN stays NaN


def close(actual: torch.Tensor, expected: Any, direction: Direction, what: str = "") -> None:
    """Fail unless `actual` is within the table's tolerance for its type and this direction."""
    tolerance = TABLE[actual.dtype, direction]
    found = error(actual, expected)
    if not found <= tolerance.limit:
        limit, reason = tolerance
        raise AssertionError(f"{what or direction}: error {found:.3g} above {limit:.3g} ({reason})")


def within_bar(actual: torch.Tensor, expected: Any, what: str = "") -> None:
    """Fail unless a float32 output is within the project's bar of float64, absolutely."""
    assert actual.dtype is torch.float32
    scale = max(1.0, float(np.abs(expected).max()))
    found = error(actual, expected) * scale
    if not found <= BAR:
        raise AssertionError(f"{what}error {found:.3g} above the bar of {BAR:g}")
