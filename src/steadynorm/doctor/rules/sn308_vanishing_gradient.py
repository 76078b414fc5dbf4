"""The gradient vanishes on its way to the first layers.

Each layer multiplies it by its own slope. Where those are small and nothing scales it up again, the
first layers stand still while the last ones learn. A batch norm after each layer does scale it up:
it divides by the standard deviation of what reaches it. It cannot where the variance is below eps,
or where layers go without one.

When: |∂L/∂W|·|W|, which does not change with the scale of a weight before a batch norm: the
largest in the first quarter of the layers (the weights of an attention that looks everywhere alike
have next to none) against the median of the last quarter. A warning below a ten-thousandth, an
error below a millionth. A warning also below a hundredth, if the same of the layers' inputs x,
|∂L/∂x|·|x|, is below a tenth: the weights of a branch that adds little to a residual path, as in a
fresh transformer, have little gradient too, but what they get has all of it. Healthy networks are
between 0.1 and 1,000 in the first, and between 0.4 and 3,400 in the second.

Cure: Normalize every layer, or let a residual path carry the gradient.

Source: Glorot & Bengio 2010; Ioffe & Szegedy 2015, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steadynorm.doctor.evidence.records import WeightGradient
from steadynorm.doctor.rules.rule import ERROR, WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    sizes = () if evidence.data is None else evidence.data.gradients
    if len(sizes) < 3:
        return
    first, last = _ends([gradient.size for gradient in sizes])
    if last == 0 or first >= 1e-2 * last:
        return
    if first >= 1e-4 * last and not _vanishes_in_inputs(sizes):
        return
    message = (
        f"|∂L/∂W|·|W| is {first:.2g} in the first layers, from {sizes[0].layer!r}, and "
        f"{last:.2g} in the last, of {len(sizes)}"
    )
    yield rule.finding(
        None,
        message,
        {"first": first, "last": last, "ratio": first / last, "first_layer": sizes[0].layer},
        severity=ERROR if first < 1e-6 * last else WARNING,
    )


def _vanishes_in_inputs(sizes: Sequence[WeightGradient]) -> bool:
    inputs = [gradient.of_input for gradient in sizes if gradient.of_input is not None]
    if len(inputs) < 3:
        return False
    first, last = _ends(inputs)
    return first < 0.1 * last


def _ends(sizes: Sequence[float]) -> tuple[float, float]:
    """The largest of the first quarter, the median of the last."""
    quarter = max(len(sizes) // 4, 1)
    return max(sizes[:quarter]), float(np.median(sizes[-quarter:]))
