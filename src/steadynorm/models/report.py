"""What a calibration found: one record per layer, printed as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from steadynorm.files import json_text
from steadynorm.models.changes import aligned
from steadynorm.models.layers import NormLayer
from steadynorm.models.replicas import LayerMoments
from steadynorm.statistics import RunningStatistics


@dataclass(frozen=True)
class LayerReport:
    """One batch norm: what was measured, and how far its running statistics were off.

    `status`: "calibrated", "adapted", or "left" with the `reason`.
    `values`: values per channel that were measured, over all calls and replicas.
    `mean_shift`: root mean square over channels of (running mean before - measured mean), in
    measured standard deviations, √(var + eps); `mean_shift_max`: the largest over channels.
    `std_ratio`: running standard deviation before over the measured one, geometric mean over
    channels. Both say what the layer's output was off by; 0 and 1 are right. They are NaN where the
    running statistics were not finite, and None for a layer that was left.
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    values: int = 0
    mean_shift: float | None = None
    mean_shift_max: float | None = None
    std_ratio: float | None = None

    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        if self.status == "left":
            return (self.name, self.kind, f"left: {self.reason}", "", "", "", "")
        off = (f"{value:.3f}" for value in (self.mean_shift, self.mean_shift_max, self.std_ratio))
        return (self.name, self.kind, self.status, f"{self.values:,}", *off)


HEADINGS = ("layer", "kind", "status", "values", "mean off, std", "largest", "std before/after")


@dataclass(frozen=True)
class CalibrationReport:
    """The layers in the order of the model, over how many batches, and in how many passes.

    `prior`: what `adapt` weighed the statistics from before with; None for `calibrate`.

    >>> print(CalibrationReport((), 0, 0, None))
    nothing to calibrate: the model has no batch norms
    """

    layers: tuple[LayerReport, ...]
    batches: int
    passes: int
    prior: float | None

    @property
    def moved(self) -> tuple[LayerReport, ...]:
        """The layers whose running statistics were replaced."""
        return tuple(layer for layer in self.layers if layer.status != "left")

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """The layers left as they were, each with its reason."""
        return tuple(layer for layer in self.layers if layer.status == "left")

    def __str__(self) -> str:
        if not self.layers:
            return "nothing to calibrate: the model has no batch norms"
        rows = [HEADINGS, *(layer.cells() for layer in self.layers)]
        return aligned(rows, HEADINGS.index("values"))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists; NaN and infinity become None."""
        record = asdict(self)
        record["layers"] = [
            {key: None if _not_finite(value) else value for key, value in layer.items()}
            for layer in record["layers"]
        ]
        return record

    def to_json(self) -> str:
        """The same as JSON."""
        return json_text(self.to_dict())


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def left(layer: NormLayer, reason: str) -> LayerReport:
    """The record of a layer left as it was."""
    return LayerReport(layer.name, type(layer.module).__name__, "left", reason)


def moved(
    layer: NormLayer,
    status: str,
    before: RunningStatistics,
    measured: LayerMoments,
    now: RunningStatistics,
) -> LayerReport:
    """The record of a layer whose statistics were `before` and, from the data alone, are `now`."""
    eps = float(vars(layer.module)["eps"])
    tiny = torch.finfo(torch.float64).tiny
    unit = (now.var + eps).clamp(min=tiny).sqrt()
    shift = (before.mean - now.mean) / unit
    ratio = (before.var + eps).clamp(min=tiny).sqrt() / unit
    return LayerReport(
        layer.name,
        type(layer.module).__name__,
        status,
        values=int(measured.moments.count),
        mean_shift=float(shift.square().mean().sqrt()),
        mean_shift_max=float(shift.abs().max()),
        std_ratio=float(ratio.log().mean().exp()),
    )
