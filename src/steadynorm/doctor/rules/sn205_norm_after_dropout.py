"""Dropout straight before: the variance in inference is another than in training.

Dropout with probability p keeps the mean and multiplies E[x²] by 1/(1 - p). The layer remembers
that larger variance and divides by it in inference, where nothing is dropped: its outputs come out
too small, by a factor of up to √(1 - p), in all that follows. Calibration cannot know which of the
two is meant.

When: A dropout module of p > 0 whose output the layer takes, straight or behind operators that only
rearrange, by the graph of calls. A warning from p = 0.1 on, where the factor reaches 5 %; below it
information.

Cure: Put the dropout behind the last batch norm, or at least behind this one.

Source: Li et al. 2019, Understanding the Disharmony between Dropout and BN by Variance Shift.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302", "SN312"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    for before in (layer.usage.before or ()) if layer.usage is not None else ():
        p = before.probability
        if not p:
            continue
        factor = max(0.0, 1 - p) ** 0.5
        yield rule.finding(
            layer,
            f"{before.name or before.kind} drops with p = {p:g} straight before: outputs in "
            f"inference are up to {1 - factor:.0%} too small",
            {"dropout": before.name, "p": p, "smallest_factor": factor},
            severity=WARNING if p >= 0.1 else INFO,
        )
