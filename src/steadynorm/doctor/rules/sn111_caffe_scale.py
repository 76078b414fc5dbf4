"""Means and variances are some thousand times what the weights before can give.

Caffe stores a batch norm's mean and variance multiplied by a scale factor, its third blob: 999.98
in the published ResNets. Read as they are, they divide every channel by about 32 and shift it by a
thousand means; the shapes fit, and nothing fails.

When: The variance of a channel over the sum of its squared weights, geometric mean over a layer,
is about the mean square of what the layer before receives: 0.1 to 10 behind a batch norm. A warning
above 30 in three of four layers, of at least three whose weights are found in the order of the
state dict. A first layer fed with pixels up to 255 reaches 5,000, and is one of four at most.

Cure: Divide running_mean and running_var by the scale factor.

Code: for m in norms: m.running_mean /= 999.982; m.running_var /= 999.982

Source: Caffe's BatchNormLayer, whose third blob is the scale factor of the other two; He et al.
2016 published ResNets so.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

FACTOR = 30

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    ratios = []
    for layer in evidence.layers:
        square, var = layer.state.weight_square, layer.state.running_var
        if square is None or var is None:
            continue
        usable = (square > 0) & (var > 0) & np.isfinite(square) & np.isfinite(var)
        if usable.any():
            ratios.append(float(np.exp(np.mean(np.log(var[usable]) - np.log(square[usable])))))
    if len(ratios) < 3 or np.quantile(ratios, 0.25) < FACTOR:
        return
    typical = float(np.median(ratios))
    yield rule.finding(
        None,
        f"variances are {typical:.3g} times the sum of the squared weights before them, median "
        f"over {len(ratios)} layers",
        {"variance_over_weights": typical, "layers": len(ratios)},
    )
