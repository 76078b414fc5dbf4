"""Running statistics from data, with the weights held still: calibrate and adapt."""

from steadynorm.calibration.calibrate import adapt, calibrate
from steadynorm.calibration.report import CalibrationReport, LayerReport

__all__ = ["CalibrationReport", "LayerReport", "adapt", "calibrate"]
