"""The samples of a batch are more alike than those of different batches.

Batch statistics then tell what kind of batch it is: sorted by class, by recording, by length. The
network learns to read that, which inference cannot give it, or is disturbed by it; either way the
batch counts for far fewer samples than it holds.

When: Over at least 8 batches of at least 8 samples: the means of batches scatter so much that, by
chance and in a single channel, one set of batches in 5,000 does: of 8 batches where each counts for
less than a quarter of its samples' worth, of 32 for less than a half. Frames of one recording and
samples of one patient in a batch show like classes in order. A warning: how data are dealt out may
be meant.

Cure: Shuffle the data before they are dealt into batches.

Code: loader = DataLoader(dataset, batch_size=..., shuffle=True)

Source: Wu & Johnson 2021, sections 4 and 6 (leakage through batch statistics).
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


def scatter_limit(batches: int) -> float:
    """χ²/k, k = batches - 1, that one in 5,000 exceeds, after Wilson and Hilferty.

    >>> round(scatter_limit(8), 1), round(scatter_limit(32), 1)
    (4.1, 2.2)
    """
    spread = 2 / (9 * (batches - 1))
    return float((1 - spread + 3.54 * spread**0.5) ** 3)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    batches = 0 if evidence.data is None else evidence.data.batches
    for layer, data in measured(evidence):
        by_batch = layer.usage is None or layer.usage.policy == "Batch"
        if not data.trains or not by_batch or data.samples < 8 or data.nonfinite:
            continue
        # A layer called more than once in a forward meets several kinds of input by itself.
        if data.effective is None or data.worth_of_mean is None or data.calls != batches:
            continue
        expected = data.samples * data.worth_of_mean
        if data.effective >= expected / scatter_limit(batches):
            continue
        alike = data.effective / data.worth_of_mean
        yield rule.finding(
            layer,
            f"a batch of {data.samples} samples counts for {alike:.2g}: the means of batches "
            f"scatter {(expected / data.effective) ** 0.5:.2g} times as far as those of mixed "
            f"ones would",
            {
                "samples": data.samples,
                "count_for": alike,
                "independent_values": data.effective,
                "if_mixed": expected,
            },
        )
        return
