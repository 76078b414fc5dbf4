"""Running statistics from data, with the weights held still: calibrate and adapt."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steadynorm.models.calibration.functions import adapt, calibrate
    from steadynorm.models.calibration.report import CalibrationReport, LayerReport

__all__ = ["CalibrationReport", "LayerReport", "adapt", "calibrate"]

_HOME_OF = {
    "CalibrationReport": "report",
    "LayerReport": "report",
    "adapt": "functions",
    "calibrate": "functions",
}


def __getattr__(name: str) -> Any:  # so that the command line starts without torch
    if name not in _HOME_OF:
        raise AttributeError(f"module 'steadynorm.models.calibration' has no attribute {name!r}")
    return getattr(import_module(f"steadynorm.models.calibration.{_HOME_OF[name]}"), name)
