"""The blind gallery in short: a few draws, and that its counts are right.

`python benchmarks/blind_gallery.py --write` makes the whole of it.
"""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest
from tests.doctor.gallery.all_faults import FAULTS
from tests.doctor.gallery.blind import KINDS
from tests.doctor.gallery.blind_page import Found, curves, table
from tests.doctor.gallery.blind_trial import healthy_trial, trial
from tests.doctor.gallery.page import DOCS

from steadynorm.doctor.rules import all_rules

QUICK = [name for name, f in FAULTS.items() if f.code in ("SN101", "SN103", "SN107", "SN111")]


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_named_first_and_its_cure_does_no_harm(name: str) -> None:
    found = trial(name, 1)
    assert found["cost"] > 0.02
    assert found["codes"][0] == found["code"]
    assert found.get("gain", 0.0) >= 0


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_healthy_network_of_each_kind_is_not_blamed(number: int) -> None:
    assert healthy_trial(number) == []


def test_faults_belong_to_rules() -> None:
    assert {fault.code for fault in FAULTS.values()} < {rule.code for rule in all_rules()}
    assert len(FAULTS) >= 25


def made(code: str, cost: float, codes: list[str], **more: Any) -> dict[str, Any]:
    return {"fault": f"of {code}", "code": code, "unit": "size", "kind": "", "amount": cost,
            "cost": cost, "cost_error": 0.15, "number": 0, "codes": codes, **more}  # fmt: skip


def test_the_counts_are_right() -> None:
    found = Found(
        [
            made("SN101", 0.3, ["SN101", "SN302"], gain=0.2, error=0.1, own_cure=True),
            made("SN101", 0.2, ["SN302", "SN101"], gain=-0.2, error=0.1, own_cure=True),
            made("SN302", 0.01, [], gain=-0.05, error=0.1),
            made("SN302", 0.02, []),
        ],
        [[], ["SN306"], []],
    )
    text = table(found)
    assert "2 points: 1 of 3 named first, 2 of 3 named at all." in text
    assert "Of these, faults that cost more than their interval too: 1 of 2 named first." in text
    assert "SN101 as SN302 (1), SN302 as nothing (1)" in text
    assert "warning or an error: 1 of 3 (SN306)" in text
    assert "rises in 1 of 2; in all draws, whatever it changes, it falls by more than" in text
    assert "its interval in 1." in text
    assert "| of SN101 | SN101 | size | 1 of 2 | 1 of 2 | 1 of 2 |" in text
    picture = ET.fromstring(curves(found))
    circles = [e for e in picture.iter() if e.tag.endswith("circle")]
    assert [c.get("fill") for c in circles] == ["#00796b", "#00796b", "white", "#00796b"]


def test_the_page_holds_every_fault() -> None:
    page = (DOCS / "blind_gallery.md").read_text(encoding="utf-8")
    assert [name for name in FAULTS if f"| {name} |" not in page] == []
