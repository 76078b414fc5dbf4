"""Every rule on its bad and its good fixture."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest

from steadynorm.doctor.rules import all_rules

CODES = [rule.code for rule in all_rules()]


def fixtures(code: str) -> ModuleType:
    return import_module(f"tests.doctor.fixtures.{code.lower()}")


@pytest.mark.parametrize("code", CODES)
def test_bad(code: str) -> None:
    made, expected = fixtures(code).bad(), fixtures(code).EXPECTED
    found = [finding for finding in made.diagnose().findings if finding.code == code]
    assert [f.layer for f in found] == [expected.layer]
    assert found[0].message == expected.message
    assert found[0].evidence == pytest.approx(dict(expected.evidence), rel=1e-4)
    assert found[0].severity == expected.severity
    assert found[0].cure


@pytest.mark.parametrize("code", CODES)
def test_good(code: str) -> None:
    report = fixtures(code).good().diagnose()
    assert [finding for finding in report.findings if finding.code == code] == []
