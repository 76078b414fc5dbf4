"""The doctor: finds what is wrong with a network's batch norms, and says what to do."""

from steadynorm.doctor.diagnosis import Report, diagnose
from steadynorm.doctor.finding import Finding, Severity

__all__ = ["Finding", "Report", "Severity", "diagnose"]
