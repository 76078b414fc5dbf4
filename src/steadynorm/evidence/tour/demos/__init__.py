"""The demonstrations of the tour, in order."""

from steadynorm.evidence.tour.demo import Demo
from steadynorm.evidence.tour.demos import (
    calibration,
    doctor,
    drop_in,
    folding,
    small_batches,
    speed,
)

DEMOS: tuple[Demo, ...] = (
    drop_in.DEMO,
    small_batches.DEMO,
    doctor.DEMO,
    calibration.DEMO,
    folding.DEMO,
    speed.DEMO,
)
