"""Findings of one kind put together: a defect is told once, however many layers have it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from steadynorm.doctor.evidence.records import Evidence, NormEvidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules import find_rule


class Reported(Protocol):
    """What is rendered: a `Report`."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """In the order to be shown."""

    @property
    def evidence(self) -> Evidence:
        """What was judged."""

    @property
    def codes(self) -> tuple[str, ...]:
        """The rules that were asked."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """The rules that had nothing to judge by."""


@dataclass(frozen=True)
class Group:
    """Findings of one code and severity, in the order of the report; at least one."""

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """The one to be told in full."""
        return self.findings[0]

    @property
    def title(self) -> str:
        """The defect in words."""
        return self.first.name.replace("-", " ")

    @property
    def because(self) -> tuple[str, ...]:
        """Codes of the defects that explain any of them."""
        return tuple(sorted({code for finding in self.findings for code in finding.because}))

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers; none where the model as a whole is meant."""
        return tuple(finding.layer for finding in self.findings if finding.layer)


def grouped(findings: Iterable[Finding]) -> tuple[Group, ...]:
    """Groups in the order in which each is first met."""
    found: dict[tuple[str, Severity], list[Finding]] = {}
    for finding in findings:
        found.setdefault((finding.code, finding.severity), []).append(finding)
    return tuple(Group(tuple(same)) for same in found.values())


def tally(findings: Iterable[Finding]) -> dict[Severity, int]:
    """How many defects (not layers) there are of each severity, worst first."""
    groups = grouped(findings)
    counts = {s: sum(g.first.severity is s for g in groups) for s in sorted(Severity, reverse=True)}
    return {severity: count for severity, count in counts.items() if count}


NOUNS = {
    Severity.ERROR: ("error", "errors"),
    Severity.WARNING: ("warning", "warnings"),
    Severity.INFO: ("remark", "remarks"),
}


def plural(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun.

    >>> plural(1, "layer"), plural(1200, "batch", "batches")
    ('1 layer', '1,200 batches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def verdict(report: Reported) -> str:
    """What was found, in one phrase."""
    if not report.evidence.layers:
        return "no batch norm found"
    found = [plural(count, *NOUNS[s]) for s, count in tally(report.findings).items()]
    return ", ".join(found) or "nothing found"


def looked_at(report: Reported) -> str:
    """What was looked at, in one phrase."""
    evidence = report.evidence
    layers = plural(len(evidence.layers), "batch norm")
    rules = f"{layers}, {plural(len(report.codes), 'rule')}"
    if evidence.run is not None:
        return f"{rules}, from a model and {plural(evidence.run.steps, 'training step')}"
    if evidence.data is not None:
        return f"{rules}, from a model and {plural(evidence.data.batches, 'batch', 'batches')}"
    return f"{rules}, from {'a model' if evidence.model else 'weights'} alone"


WANTING = {
    "model": "the model, not its weights alone",
    "data": "batches of data: sn.diagnose(model, batches), or --data",
    "run": "a training run: sn.monitor(model)",
}


WANTING_ELSEWHERE = {
    "keras": {
        "model": "a torch model",
        "data": "a torch model and batches of data",
        "run": "a training run: steadynorm.doctor.callbacks.keras_callback()",
    },
    "flax": {
        "model": "a torch model",
        "data": "a torch model and batches of data",
        "run": "a training run of a torch or Keras model",
    },
}


def unasked(report: Reported) -> list[str]:
    """A sentence for each kind of evidence that was not there, and how to give it."""
    missing = Counter[str](find_rule(code).needs for code in report.skipped)
    layers = report.evidence.layers
    framework = layers[0].state.framework if layers else "torch"
    return [
        f"{plural(missing[kind], 'rule needs', 'rules need')} {how}."
        for kind, how in (WANTING | WANTING_ELSEWHERE.get(framework, {})).items()
        if missing[kind]
    ]


def number(value: object) -> str:
    """A number as it is shown: four digits.

    >>> number(0.0123456), number(1234567), number(1e-12), number("float16")
    ('0.01235', '1,234,567', '1e-12', 'float16')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (
        math.isfinite(value) and value == int(value) and abs(value) < 1e6
    ):
        return f"{int(value):,}"
    return f"{value:.4g}"


def facts(finding: Finding) -> list[tuple[str, str]]:
    """The figures of a finding, by name in words."""
    return [(name.replace("_", " "), number(value)) for name, value in finding.evidence.items()]


def named(layer: NormEvidence | str) -> str:
    """The layer as it is shown: a model that is one layer has no name for it."""
    return printable(layer if isinstance(layer, str) else layer.name) or "(the model)"


def printable(text: str) -> str:
    r"""A line whose control characters are spelled out: names come from files that others wrote.

    So are characters that turn the direction of writing, and halves of surrogate pairs.

    >>> printable("\x1b[31mred\x07")
    '\\x1b[31mred\\x07'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same for code and other text of several lines."""
    return "\n".join(map(printable, text.split("\n")))
