"""The report as JSON; `schema.json` beside this file says what it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from typing import Any

import numpy as np

from steadynorm import __version__
from steadynorm.doctor.finding import Severity
from steadynorm.doctor.report.groups import Reported
from steadynorm.files import json_text

VERSION = 1
"""Raised when a reader of the old format would misread the new one; new names do not raise it."""


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a report."""
    text = resources.files(__package__).joinpath("schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def to_json(report: Reported) -> str:
    """The report as JSON text."""
    return json_text(to_record(report))


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
        "findings": [_plain(finding) for finding in report.findings],
        "rules": list(report.codes),
        "skipped": list(report.skipped),
        "remarks": list(evidence.remarks),
        "model": _plain(evidence.model),
        "data": _plain(evidence.data, arrays=True),  # one number a batch
        "layers": _plain(evidence.layers),
        "run": _plain(evidence.run),
    }


def _plain(value: Any, *, arrays: bool = False) -> Any:
    """Numbers, words, lists and dicts; a number that is not finite becomes "nan", "inf", "-inf".

    Arrays of layers, one number a channel, are left out: they are the checkpoint's to hold.
    """
    if is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in fields(value) if arrays or "ndarray" not in str(f.type)]
        return {name: _plain(getattr(value, name), arrays=arrays) for name in names}
    if isinstance(value, Severity):
        return str(value)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(part, arrays=arrays) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, arrays=arrays) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
