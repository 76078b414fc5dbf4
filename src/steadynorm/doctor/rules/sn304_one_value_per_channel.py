"""SN304."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import called
from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class OneValuePerChannel(Rule):
    """SN304: training refuses a batch with one value per channel."""

    code = "SN304"
    name = "one-value-per-channel"
    summary = "A batch has one value per channel, which has no variance: training refuses it."
    why = (
        "The mean of one value is the value, and the output would be the bias whatever the input. "
        "torch raises ValueError. It is met in training with batches of one behind pooling or "
        "fully connected layers, and at the end of an epoch, where the last batch holds what is "
        "left over: hours into a run."
    )
    source = "pytorch/pytorch issues 4534 and 77014."
    threshold = (
        "An error where a batch of those given has one value per channel; a warning where the "
        "loader's last batch of an epoch will. Layers that train with other statistics than the "
        "batch's are left out."
    )
    cure = "Leave the last odd batch out, or train with Steady, which takes batches of one."
    line = "loader = DataLoader(dataset, batch_size=..., drop_last=True)"
    severity = Severity.ERROR
    safe = False
    needs = "data"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer that would refuse."""
        layers = called(evidence)
        single = [layer for layer in layers if layer.data is not None and layer.data.single]
        if single:
            yield self._met(single[0], len(single))
            return
        if evidence.data is None or evidence.data.last_batch != 1:
            return
        for layer in layers:
            data, place = layer.data, layer.place
            plain = place is None or place.policy in ("Batch", "Ghost")
            if data is not None and data.trains and data.positions == 1 and plain:
                yield self.finding(
                    layer,
                    f"the last batch of an epoch holds 1 sample, where the others hold "
                    f"{data.samples}: training will stop there",
                    {"last_batch": 1, "samples": data.samples},
                    severity=Severity.WARNING,
                )
                return

    def _met(self, layer: Layer, count: int) -> Finding:
        assert layer.data is not None
        assert layer.data.single is not None
        shape = layer.data.single
        message = f"an input of shape {shape} has one value per channel: training refuses it"
        if count > 1:
            message += f"; so do {count - 1} layers after it"
        return self.finding(
            layer,
            message,
            {"shape": str(shape), "layers_concerned": count},
            line='model, changes = sn.convert(model, statistics="steady")',
        )
