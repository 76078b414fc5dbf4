"""All the faults of the blind gallery: importing this fills `FAULTS`."""

from tests.doctor.gallery import blind_data, blind_model, blind_runs, blind_state
from tests.doctor.gallery.blind import FAULTS

__all__ = ["FAULTS", "blind_data", "blind_model", "blind_runs", "blind_state"]
