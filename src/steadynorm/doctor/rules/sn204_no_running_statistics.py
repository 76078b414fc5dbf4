"""The layer keeps no running statistics: in inference, too, the batch normalizes.

The answer for one sample then depends on which others are in its batch, a batch of one value per
channel cannot be answered at all, and the layer can be neither folded nor exported. It is often set
to hide a gap between train() and eval() instead of finding it. Switched off in a layer that was
made with them, it hides nothing: the buffers stay, and inference goes on using them as they were.

When: track_running_stats is False, or the buffers were taken out.

Cure: Make the layer with track_running_stats=True and measure the statistics.

Source: pytorch/pytorch issue 4741; documentation of torch.nn.BatchNorm2d.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301",))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    if layer.usage is None or layer.usage.track_running_stats:
        return
    channels, kept = layer.state.num_features, layer.state.running_mean is not None
    message = (
        f"no running statistics in {channels} channels: answers in inference depend on the other "
        f"samples of a batch"
    )
    if kept:  # as torch's forward reads the buffers
        message = (
            f"the running statistics of {channels} channels are switched off, but kept: training "
            f"no longer updates them, and inference normalizes with them as they are"
        )
    yield rule.finding(
        layer, message, {"channels": channels, "buffers_kept": "yes" if kept else "no"}
    )
