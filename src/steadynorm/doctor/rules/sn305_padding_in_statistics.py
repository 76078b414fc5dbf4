"""SN305."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import EPS, apart, called
from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class PaddingInStatistics(Rule):
    """SN305: padded positions are counted in the statistics."""

    code = "SN305"
    name = "padding-in-statistics"
    summary = "Padded positions are counted in the mean and variance that normalize the real ones."
    why = (
        "Samples padded to one length carry positions that hold nothing. Counted, they pull the "
        "mean towards the padding's value and shrink or stretch the variance, more in batches with "
        "one long sample than in others: a sample's output depends on how long its neighbours "
        "are, and inference on single samples meets other statistics."
    )
    source = "pytorch/pytorch issues 70529 and 30414; keras-team/keras issue 19848."
    threshold = (
        "At least a twentieth of all positions padded, and a divergence of 0.02 between the "
        "statistics with and without them: means 0.2 standard deviations apart, or standard "
        "deviations 20 %. Padding is known from a mask in the batch, or seen: the same vector at "
        "the end of several samples, from places that differ. A warning."
    )
    cure = "Give the layer a mask of the valid positions; ours take one."
    line = "y = layer(x, mask=mask)  # after model, changes = sn.convert(model)"
    severity = Severity.WARNING
    safe = False
    needs = "data"
    explains = ("SN301", "SN302")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer whose statistics padding moves."""
        found = []
        for layer in called(evidence):
            data = layer.data
            if data is None or data.padding is None or data.masked or not data.trains:
                continue
            padding = data.padding
            if padding.share < 0.05:
                continue
            eps = layer.state.eps or EPS
            how = apart(
                padding.counted_mean, padding.counted_var, padding.mean, padding.var, 0.0, eps
            )
            if how.mean_divergence > 0.02:
                found.append((layer, padding, how))
        if not found:
            return
        layer, padding, how = found[0]
        message = f"{100 * padding.share:.0f} % of the positions are padded"
        message += ", says the batch's mask" if padding.known else ", by their equal values"
        message += f"; with them counted, {how}"
        if len(found) > 1:
            message += f"; {len(found)} layers are concerned, this is the first"
        yield self.finding(
            layer,
            message,
            {
                "padded_share": padding.share,
                "shift": how.typical_shift,
                "std_ratio": how.typical_ratio,
                "divergence": how.mean_divergence,
                "layers_concerned": len(found),
            },
        )
