"""SN205."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NormAfterDropout(Rule):
    """SN205: dropout stands straight before the layer."""

    code = "SN205"
    name = "norm-after-dropout"
    summary = "Dropout straight before: the variance in inference is another than in training."
    why = (
        "Dropout with probability p keeps the mean and multiplies E[x²] by 1/(1 - p). The layer "
        "remembers that larger variance and divides by it in inference, where nothing is dropped: "
        "its outputs come out too small, by a factor of up to √(1 - p), in all that follows. "
        "Calibration cannot know which of the two is meant."
    )
    source = (
        "Li et al. 2019, Understanding the Disharmony between Dropout and BN by Variance Shift."
    )
    threshold = (
        "A dropout module of p > 0 whose output the layer takes, straight or behind operators "
        "that only rearrange, by the graph of calls. A warning from p = 0.1 on, where the factor "
        "reaches 5 %; below it information."
    )
    cure = "Put the dropout behind the last batch norm, or at least behind this one."
    severity = Severity.WARNING
    safe = None
    needs = "model"
    explains = ("SN301", "SN302")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding for each dropout that feeds the layer."""
        for before in (layer.place.before or ()) if layer.place is not None else ():
            p = before.probability
            if not p:
                continue
            factor = max(0.0, 1 - p) ** 0.5
            yield self.finding(
                layer,
                f"{before.name or before.kind} drops with p = {p:g} straight before: outputs in "
                f"inference are up to {1 - factor:.0%} too small",
                {"dropout": before.name, "p": p, "smallest_factor": factor},
                severity=Severity.WARNING if p >= 0.1 else Severity.INFO,
            )
