"""The report as SARIF 2.1.0 (OASIS, 2020), which code-review tools read."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from steadynorm import __version__
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.report.groups import Reported, printable, printable_lines
from steadynorm.doctor.report.json import to_record
from steadynorm.doctor.rules import Rule, find_rule
from steadynorm.files import json_text

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}


def to_sarif(report: Reported) -> str:
    """The report as SARIF text. Every rule asked is described, every finding is a result with the
    layer as its logical location. The cure is text: SARIF's own fixes replace parts of files, which
    a cure of a network is not.
    """
    return json_text(_log(report))


def _log(report: Reported) -> dict[str, Any]:
    codes = sorted({*report.codes, *(finding.code for finding in report.findings)})
    location = _physical_location(report.evidence.target)
    driver = {
        "name": "steadynorm doctor",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_rule(find_rule(code)) for code in codes],
    }
    results = [
        _result(finding, codes.index(finding.code), location, record)
        for finding, record in zip(report.findings, to_record(report)["findings"], strict=True)
    ]
    run = {
        "tool": {"driver": driver},
        "invocations": [{"executionSuccessful": True}],
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    code = f"\n\n```python\n{rule.line}\n```" if rule.line else ""
    return {
        "id": rule.code,
        "name": rule.name,
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.why},
        "help": {
            "text": "\n\n".join(
                part
                for part in (rule.why, rule.threshold, f"Cure: {rule.cure}", rule.line, rule.source)
                if part
            ),
            "markdown": f"{rule.why}\n\n**Cure.** {rule.cure}{code}\n\n**When it speaks.** "
            f"{rule.threshold}\n\nSource: {rule.source}",
        },
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {"tags": ["batch normalization", rule.needs], "safe": rule.safe},
    }


def _result(
    finding: Finding, index: int, location: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any]:
    cure = "\n".join(part for part in (finding.cure, finding.line) if part)
    where = printable(finding.layer) or "the model"
    message = f"{where}: {finding.message}" + (f"\nCure: {cure}" if cure else "")
    logical = {
        "name": finding.layer.rpartition(".")[2] or "model",
        "fullyQualifiedName": finding.layer or "model",
        "kind": "member" if finding.layer else "module",
    }
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "kind": "fail",
        "level": LEVELS[finding.severity],
        "message": {"text": _literal(message)},
        "locations": [{**location, "logicalLocations": [logical]}],
        # Messages hold figures, which change from run to run; code and layer stay.
        "partialFingerprints": {"codeAndLayer/v1": f"{finding.code}:{finding.layer}"},
        "properties": {
            name: record[name] for name in ("evidence", "cure", "line", "safe", "because")
        },
    }


def _literal(text: str) -> str:
    """A message that holds neither a link nor a placeholder, which SARIF would read from a name."""
    text = re.sub(r"\[(?=[^\]]*\]\()", r"\\[", printable_lines(text))
    return re.sub(r"\{(\d+)\}", r"{{\1}}", text)


def _physical_location(target: str) -> dict[str, Any]:
    """Where review tools hang a result: the checkpoint, or the line that builds the model. Nothing
    where neither is known.
    """
    path: Path | None = Path(target)
    region: dict[str, Any] = {}
    module, colon, factory = target.partition(":")
    if colon and module in sys.modules:
        source = getattr(sys.modules[module], "__file__", None)
        path = Path(source) if source else None
        try:
            _, line = inspect.getsourcelines(getattr(sys.modules[module], factory))
            region = {"region": {"startLine": max(line, 1)}}
        except (AttributeError, OSError, TypeError):
            pass  # made elsewhere, or by a program
    try:
        if path is None or not path.is_file():
            return {}
    except (OSError, ValueError):  # too long for a path, or with a zero in it
        return {}
    whole = path.resolve()
    here = Path.cwd()
    inside = whole.is_relative_to(here)
    uri = quote(whole.relative_to(here).as_posix()) if inside else whole.as_uri()
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, **region}}
