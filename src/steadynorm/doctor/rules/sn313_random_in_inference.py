"""In inference the same batch gives the layer other values from one forward to the next.

`F.dropout(x, p)` without `training=self.training` drops in inference too: `model.eval()` reaches
modules alone. Answers then change from call to call, and are as noisy as in training. Dropout
modules left in training mode do the same.

When: Two inference passes over one batch, which draw other numbers, differ in the layer's input by
more than 1 % of its variance. A warning, in the first such layer: models that sample on purpose do
it too.

Cure: Pass `training=self.training` to the function, or use the module; leave it where inference is
meant to sample.

Source: torch.nn.functional.dropout, whose `training` is True by default.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

NOTICED = 0.01

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [
        (layer, data.chance.noise)
        for layer, data in measured(evidence)
        if data.chance is not None and data.chance.noise > NOTICED
    ]
    if not found:
        return
    layer, noise = found[0]
    yield rule.finding(
        layer,
        f"{noise:.1%} of its input's variance in inference is drawn at random",
        {"noise": noise},
        layers=len(found),
    )
