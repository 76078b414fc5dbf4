"""Padded positions are counted in the mean and variance that normalize the real ones.

Samples padded to one length carry positions that hold nothing. Counted, they pull the mean towards
the padding's value and shrink or stretch the variance, more in batches with one long sample than in
others: a sample's output depends on how long its neighbours are, and inference on single samples
meets other statistics.

When: At least a twentieth of all positions padded, and a divergence of 0.02 between the statistics
with and without them: means 0.2 standard deviations apart, or standard deviations 20 %. Padding is
known from a mask in the batch, or seen there and in the layer's input: the same vector at the end
of several samples, from places that differ, while next to no sample is constant at the other end,
as the plain background of a picture would be. A warning.

Cure: Give the layer a mask of the valid positions; ours take one.

Code: y = layer(x, mask=mask)  # after model, changes = sn.convert(model)

Source: pytorch/pytorch issues 70529 and 30414; keras-team/keras issue 19848.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import EPS, FAR, divergence, measured
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = []
    for layer, data in measured(evidence):
        padding = data.padding
        if padding is None or padding.share < 0.05 or data.masked or not data.trains:
            continue
        counted, eps = (padding.counted_mean, padding.counted_var), layer.state.eps or EPS
        with_padding = divergence(*counted, padding.mean, padding.var, eps=eps)
        if with_padding.mean_kl > FAR:
            found.append((layer, padding, with_padding))
    if not found:
        return
    layer, padding, with_padding = found[0]
    evident = "says the batch's mask" if padding.by_mask else "by their equal values"
    yield rule.finding(
        layer,
        f"{100 * padding.share:.0f} % of the positions are padded, {evident}; with them counted, "
        f"{with_padding}",
        {
            "padded_share": padding.share,
            "shift": with_padding.typical_shift,
            "std_ratio": with_padding.typical_ratio,
            "divergence": with_padding.mean_kl,
        },
        layers=len(found),
    )
