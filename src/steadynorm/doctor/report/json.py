"""The report as JSON; `schema.json` beside this file says what it holds."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from importlib import resources
from typing import Any

import numpy as np

from steadynorm import __version__
from steadynorm.doctor.evidence import Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.report.groups import Reported

VERSION = 1
"""Raised when a reader of the old format would misread the new one; new names do not raise it."""


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    text = resources.files(__package__).joinpath("schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def to_json(report: Reported) -> str:
    """The report as JSON text, without NaN or infinity, which JSON does not have."""
    return json.dumps(to_record(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def to_record(report: Reported) -> dict[str, Any]:
    """The same as plain dicts and lists."""
    evidence = report.evidence
    return {
        "format": "steadynorm doctor",
        "version": VERSION,
        "steadynorm": __version__,
        "target": evidence.target,
        "summary": {
            str(severity): sum(finding.severity is severity for finding in report.findings)
            for severity in sorted(Severity, reverse=True)
        },
        "findings": [_finding(finding) for finding in report.findings],
        "rules": list(report.codes),
        "skipped": list(report.skipped),
        "remarks": list(evidence.remarks),
        "model": _plain(evidence.model),
        "data": _plain(evidence.data),
        "layers": [_layer(layer) for layer in evidence.layers],
        "run": _plain(evidence.run),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": str(finding.severity),
        "layer": finding.layer,
        "message": finding.message,
        "evidence": {name: _plain(value) for name, value in finding.evidence.items()},
        "cure": finding.cure,
        "line": finding.line,
        "safe": finding.safe,
        "because": list(finding.because),
    }


def _layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "state": _plain(layer.state),
        "place": _plain(layer.place),
        "data": _plain(layer.data),
    }


def _plain(value: Any) -> Any:
    """Numbers, words, lists and dicts; a number that is not finite becomes "nan", "inf", "-inf".

    Arrays, one number a channel, are left out: they are the checkpoint's to hold.
    """
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value)}
        return {k: _plain(v) for k, v in held.items() if not isinstance(v, np.ndarray)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not isinstance(v, np.ndarray)}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value if not isinstance(v, np.ndarray)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
