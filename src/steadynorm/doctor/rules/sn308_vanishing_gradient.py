"""SN308."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class VanishingGradient(Rule):
    """SN308: the gradient does not reach the first layers."""

    code = "SN308"
    name = "vanishing-gradient"
    summary = "The gradient vanishes on its way to the first layers."
    why = (
        "Each layer multiplies it by its own slope. Where those are small and nothing scales it "
        "up again, the first layers stand still while the last ones learn. A batch norm after each "
        "layer does scale it up: it divides by the standard deviation of what reaches it. It "
        "cannot where the variance is below eps, or where layers go without one."
    )
    source = "Glorot & Bengio 2010; Ioffe & Szegedy 2015, section 3.3."
    threshold = (
        "|∂L/∂W|·|W|, which does not change with the scale of a weight before a batch norm, in "
        "the first quarter of the layers against the last quarter, medians: a warning below a "
        "thousandth, an error below a millionth. Healthy networks are between 0.1 and 1,000."
    )
    cure = "Normalize every layer, or let a residual path carry the gradient."
    severity = Severity.ERROR
    safe = False
    needs = "data"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer."""
        sizes = () if evidence.data is None else evidence.data.gradients
        if len(sizes) < 3:
            return
        quarter = max(len(sizes) // 4, 1)
        first, last = (
            float(np.median([gradient.size for gradient in part]))
            for part in (sizes[:quarter], sizes[-quarter:])
        )
        if last == 0 or first >= 1e-4 * last:
            return
        message = (
            f"|∂L/∂W|·|W| is {first:.2g} in the first layers, from {sizes[0].layer!r}, and "
            f"{last:.2g} in the last, of {len(sizes)}"
        )
        yield self.finding(
            None,
            message,
            {"first": first, "last": last, "ratio": first / last, "first_layer": sizes[0].layer},
            severity=Severity.ERROR if first < 1e-6 * last else Severity.WARNING,
        )
