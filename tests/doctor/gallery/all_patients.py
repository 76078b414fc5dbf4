"""All the patients: importing this fills `PATIENTS`."""

from tests.doctor.gallery import broken_data, broken_model, broken_run, broken_state
from tests.doctor.gallery.patient import PATIENTS

__all__ = ["PATIENTS", "broken_data", "broken_model", "broken_run", "broken_state"]
