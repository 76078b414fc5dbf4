"""The layer keeps no running statistics: in inference, too, the batch normalizes.

The answer for one sample then depends on which others are in its batch, a batch of one value per
channel cannot be answered at all, and the layer can be neither folded nor exported. It is often set
to hide a gap between train() and eval() instead of finding it.

When: track_running_stats is False, or the buffers were taken out.

Cure: Make the layer with track_running_stats=True and measure the statistics.

Source: pytorch/pytorch issue 4741; documentation of torch.nn.BatchNorm2d.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301",))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    if layer.usage is not None and not layer.usage.track_running_stats:
        kept = "yes" if layer.state.running_mean is not None else "no"
        yield rule.finding(
            layer,
            f"no running statistics in {layer.state.num_features} channels: answers in "
            f"inference depend on the other samples of a batch",
            {"channels": layer.state.num_features, "buffers_kept": kept},
        )
