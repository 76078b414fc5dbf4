"""Every fault by its right name, first; and nothing to complain of in healthy networks.

`python benchmarks/doctor_gallery.py` does the same for all of the healthy ones.
"""

from __future__ import annotations

import pytest
import torch
from tests.doctor.gallery.all_patients import PATIENTS
from tests.doctor.gallery.healthy import HEALTHY, QUICK
from tests.doctor.gallery.networks import accuracy, trained
from tests.doctor.gallery.page import PAGE

from steadynorm.doctor import Severity
from steadynorm.doctor.rules import all_rules


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("fault", PATIENTS)
def test_the_right_code_comes_first(fault: str) -> None:
    patient = PATIENTS[fault]
    report = patient.build().diagnose()
    assert [finding.code for finding in report.findings][:1] == [patient.code], str(report)


def test_there_are_thirty_faults_and_every_rule_has_one() -> None:
    assert len(PATIENTS) >= 30
    codes = {patient.code for patient in PATIENTS.values()}
    # SN301 is what the others lead to: alone it would be a fault without a cause.
    assert codes == {rule.code for rule in all_rules()} - {"SN301"}


@pytest.mark.parametrize("kind", ["fully connected", "convolutional"])
def test_faults_are_planted_in_good_networks(kind: str) -> None:
    assert accuracy(trained(kind)) > 0.97


@pytest.mark.parametrize("name", QUICK)
def test_healthy_networks_get_no_error_and_no_warning(name: str) -> None:
    report = HEALTHY[name]().diagnose()
    assert [f for f in report.findings if f.severity > Severity.INFO] == [], str(report)


def test_the_command_looks_at_twenty_real_networks() -> None:
    real = [name for name in HEALTHY if name.startswith(("transformers", "MONAI"))]
    assert len(real) >= 20


def test_the_page_shows_them_all_named_first() -> None:
    """Made by `python benchmarks/doctor_gallery.py --write`."""
    page = PAGE.read_text(encoding="utf-8")
    for fault, patient in PATIENTS.items():
        assert f"| {fault} | {patient.code} " in page
    for name in HEALTHY:
        assert f"| {name} |" in page
    assert f"{len(PATIENTS)} of {len(PATIENTS)} faults are named first." in page
    assert f"{len(HEALTHY)} of {len(HEALTHY)} healthy networks get no error" in page
