"""SN206."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NormAfterNorm(Rule):
    """SN206: a normalization stands straight before the layer."""

    code = "SN206"
    name = "norm-after-norm"
    summary = "A batch norm straight before: the second one undoes its scale and shift."
    why = (
        "The first one's γ and β are a scale and a shift per channel, which the second one takes "
        "out again: their gradient is 0 but for eps, and both layers cost their time and memory. "
        "It is usually left over from gluing blocks together."
    )
    source = "Ioffe & Szegedy 2015, section 3.2: BN(a·u + b) = BN(u)."
    threshold = (
        "All of the layer's input comes from one batch norm without an activation of its own, "
        "straight or behind operators that only rearrange, and goes nowhere else in between."
    )
    cure = "Take one of the two out, or put what was meant to stand between them there."
    severity = Severity.WARNING
    safe = None
    needs = "model"

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where one batch norm feeds another."""
        before = layer.place.before if layer.place is not None else None
        if before is None or len(before) != 1:
            return
        first = next((other for other in evidence.layers if other.name == before[0].name), None)
        after = first.place.after if first is not None and first.place is not None else None
        if first is None or after is None or before[0].activated:
            return
        if [user.name for user in after] == [layer.name]:
            yield self.finding(
                layer,
                f"takes what {first.name!r} gives, and undoes its weight and bias",
                {"first": first.name, "channels": layer.state.num_features},
            )
