"""In the run, the samples of a batch were more alike than those of different batches.

Classes in order, frames of one recording, the patches of one patient; a discriminator that gets
real and generated samples in batches of their own. Each batch is then normalized by the statistics
of its kind, and the running ones are a mixture that inference meets nowhere; the network may learn
to read the kind from its neighbours. The batch is large and knows little.

When: From at least 8 readings in the run's second half. Within a batch the samples' own means
scatter; if batches were mixed, their means would scatter by that over the number of samples. How
far they do is told by second differences of the readings, in which a steady movement of the weights
cancels. A warning where they scatter, as a variance, so many times as far as SN309 asks for as many
batches, and at least 2.5 times, in the mean over channels.

Cure: Mix the samples that are normalized together; give a discriminator both kinds in one batch, or
a policy for each kind, or a norm without batches.

Code: loader = DataLoader(dataset, batch_size=..., shuffle=True)

Source: Wu & Johnson 2021, sections 4 and 6; Xie et al. 2020, for mixtures of two kinds.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule
from steadynorm.doctor.rules.sn309_batches_not_mixed import scatter_limit

LIMIT = 2.5

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN402", "SN405"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [
        (layer, trend)
        for layer, trend in evidence.trends()
        if (layer.usage is None or layer.usage.policy == "Batch")
        and trend.samples >= 8
        and trend.alike > max(LIMIT, scatter_limit(trend.readings))
    ]
    if not found:
        return
    layer, trend = found[0]
    count = max(1.0, trend.samples / trend.alike)
    yield rule.finding(
        layer,
        f"the means of batches of {trend.samples} samples scatter {trend.alike**0.5:.2g} times as "
        f"far as those of mixed ones would: a batch counts for {count:.2g}",
        {
            "samples": trend.samples,
            "count_for": count,
            "readings": trend.readings,
        },
        layers=len(found),
    )
