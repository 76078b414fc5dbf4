"""The doctor: finds what is wrong with a network's batch norms, and says what to do."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steadynorm.doctor.diagnosis import Report, diagnose
from steadynorm.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from steadynorm.doctor.monitoring import Monitor, monitor

__all__ = ["Finding", "Monitor", "Report", "Severity", "diagnose", "monitor"]


def __getattr__(name: str) -> Any:  # so that the command line starts without torch
    if name not in ("Monitor", "monitor"):
        raise AttributeError(f"module 'steadynorm.doctor' has no attribute {name!r}")
    return getattr(import_module("steadynorm.doctor.monitoring"), name)
