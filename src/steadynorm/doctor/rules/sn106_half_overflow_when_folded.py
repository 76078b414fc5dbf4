"""Folded for inference, this layer's scale or shift is past float16's largest number.

To fold a batch norm is to multiply the weights before it by γ/√(var + eps) and to add β +
(b - mean)·γ/√(var + eps), where b is their bias. A small variance or a large mean makes one of them
larger than float16 can hold, and the folded network answers infinity or NaN, while the one it was
made from works. bfloat16 and float32 hold it.

When: Beyond 65504: the largest folded weight, where the layer before is known and its weights too,
else the scale itself; and the shift, with that layer's bias in it.

Cure: Ship this layer in float32 or bfloat16, or mend the channel: see its variance and mean in the
evidence.

Source: IEEE 754: float16's largest number is 65504.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

LARGEST = 65504.0

rule = Rule(__name__, __doc__, WARNING, safe=None)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    mean, var = state.running_mean, state.running_var
    if mean is None or var is None or not mean.size:
        return
    gain = np.ones_like(mean) if state.weight is None else state.weight
    offset = np.zeros_like(mean) if state.bias is None else state.bias
    finite = np.isfinite([mean, var, gain, offset]).all(0) & (var + state.known_eps > 0)
    mean, gain, offset = (np.where(finite, array, 0.0) for array in (mean, gain, offset))
    var = np.where(finite, var, 1.0)
    scale = gain / np.sqrt(var + state.known_eps)
    peak, bias = (None, None) if usage is None else (usage.host_peak, usage.host_bias)
    if peak is not None and peak.shape != scale.shape:
        peak, bias = None, None
    inner = 0.0 if bias is None else np.where(np.isfinite(bias), bias, 0.0)
    shift = offset + (inner - mean) * scale
    largest_weight = 1.0 if peak is None else np.where(np.isfinite(peak), peak, 0.0)
    folded = np.abs(scale) * largest_weight
    over = (folded > LARGEST) | (np.abs(shift) > LARGEST)
    if not over.any():
        return
    worst = int(np.argmax(np.maximum(folded, np.abs(shift))))
    numbers: Numbers = {
        "channels_over": int(over.sum()),
        "channels": mean.size,
        "worst_channel": worst,
        "scale": float(scale[worst]),
        "shift": float(shift[worst]),
        "running_mean": float(mean[worst]),
        "running_var": float(var[worst]),
    }
    what = f"scale is {scale[worst]:.3g}"
    if peak is not None:
        numbers["folded_weight"] = float(folded[worst])
        what = f"largest folded weight is {folded[worst]:.3g}"
    message = (
        f"past float16's largest number (65504) in {int(over.sum())} of {mean.size} channels; "
        f"channel {worst}: {what}, shift is {shift[worst]:.3g}"
    )
    yield rule.finding(layer, message, numbers)
