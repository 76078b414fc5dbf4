"""What a rule is made of."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import ClassVar, Literal

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity

Needs = Literal["state", "model", "data", "run"]


class Rule(ABC):
    """One defect: how to see it, why it matters, what to do.

    A subclass overrides `judge`, called for every layer, or `check`, for what only the whole shows.
    It judges evidence and looks at nothing else.
    """

    code: ClassVar[str]
    """"SN1.." needs the state alone, "SN2.." the model, "SN3.." batches, "SN4.." a watched run."""
    name: ClassVar[str]
    """States the defect, in words joined by hyphens."""
    summary: ClassVar[str]
    """What is wrong, one sentence."""
    why: ClassVar[str]
    """Why it matters, in a paragraph."""
    source: ClassVar[str]
    """Paper or thread that says so."""
    threshold: ClassVar[str]
    """When it speaks, how severely, and the reason for every number."""
    cure: ClassVar[str]
    """What to do, one sentence."""
    severity: ClassVar[Severity]
    """The highest it gives."""
    safe: ClassVar[bool | None]
    """See `Finding.safe`."""
    needs: ClassVar[Needs]
    line: ClassVar[str] = ""
    """Code that does it, to copy."""
    explains: ClassVar[tuple[str, ...]] = ()
    """Codes of defects that follow from this one: those are reported after it."""

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All that this rule finds, in the order of the layers."""
        for layer in evidence.layers:
            yield from self.judge(layer, evidence)

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """What this rule finds in one layer."""
        raise NotImplementedError

    def finding(
        self,
        layer: Layer | None,
        message: str,
        evidence: Mapping[str, float | int | str],
        *,
        severity: Severity | None = None,
        cure: str | None = None,
        line: str | None = None,
        safe: bool | EllipsisType | None = ...,
    ) -> Finding:
        """A finding of this rule; None as `layer` means the model as a whole.

        What is not given is the rule's own.
        """
        return Finding(
            self.code,
            self.name,
            self.severity if severity is None else severity,
            "" if layer is None else layer.name,
            message,
            dict(evidence),
            self.cure if cure is None else cure,
            self.line if line is None else line,
            self.safe if isinstance(safe, EllipsisType) else safe,
        )
