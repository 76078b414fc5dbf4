"""The running statistics are kept in float16 or bfloat16.

In training a running average moves by momentum times the difference, and in half precision such a
step is often less than half a unit of the last place, so that it is rounded away: statistics stop
short of the data's and stay there. With momentum 0.001 and bfloat16, a running mean that should be
3 stays at 1. In inference only the rounding of the finished number counts, which matters where a
mean is large beside its spread.

When: A warning where the layer trains; where statistics alone are in half precision and weight and
bias are not; or where rounding alone may shift a channel by more than a twentieth of its standard
deviation. Else information: a network cast whole, to be shipped.

Cure: Keep statistics in float32, as this package's layers do; measure those anew that moved in half
precision.

Code: model, _ = sn.convert(model.float())

Source: pytorch/pytorch issues 88929 and 70901.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.evidence.records import HALF
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
NOTICED = 0.05

rule = Rule(__name__, __doc__, WARNING, safe=True, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    dtypes = [state.dtypes.get(name, "") for name in ("running_mean", "running_var")]
    mean, var = state.running_mean, state.running_var
    half = next((dtype for dtype in dtypes if dtype in HALF), None)
    if half is None or mean is None or var is None or not mean.size:
        return
    std = np.sqrt(np.maximum(var, 0) + state.known_eps)
    with np.errstate(invalid="ignore"):  # infinity over infinity is left out below
        shifts = ROUNDING.get(dtypes[0], 0.0) * np.abs(mean) / std
    finite = shifts[np.isfinite(shifts)]
    shift = float(finite.max()) if finite.size else 0.0
    trains = usage is not None and usage.training and usage.moves
    alone = any(state.dtypes.get(name, half) not in HALF for name in ("weight", "bias"))
    message = f"running statistics are kept in {half}"
    if trains:
        message += " while they are trained: small steps are rounded away"
    elif alone:
        message += ", weight and bias are not"
    message += f"; rounding shifts a channel by up to {shift:.2g} of its standard deviation"
    serious = trains or alone or shift > NOTICED
    yield rule.finding(
        layer,
        message,
        {"dtype": half, "largest_shift": shift, "channels": mean.size},
        severity=WARNING if serious else INFO,
    )
