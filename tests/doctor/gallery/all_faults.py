"""All the faults of the blind gallery: importing this fills `FAULTS`."""

from tests.doctor.gallery import blind_faults, blind_runs
from tests.doctor.gallery.blind import FAULTS

__all__ = ["FAULTS", "blind_faults", "blind_runs"]
