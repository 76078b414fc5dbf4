"""The JSON against its schema, and against an account of its own of what must be there."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest
from tests.doctor.report import made

from steadynorm.doctor.report.json import schema, to_json, to_record

REPORTS = {
    "found": made.report, "sound": made.sound, "weights": made.weights_alone,
    "empty": made.empty, "watched": made.watched,
}  # fmt: skip


def complaints(record):
    return [
        error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(record)
    ]


@pytest.mark.parametrize("name", REPORTS)
def test_obeys_its_schema(name):
    assert complaints(json.loads(to_json(REPORTS[name]()))) == []


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(schema())


def set_severity(record):
    record["findings"][0]["severity"] = "fatal"


def drop_layer(record):
    del record["findings"][0]["layer"]


def add_name(record):
    record["more"] = 1


def nan_word(record):
    record["findings"][0]["evidence"]["of_it"] = None


@pytest.mark.parametrize("spoil", [set_severity, drop_layer, add_name, nan_word])
def test_the_schema_refuses(spoil):
    record = to_record(made.report())
    assert complaints(record) == []
    spoilt = copy.deepcopy(record)
    spoil(spoilt)
    assert complaints(spoilt) != []


def test_findings_are_all_there():
    record = json.loads(to_json(made.report()))
    first, _, third, odd = record["findings"]
    assert first["layer"] == made.SCRIPT
    assert first["evidence"] == {"of_it": 1.5}
    assert first["line"] == "cure('SN101')"
    assert third["because"] == ["SN101"]
    assert odd["evidence"] == {"largest": "inf", "none": "nan", "type": "float16"}
    assert odd["message"] == "[red]not[/red] \x1b[31mfinite"
    assert record["summary"] == {"error": 2, "warning": 1, "info": 1}
    assert record["rules"] == ["SN101", "SN102", "SN301"]
    assert record["skipped"] == ["SN401", "SN402"]


def test_layers_without_their_arrays_and_batches_with_theirs():
    record = to_record(made.report())
    assert [layer["name"] for layer in record["layers"]] == list(made.NAMES)
    assert "running_mean" not in record["layers"][0]["state"]
    assert "mean" not in record["layers"][0]["data"]
    assert record["layers"][0]["state"]["dtypes"] == {"running_mean": "float32"}
    assert record["data"]["loss"]["inference"] == [2.0, 2.0, 2.0]


def test_a_run_with_what_is_not_finite():
    run = to_record(made.watched())["run"]
    assert (run["steps"], run["every"]) == (40, 4)
    bad = next(r for r in run["readings"] if r["nonfinite"])
    assert (bad["step"], bad["layer"], bad["shift"]) == (20, "layer2", "nan")


def test_strict_readers_can_read_it():
    def refuse(word):
        raise ValueError(word)

    json.loads(to_json(made.watched()), parse_constant=refuse)
