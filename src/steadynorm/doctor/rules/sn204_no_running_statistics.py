"""SN204."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NoRunningStatistics(Rule):
    """SN204: the layer keeps no running statistics."""

    code = "SN204"
    name = "no-running-statistics"
    summary = "The layer keeps no running statistics: in inference, too, the batch normalizes."
    why = (
        "The answer for one sample then depends on which others are in its batch, a batch of one "
        "value per channel cannot be answered at all, and the layer can be neither folded nor "
        "exported. It is often set to hide a gap between train() and eval() instead of finding it."
    )
    source = "pytorch/pytorch issue 4741; documentation of torch.nn.BatchNorm2d."
    threshold = "track_running_stats is False, or the buffers were taken out."
    cure = "Make the layer with track_running_stats=True and measure the statistics."
    severity = Severity.WARNING
    safe = None
    needs = "model"
    explains = ("SN301",)

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where running statistics are not kept."""
        if layer.place is not None and not layer.place.track_running_stats:
            kept = "yes" if layer.state.running_mean is not None else "no"
            yield self.finding(
                layer,
                f"no running statistics in {layer.state.num_features} channels: answers in "
                f"inference depend on the other samples of a batch",
                {"channels": layer.state.num_features, "buffers_kept": kept},
            )
