"""SN402."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule

LAG = 0.3
RATIO = 1.3


class StatisticsLag(Rule):
    """SN402: running statistics lag behind the batches."""

    code = "SN402"
    name = "statistics-lag"
    summary = "The running statistics lag behind what the batches are."
    why = (
        "The weights move on, and with them what reaches a layer; an average with a small momentum "
        "follows late. Inference then normalizes with how things were. It shows as good training "
        "and bad inference, worst while the learning rate is high."
    )
    source = "Wu & Johnson 2021, section 3; pytorch/pytorch issue 4741."
    threshold = (
        "At least 8 readings in the run's second half. A channel lags where the batches' means lie "
        "more than 0.3 running standard deviations to one side, and more than four standard errors "
        "of that, so that scatter alone is not blamed; or where the batches' standard deviations, "
        "in the mean, are more than 1.3 times the running one or less than 1/1.3. A warning where "
        "a quarter of a layer's channels lag."
    )
    cure = (
        "Measure the statistics when training is over, or raise momentum "
        "(running = (1 − momentum)·running + momentum·batch)."
    )
    line = "sn.calibrate(model, batches)"
    severity = Severity.WARNING
    safe = True
    needs = "run"

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where many channels lag."""
        trend = None if evidence.run is None else evidence.run.trends.get(layer.name)
        moves = layer.place is None or layer.place.moves
        if trend is None or trend.readings < 8 or not moves:
            return
        off = (np.abs(trend.lag) > LAG) & (np.abs(trend.lag) > 4 * trend.error)
        wide = np.abs(np.log(trend.ratio)) > np.log(RATIO)
        share = float(np.mean(off | wide))
        if share < 0.25:
            return
        shift = float(np.sqrt(np.mean(trend.lag**2)))
        ratio = float(np.exp(np.mean(np.log(trend.ratio))))
        momentum = layer.state.momentum
        message = (
            f"in the second half of the run the batches' means lie {shift:.2g} running standard "
            f"deviations to one side and their standard deviations are {ratio:.2g} times the "
            f"running ones; {share:.0%} of the channels lag"
        )
        numbers: dict[str, float | int | str] = {
            "shift": shift, "std_ratio": ratio, "channels": share, "readings": trend.readings
        }  # fmt: skip
        if momentum is not None:
            numbers["momentum"] = momentum
            message += f", with momentum {momentum:g}"
        yield self.finding(layer, message, numbers)
