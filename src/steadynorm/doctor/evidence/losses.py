"""What one way of normalizing loses against another, over the same batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from steadynorm.doctor.evidence.records import ModelData

SMALLEST = 0.02  # of a loss: less is of no use, however sure


class LossChange(NamedTuple):
    """Mean loss `before` and `after`, and the standard error of their paired difference."""

    before: float
    after: float
    error: float

    @property
    def relative(self) -> float:
        """What is gained, of what is left; a loss near 0 counts as `SMALLEST`."""
        return (self.before - self.after) / max(abs(self.after), SMALLEST)

    def clear(self, times: float) -> bool:
        """Whether it is a gain worth having, and so many standard errors."""
        gained = self.before - self.after
        return gained > SMALLEST and gained > times * self.error


def loss_change(before: np.ndarray, after: np.ndarray) -> LossChange | None:
    """Of two losses per batch; None where either is not finite. A single batch has no error.

    >>> loss_change(np.array([1.0, 2.0]), np.array([0.5, 1.0]))
    LossChange(before=1.5, after=0.75, error=0.25)
    """
    if not before.size or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return None
    difference = before - after
    error = float(np.std(difference, ddof=1) / np.sqrt(len(difference))) if before.size > 1 else 0.0
    return LossChange(float(before.mean()), float(after.mean()), error)


def loss_raised_by_calibration(data: ModelData | None) -> LossChange | None:
    """What the loss would rise by (`before`: calibrated, `after`: as it is), None where it would
    not: the weights were then trained with the statistics that are there.
    """
    loss = None if data is None else data.loss
    worse = None if loss is None else loss_change(loss.calibrated, loss.inference)
    return worse if worse is not None and worse.clear(2) else None


def instead_of_calibration(data: ModelData | None) -> dict[str, Any]:
    """Cure, line of code and safety where calibration would raise the loss; empty where it would
    not.
    """
    worse = loss_raised_by_calibration(data)
    if worse is None:
        return {}
    cure = (
        f"Do not calibrate: the loss would rise from {worse.after:.3g} to {worse.before:.3g}. The "
        "weights fit the statistics that they have."
    )
    return {"cure": cure, "line": "", "safe": False}
