"""SARIF 2.1.0: the parts of OASIS's schema that concern what is written, and what tools rely on."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from types import ModuleType

import jsonschema
import pytest
from tests.doctor.report import made

from steadynorm.doctor.report.sarif import to_sarif
from steadynorm.doctor.rules import find_rule


def closed(required, **properties):
    """As the schema has it: nothing but these properties."""
    return {
        "type": "object", "additionalProperties": False, "required": list(required),
        "properties": properties,
    }  # fmt: skip


TEXT = {"type": "string"}
LEVEL = {"enum": ["none", "note", "warning", "error"]}
BAG = {"type": "object"}
MESSAGE = closed(["text"], text=TEXT, markdown=TEXT)
RULE = closed(
    ["id"], id=TEXT, name=TEXT, shortDescription=MESSAGE, fullDescription=MESSAGE, help=MESSAGE,
    defaultConfiguration=closed([], level=LEVEL), properties=BAG,
)  # fmt: skip
LOCATION = closed(
    [],
    physicalLocation=closed(
        ["artifactLocation"],
        artifactLocation=closed([], uri={"type": "string", "format": "uri-reference"}),
        region=closed([], startLine={"type": "integer", "minimum": 1}),
    ),
    logicalLocations={
        "type": "array", "uniqueItems": True,
        "items": closed([], name=TEXT, fullyQualifiedName=TEXT, kind=TEXT),
    },
)  # fmt: skip
RESULT = closed(
    ["message"], ruleId=TEXT, ruleIndex={"type": "integer", "minimum": 0},
    kind={"enum": ["notApplicable", "pass", "fail", "review", "open", "informational"]},
    level=LEVEL, message=MESSAGE, locations={"type": "array", "items": LOCATION},
    partialFingerprints={"type": "object", "additionalProperties": TEXT}, properties=BAG,
)  # fmt: skip
DRIVER = closed(
    ["name"], name=TEXT, version=TEXT, semanticVersion=TEXT,
    rules={"type": "array", "uniqueItems": True, "items": RULE},
)  # fmt: skip
RUN = closed(
    ["tool"], tool=closed(["driver"], driver=DRIVER),
    invocations={
        "type": "array",
        "items": closed(["executionSuccessful"], executionSuccessful={"type": "boolean"}),
    },
    columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
    results={"type": "array", "items": RESULT},
)  # fmt: skip
LOG = closed(
    ["version", "runs"], **{"$schema": TEXT}, version={"const": "2.1.0"},
    runs={"type": "array", "items": RUN},
)  # fmt: skip


def complaints(log):
    return [error.message for error in jsonschema.Draft7Validator(LOG).iter_errors(log)]


@pytest.mark.parametrize("make", [made.report, made.sound, made.weights_alone, made.watched])
def test_obeys_the_schema(make):
    assert complaints(json.loads(to_sarif(make()))) == []


def test_the_schema_refuses_a_fix_of_words():
    log = json.loads(to_sarif(made.report()))
    spoilt = copy.deepcopy(log)
    spoilt["runs"][0]["results"][0]["fixes"] = [{"description": {"text": "do it"}}]
    assert complaints(spoilt) != []


@pytest.fixture
def run():
    (found,) = json.loads(to_sarif(made.report()))["runs"]
    return found


def test_every_result_points_to_its_rule(run):
    rules = run["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == ["SN101", "SN102", "SN301"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
    rule = find_rule("SN101")
    assert rules[0]["shortDescription"]["text"] == rule.summary
    assert rule.line in rules[0]["help"]["markdown"]


def test_results_say_what_where_how_bad_and_what_to_do(run):
    first, _, whole, odd = run["results"]
    assert first["level"] == "error"
    assert first["message"]["text"] == (
        f"{made.SCRIPT}: what SN101 says of it, with 1.5\n"
        f"Cure: {find_rule('SN101').cure}\ncure('SN101')"
    )
    assert first["locations"] == [
        {
            "logicalLocations": [
                {"name": made.SCRIPT, "fullyQualifiedName": made.SCRIPT, "kind": "member"}
            ]
        }
    ]
    assert first["properties"]["evidence"] == {"of_it": 1.5}
    assert whole["locations"][0]["logicalLocations"][0]["kind"] == "module"
    assert whole["properties"]["because"] == ["SN101"]
    assert [result["level"] for result in run["results"]] == ["error", "error", "warning", "note"]
    assert odd["properties"]["evidence"]["largest"] == "inf"


def test_fingerprints_hold_over_runs_and_tell_layers_affected(run):
    prints = [r["partialFingerprints"]["codeAndLayer/v1"] for r in run["results"]]
    assert len(set(prints)) == len(prints)
    found = made.report()
    other = replace(found.findings[0], message="another number, 2.5")
    again = json.loads(to_sarif(replace(found, findings=(other,))))["runs"][0]["results"][0]
    assert again["partialFingerprints"] == run["results"][0]["partialFingerprints"]


def aimed(target):
    found = made.report()
    evidence = replace(found.evidence, target=str(target))
    log = json.loads(to_sarif(replace(found, evidence=evidence)))
    assert complaints(log) == []
    return log["runs"][0]["results"][0]["locations"][0].get("physicalLocation")


def test_a_checkpoint_is_where_it_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "old weights.pt"
    path.write_bytes(b"")
    assert aimed(path) == {"artifactLocation": {"uri": "old%20weights.pt"}}
    monkeypatch.chdir("/")
    assert aimed("no/such.pt") is None
    assert aimed("x" * 10_000) is None


def test_a_factory_is_where_it_points(tmp_path, monkeypatch):
    path = tmp_path / "shop_models.py"
    path.write_text("# one line\n\ndef resnet():\n    return None\n")
    module = ModuleType("shop_models")
    module.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "shop_models", module)
    monkeypatch.chdir(tmp_path)
    assert aimed("shop_models:resnet") == {
        "artifactLocation": {"uri": "shop_models.py"}, "region": {"startLine": 3}
    }  # fmt: skip
    assert aimed("shop_models:nobody") == {"artifactLocation": {"uri": "shop_models.py"}}
