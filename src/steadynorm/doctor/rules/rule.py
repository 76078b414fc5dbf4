"""What a rule is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import EllipsisType
from typing import Literal

from steadynorm.doctor.evidence.records import Evidence, NormEvidence
from steadynorm.doctor.finding import Finding, Severity

__all__ = [
    "ERROR",
    "INFO",
    "WARNING",
    "Evidence",
    "Finding",
    "Findings",
    "Needs",
    "NormEvidence",
    "Numbers",
    "Rule",
    "Severity",
]

INFO, WARNING, ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR

Needs = Literal["state", "model", "data", "run"]
NEEDS: dict[str, Needs] = {"SN1": "state", "SN2": "model", "SN3": "data", "SN4": "run"}
"""What a rule needs to judge, by the beginning of its code."""
Numbers = dict[str, float | int | str]
Findings = Iterator[Finding]


class Rule:
    """One defect: how to see it, why it matters, what to do.

    A rule is a module. Its file name is its code and name. Its docstring holds the texts, in
    paragraphs: what is wrong (one sentence), why it matters, "When:" it is reported and why at
    these numbers, "Cure:", "Code:" that applies the cure, to copy, and "Source:". Its check,
    registered by `each_layer` or `whole`, judges evidence and looks at nothing else.

    Args:
        module, text: `__name__` and `__doc__`.
        severity: the highest it gives.
        safe: see `Finding.safe`.
        explains: codes of defects that follow from this one; they are reported after it.
    """

    def __init__(
        self,
        module: str,
        text: str | None,
        severity: Severity,
        *,
        safe: bool | None,
        explains: tuple[str, ...] = (),
    ) -> None:
        code, _, name = module.rpartition(".")[2].partition("_")
        self.code, self.name = code.upper(), name.replace("_", "-")
        parts = [
            part if part.startswith("Code: ") else " ".join(part.split())
            for part in (text or "").split("\n\n")
        ]
        titled = {part.partition(": ")[0]: part.partition(": ")[2] for part in parts[2:]}
        self.summary, self.why = (*parts, "", "")[:2]
        self.threshold, self.cure, self.line, self.source = (
            titled.get(title, "") for title in ("When", "Cure", "Code", "Source")
        )
        self.severity, self.safe, self.explains = severity, safe, explains
        self.needs = NEEDS[self.code[:3]]
        self.check: Callable[[Evidence], Iterable[Finding]] = lambda _: ()

    def whole(self, check: Callable[[Evidence], Findings]) -> None:
        """Registers the check of the evidence as a whole."""
        self.check = check

    def each_layer(self, check: Callable[[NormEvidence, Evidence], Findings]) -> None:
        """Registers the check of a single layer, called for all in the order of the model."""
        self.check = lambda evidence: (
            finding for layer in evidence.layers for finding in check(layer, evidence)
        )

    def finding(
        self,
        layer: NormEvidence | None,
        message: str,
        evidence: Mapping[str, float | int | str],
        *,
        severity: Severity | None = None,
        cure: str | None = None,
        line: str | None = None,
        safe: bool | EllipsisType | None = ...,
        layers: int | None = None,
    ) -> Finding:
        """A finding of this rule; None as `layer` means the model as a whole.

        What is not given is the rule's own. `layers`: how many the finding stands for, of which
        `layer` is the first.
        """
        if layers is not None and layers > 1:
            message += f"; {layers} layers are affected, this is the first"
        return Finding(
            self.code,
            self.name,
            self.severity if severity is None else severity,
            "" if layer is None else layer.name,
            message,
            {**evidence, **({} if layers is None else {"layers_affected": layers})},
            self.cure if cure is None else cure,
            self.line if line is None else line,
            self.safe if isinstance(safe, EllipsisType) else safe,
        )
