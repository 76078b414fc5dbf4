"""SN309."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import called
from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class BatchesNotMixed(Rule):
    """SN309: the samples of a batch are alike."""

    code = "SN309"
    name = "batches-not-mixed"
    summary = "The samples of a batch are more alike than those of different batches."
    why = (
        "Batch statistics then tell what kind of batch it is: sorted by class, by recording, by "
        "length. The network learns to read that, which inference cannot give it, or is disturbed "
        "by it; either way the batch counts for far fewer samples than it holds."
    )
    source = "Wu & Johnson 2021, sections 4 and 6 (leakage through batch statistics)."
    threshold = (
        "Over at least 8 batches of at least 8 samples: the means of batches scatter so much that "
        "a batch counts for less than a quarter of its samples' worth. By chance, in a single "
        "channel, one set of 8 batches in 5,000 does. A warning: how data are dealt out may be "
        "meant."
    )
    cure = "Shuffle the data before they are dealt into batches."
    line = "loader = DataLoader(dataset, batch_size=..., shuffle=True)"
    severity = Severity.WARNING
    safe = False
    needs = "data"
    explains = ("SN301", "SN302")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer that shows it."""
        batches = 0 if evidence.data is None else evidence.data.batches
        for layer in called(evidence):
            data, place = layer.data, layer.place
            if (
                data is None
                or data.effective is None
                or data.worth_of_mean is None
                or not data.trains
            ):
                continue
            if place is not None and place.policy != "Batch":
                continue
            # A layer called more than once in a forward meets several kinds of input by itself.
            if data.samples < 8 or data.calls != batches or data.nonfinite:
                continue
            expected = data.samples * data.worth_of_mean
            if data.effective >= expected / 4:
                continue
            alike = data.effective / data.worth_of_mean
            yield self.finding(
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
