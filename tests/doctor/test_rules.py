"""Every rule on its bad and its good fixture."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

from steadynorm.doctor.rules import all_rules

CODES = [rule.code for rule in all_rules()]


@pytest.fixture
def fixtures(code: str) -> Iterator[ModuleType]:
    module = import_module(f"tests.doctor.fixtures.{code.lower()}")
    yield module
    getattr(module, "close", lambda: None)()


@pytest.mark.parametrize("code", CODES)
def test_bad(code: str, fixtures: ModuleType) -> None:
    made, expected = fixtures.bad(), fixtures.EXPECTED
    found = [finding for finding in made.diagnose().findings if finding.code == code]
    assert [f.layer for f in found] == [expected.layer]
    assert found[0].message == expected.message
    assert found[0].evidence.keys() == expected.evidence.keys()
    for name, value in expected.evidence.items():
        close = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
        assert found[0].evidence[name] == close, name
    assert found[0].severity == expected.severity
    assert found[0].cure


@pytest.mark.parametrize("code", CODES)
def test_good(code: str, fixtures: ModuleType) -> None:
    report = fixtures.good().diagnose()
    assert [finding for finding in report.findings if finding.code == code] == []
