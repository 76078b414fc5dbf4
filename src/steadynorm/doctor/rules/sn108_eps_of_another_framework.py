"""eps is another framework's default, which is a hundred times this one's.

Keras adds 1e-3 to the variance, torch and flax 1e-5. Weights trained with one and run with the
other are scaled by √((var + 1e-3)/(var + 1e-5)): nothing where the variance is near 1, but three
times and more in narrow channels. A network that was carried over rightly has the eps of where it
was trained, so this is no defect by itself.

When: eps = 1e-3 under torch or flax, 1e-5 under Keras, where a tenth of the channels or more would
come out 5 % larger or smaller under the framework's own default. A warning where all momentums are
the framework's own default, since a network carried over has both. Else information. The other way
round, weights of Keras under torch's 1e-5, nothing in a checkpoint shows; with batches and a loss,
where a tenth of any layer's channels would come out 5 % smaller, inference is run with 1e-3 too: a
warning if the loss falls by a twentieth, by three standard errors, and by three fifths of what it
is above that of training.

Cure: Find out which eps the weights were trained with, and set that one.

Source: Defaults of torch.nn.BatchNorm2d, keras.layers.BatchNormalization, flax.nnx.BatchNorm.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.evidence.losses import loss_change
from steadynorm.doctor.rules.rule import (
    INFO,
    WARNING,
    Evidence,
    Findings,
    NormEvidence,
    Rule,
    Severity,
)  # fmt: skip
from steadynorm.doctor.rules.sn107_momentum_of_another_framework import setting
from steadynorm.statistics import CONVENTIONS

NOTICED = 0.05
KERAS = CONVENTIONS["keras"].eps

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    own = all(
        layer.state.momentum in (None, CONVENTIONS[layer.state.framework].momentum)
        for layer in evidence.layers
    )
    for layer in evidence.layers:
        yield from _judge(layer, WARNING if own else INFO)
    yield from _tried(evidence)


def _tried(evidence: Evidence) -> Findings:
    data = evidence.data
    if data is None or data.loss is None or data.loss_at_other_eps is None:
        return
    gain = loss_change(data.loss.inference, data.loss_at_other_eps)
    if gain is None or not gain.clear(3) or gain.relative < 0.05:
        return
    if gain.before - gain.after < 0.6 * (gain.before - float(data.loss.training.mean())):
        return  # another eps hides what is wrong, it does not mend it
    yield rule.finding(
        None,
        f"with eps = {KERAS:g}, Keras's default, in all layers the loss of inference falls from "
        f"{gain.before:.3g} to {gain.after:.3g}",
        {"eps": KERAS, "loss": gain.before, "loss_at_eps": gain.after},
        line="for m in model.modules(): m.eps = 1e-3 if hasattr(m, 'running_var') else m.eps",
    )


def _judge(layer: NormEvidence, severity: Severity) -> Findings:
    state = layer.state
    default = CONVENTIONS[state.framework].eps
    other = CONVENTIONS["torch"].eps if default == KERAS else KERAS
    var = state.running_var
    if var is None or not var.size or state.eps is None or not np.isclose(state.eps, other):
        return
    valid = var[np.isfinite(var) & (var >= 0)]
    factors = np.sqrt((valid + state.eps) / (valid + default))
    noticed = int((np.abs(factors - 1) > NOTICED).sum())
    if 10 * noticed < var.size:
        return
    worst = float(factors[np.argmax(np.abs(np.log(factors)))])
    yield rule.finding(
        layer,
        f"eps is {state.eps:g}; under {state.framework}'s own default, {default:g}, {noticed} "
        f"of {var.size} channels would come out more than 5 % different, one {worst:.3g} times "
        f"as large",
        {
            "eps": state.eps,
            "default_eps": default,
            "channels_changed": noticed,
            "channels": var.size,
            "largest_factor": worst,
        },
        severity=severity,
        line=setting(layer, "eps", default),
    )
