"""The order of a report: severity, causes before what follows from them, layers, codes."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from tests.doctor.fixtures.small import small

from steadynorm.doctor import Finding, Severity, diagnose
from steadynorm.doctor.diagnosis import judge, ordered
from steadynorm.doctor.evidence.model import probe_model
from steadynorm.doctor.evidence.records import Evidence, NormEvidence, NormState
from steadynorm.doctor.rules import all_rules, find_rule

INFO, WARNING, ERROR = Severity


def evidence(*names: str) -> Evidence:
    ones = np.ones(2)
    state = NormState(2, "torch", 1e-5, 0.1, ones, ones, ones, 2 * ones)
    return Evidence("test", tuple(NormEvidence(name, "BatchNorm1d", state) for name in names))


def found(code: str, severity: Severity, layer: str = "") -> Finding:
    return Finding(code, find_rule(code).name, severity, layer, "")


def order(*findings: Finding, names: tuple[str, ...] = ("b", "a")) -> list[tuple[str, str]]:
    """The order, checked to be the same however the findings come in."""
    orders = {
        tuple((f.code, f.layer) for f in ordered(given, evidence(*names)))
        for given in itertools.permutations(findings)
    }
    assert len(orders) == 1
    return list(orders.pop())


def test_severity_then_layers_then_codes() -> None:
    assert order(
        found("SN201", INFO, "b"),
        found("SN205", WARNING, "a"),
        found("SN203", WARNING, "b"),
        found("SN107", WARNING, "b"),
        found("SN103", ERROR, "a"),
    ) == [("SN103", "a"), ("SN107", "b"), ("SN203", "b"), ("SN205", "a"), ("SN201", "b")]


def test_a_cause_comes_before_what_follows_from_it() -> None:
    """Whatever their severities, and through what lies between."""
    findings = (
        found("SN301", ERROR),
        found("SN302", ERROR, "a"),
        found("SN107", WARNING, "a"),
        found("SN205", WARNING, "b"),
        found("SN103", ERROR, "a"),
    )
    assert "SN302" in find_rule("SN107").explains
    assert "SN301" in find_rule("SN302").explains
    assert order(*findings) == [
        ("SN205", "b"), ("SN103", "a"), ("SN107", "a"), ("SN302", "a"), ("SN301", ""),
    ]  # fmt: skip
    report = {f.code: f.because for f in ordered(findings, evidence("b", "a"))}
    assert report == {
        "SN301": ("SN103", "SN107", "SN205", "SN302"),
        "SN302": ("SN103", "SN107", "SN205"),
        "SN107": (), "SN205": (), "SN103": (),
    }  # fmt: skip


def test_causes_act_on_their_layer_and_those_behind() -> None:
    ahead = (found("SN101", ERROR, "a"), found("SN302", ERROR, "b"))
    assert all(not f.because for f in ordered(ahead, evidence("b", "a")))
    behind = ordered(ahead, evidence("a", "b"))
    assert [(f.code, f.because) for f in behind] == [("SN101", ()), ("SN302", ("SN101",))]


def test_information_explains_no_defect() -> None:
    findings = (found("SN107", INFO, "a"), found("SN302", WARNING, "a"), found("SN301", INFO))
    report = ordered(findings, evidence("a"))
    assert [(f.code, f.because) for f in report] == [
        ("SN302", ()), ("SN107", ()), ("SN301", ("SN107", "SN302")),
    ]  # fmt: skip


def test_a_thousand_layers_are_put_in_order_at_once() -> None:
    names = tuple(map(str, range(1000)))
    findings = [found(code, ERROR, name) for name in names for code in ("SN102", "SN105")]
    begin = time.process_time()
    assert len(ordered(findings, evidence(*names))) == 2000
    assert time.process_time() - begin < 2


def test_a_report_is_the_same_every_time() -> None:
    model = small().train()
    model[1].momentum = 0.99
    model[4].weight.data.zero_()
    first, second = diagnose(model), diagnose(model)
    assert [f.code for f in first.findings] == ["SN107", "SN105"]
    assert first.findings == second.findings
    assert first.worst == WARNING
    assert diagnose(small()).worst is None


def test_select_and_ignore() -> None:
    evidence = probe_model(small())
    by_state = tuple(rule.code for rule in all_rules() if rule.needs == "state")
    assert judge(evidence, select=["SN1"]).codes == by_state
    assert judge(evidence, select=["dead-scale", "sn103"]).codes == ("SN103", "SN105")
    assert judge(evidence, select=["SN1"], ignore=["SN1"]).codes == ()
    report = judge(evidence, ignore=["SN1", "SN2", "SN4"])
    assert report.codes == ()
    assert report.skipped == tuple(rule.code for rule in all_rules() if rule.needs == "data")
    with pytest.raises(ValueError, match="diagnose: `select` names no rule: 'SN9'"):
        judge(evidence, select=["SN9"])
    with pytest.raises(ValueError, match="diagnose: `ignore` names no rule: ''"):
        judge(evidence, ignore=[""])
    with pytest.raises(ValueError, match="no rule is called 'death-scale'"):
        judge(evidence, ignore=["death-scale"])
    with pytest.raises(TypeError, match="diagnose: `select` must be a list of codes; got 'SN1'"):
        judge(evidence, select="SN1")


def test_severities_compare_and_are_named() -> None:
    assert INFO < WARNING < ERROR
    assert [str(severity) for severity in Severity] == ["info", "warning", "error"]
    assert Severity.from_name("Error") is ERROR
    with pytest.raises(ValueError, match="severity must be one of info, warning, error; got 'bad'"):
        Severity.from_name("bad")
