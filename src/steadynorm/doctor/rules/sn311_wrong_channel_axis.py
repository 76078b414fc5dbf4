"""The layer normalizes along another axis than the one that holds the channels.

Batch norm takes axis 1 for the channels. An LSTM, a transformer, a linear layer on (N, L, C) and
pictures in the order (N, H, W, C) hold them on the last axis: BatchNorm1d(L) or BatchNorm2d(H) then
gives each position one mean and variance for all features together. Features keep their different
scales, sequences of another length cannot be run, and folding is impossible. Nothing fails where
the sizes agree.

When: The graph of calls shows which layer made the input, through operators that rearrange or act
by element, and its channels lie on another axis than 1: a warning. Where that is not known and
the input has three axes: information if the means along another axis hold ten times as large a
share of the variance as those along axis 1, and at least a fifth; standardized inputs show nothing.

Cure: Move the channels to axis 1 before the layer and back behind it, and let it have as many
features as there are channels.

Code: y = norm(x.movedim(-1, 1)).movedim(1, -1)

Source: torch.nn.BatchNorm1d's documentation: input (N, C) or (N, C, L).
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN305",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    for layer, data in measured(evidence):
        axis = None if layer.usage is None else layer.usage.channel_axis
        if axis == 1 or not data.axis_shares or layer.state.num_features < 2:
            continue
        here, others = data.axis_shares[0], data.axis_shares[1:]
        largest = max(others)
        by_graph = axis is not None and axis > 0
        if not by_graph and not (len(others) == 1 and largest > max(10 * here, 0.2)):
            continue
        axis = axis if by_graph and axis else 2 + others.index(largest)
        there = data.axis_shares[axis - 1]
        yield rule.finding(
            layer,
            f"normalizes along axis 1, whose means hold {here:.1%} of the variance, while the "
            f"channels {'lie' if by_graph else 'seem to lie'} on axis {axis}, whose means hold "
            f"{there:.1%}",
            {
                "axis": axis,
                "share_of_axis_1": here,
                "share_of_that_axis": there,
                "features": layer.state.num_features,
            },
            severity=WARNING if by_graph else INFO,
        )
