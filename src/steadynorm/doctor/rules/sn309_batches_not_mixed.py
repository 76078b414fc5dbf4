"""The samples of a batch are more alike than those of different batches.

Batch statistics then tell what kind of batch it is: sorted by class, by recording, by length. The
network learns to read that, which inference cannot give it, or is disturbed by it; either way the
batch counts for far fewer samples than it holds.

When: Over at least 8 batches of at least 8 samples, where a batch counts for less than two thirds
of its samples, and where chance does not explain it: one mixed set of batches in 5,000 scatters so
far. Looked at are the means of batches in each layer. Channels tell of the same samples: how many
independent ones they are worth, by the correlations of the samples' own means, decides how far
chance goes. If they are worth one, each of 8 batches must count for less than a quarter of its
samples, of 32 for less than a half. Where batches hold a class for each sample, the numbers of each
class are looked at too, and the labels are dealt into batches anew, at random, 4,999 times. Frames
of one recording and samples of one patient in a batch show like classes in order. A warning: how
data are dealt out may be meant.

Cure: Shuffle the data before they are dealt into batches.

Code: loader = DataLoader(dataset, batch_size=..., shuffle=True)

Source: Wu & Johnson 2021, sections 4 and 6 (leakage through batch statistics).
"""

from __future__ import annotations

from statistics import NormalDist

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.evidence.records import NormData
from steadynorm.doctor.rules.rule import (
    WARNING,
    Evidence,
    Finding,
    Findings,
    NormEvidence,
    Numbers,
    Rule,
)

SMALLEST = 8
"""Samples in a batch."""
ALIKE = 1.5
"""Variance of the batches' means over that of mixed ones: their noise is 22 % larger."""

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


def scatter_limit(batches: int, channels: float = 1.0, layers: int = 1) -> float:
    """χ²/ν, ν = channels·(batches - 1), that one in 5,000 exceeds, after Wilson and Hilferty; in
    any of several layers, after Bonferroni.

    >>> round(scatter_limit(8), 1), round(scatter_limit(32), 1), round(scatter_limit(32, 5), 1)
    (4.1, 2.2, 1.5)
    """
    variance = 2 / (9 * channels * (batches - 1))  # of the cube root
    quantile = NormalDist().inv_cdf(1 - 1 / (5000 * layers))
    return float((1 - variance + quantile * variance**0.5) ** 3)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    batches = 0 if evidence.data is None else evidence.data.batches
    layers = [(layer, data) for layer, data in measured(evidence) if _normalizes(layer, data)]
    for layer, data in layers:
        # A layer called more than once in a forward meets several kinds of input by itself.
        if data.effective is None or data.worth_of_mean is None or data.calls != batches:
            continue
        expected = data.samples * data.worth_of_mean
        limit = scatter_limit(batches, data.independent_channels or 1.0, len(layers))
        if expected / data.effective > max(ALIKE, limit):
            yield _finding(
                layer, data.samples, expected / data.effective, "the means of batches scatter",
                {"independent_values": data.effective, "if_mixed": expected},
            )  # fmt: skip
            return
    classes = None if evidence.data is None else evidence.data.class_scatter
    if classes is None or not layers or classes.samples < SMALLEST:
        return
    if classes.ratio > max(ALIKE, classes.limit):
        what = "the numbers of each class in a batch scatter"
        yield _finding(layers[0][0], classes.samples, classes.ratio, what, {})


def _normalizes(layer: NormEvidence, data: NormData) -> bool:
    """Whether it trains by batches large enough to be judged."""
    by_batch = layer.usage is None or layer.usage.policy == "Batch"
    return data.trains and by_batch and data.samples >= SMALLEST and not data.nonfinite


def _finding(
    layer: NormEvidence, samples: int, ratio: float, what: str, numbers: Numbers
) -> Finding:
    count = samples / ratio
    return rule.finding(
        layer,
        f"a batch of {samples} samples counts for {count:.2g}: {what} {ratio**0.5:.2g} times as "
        f"far as those of mixed ones would",
        {"samples": samples, "count_for": count, **numbers},
    )
