"""The running statistics lag behind what the batches are.

The weights move on, and with them what reaches a layer; an average with a small momentum follows
late. Inference then normalizes with how things were. It shows as good training and bad inference,
worst while the learning rate is high.

When: At least 8 readings in the run's second half. A channel lags where the batches' means lie more
than 0.3 running standard deviations to one side, and more than four standard errors of that, so
that scatter alone is not blamed; or where the batches' standard deviations, in the mean, are more
than 1.3 times the running one or less than 1/1.3. A warning where a quarter of a layer's channels
lag.

Cure: Measure the statistics when training is over, or raise momentum (running = (1 −
momentum)·running + momentum·batch). Where the statistics were updated more often than the model was
trained, put it into inference mode for the other forwards.

Code: sn.calibrate(model, batches)

Source: Wu & Johnson 2021, section 3; pytorch/pytorch issue 4741.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

LAG = 0.3
RATIO = 1.3
FOREIGN = 1.2  # updates in a training step, from which others than training must make them

rule = Rule(__name__, __doc__, WARNING, safe=True)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    run = evidence.run
    trend = None if run is None else run.trends.get(layer.name)
    moves = layer.usage is None or layer.usage.moves
    if run is None or trend is None or trend.readings < 8 or not moves:
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
    numbers: Numbers = {
        "shift": shift, "std_ratio": ratio, "channels": share, "readings": trend.readings
    }  # fmt: skip
    if momentum is not None:
        numbers["momentum"] = momentum
        message += f", with momentum {momentum:g}"
    steps, updates = run.steps, run.updates.get(layer.name)
    if updates is None or updates <= FOREIGN * steps:
        yield rule.finding(layer, message, numbers)
        return
    numbers |= {"updates": updates, "steps": steps}
    message += f"; {updates} updates in {steps} training steps: other forwards update them too"
    yield rule.finding(
        layer,
        message,
        numbers,
        cure="Put the model into inference mode for forwards that do not train it.",
        line="model.eval()",
        safe=None,
    )
