"""Charts of the layers: running statistics against the data, over the depth of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from steadynorm.doctor.evidence.records import Evidence, NormEvidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.report.groups import named
from steadynorm.report.depth import channels, profile
from steadynorm.report.page import Chart

SHOWN = 24  # channels of a layer that fit side by side
ROWS = 6_000  # in one chart: what a page can carry and a browser draws at once
STATES = {None: "no finding", Severity.INFO: "remark", Severity.WARNING: "warning",
          Severity.ERROR: "error"}  # fmt: skip


class Compared(NamedTuple):
    """Statistics of a layer by channel: those it keeps against those of the data.

    `shift`: running mean minus the data's, in the data's standard deviations. `ratio`: running
    standard deviation over the data's.
    """

    layer: NormEvidence
    mean: np.ndarray
    std: np.ndarray
    running_mean: np.ndarray
    running_std: np.ndarray
    shift: np.ndarray
    ratio: np.ndarray


def compared(layer: NormEvidence) -> Compared | None:
    """None where a side is missing or not finite."""
    state, data = layer.state, layer.data
    if data is None or state.running_mean is None or state.running_var is None:
        return None
    parts = (data.mean, data.var, state.running_mean, state.running_var)
    if not all(np.all(np.isfinite(part)) for part in parts):
        return None
    eps, tiny = state.eps or 0.0, np.finfo(float).tiny
    std, running = (np.sqrt(np.maximum(v + eps, tiny)) for v in (data.var, state.running_var))
    shift = (state.running_mean - data.mean) / std
    return Compared(layer, data.mean, std, state.running_mean, running, shift, running / std)


def layer_charts(evidence: Evidence, findings: Iterable[Finding]) -> list[Chart]:
    """How far running statistics lie from the data; without data, what the layers keep."""
    worst: dict[str, Severity] = {}
    for finding in findings:
        worst[finding.layer] = max(finding.severity, worst.get(finding.layer, Severity.INFO))
    against = [found for layer in evidence.layers if (found := compared(layer)) is not None]
    if not against:
        return _kept(evidence.layers, worst)
    shifts = [(c.layer, c.shift) for c in against]
    ratios = [(c.layer, c.ratio) for c in against]
    return [
        _profile(
            "Running mean minus the data's, over depth", shifts, worst, reference=0.0,
            value_title="in standard deviations",
            description="For each layer the median channel, and a bar over the middle 80 % of its "
            "channels. On the line at 0 the running mean is right.",
        ),
        _profile(
            "Running standard deviation over the data's, over depth", ratios, worst, log=True,
            reference=1.0, value_title="ratio",
            description="For each layer the median channel, and a bar over the middle 80 % of its "
            "channels. At 1 the running variance is right; above it inference shrinks what "
            "training saw.",
        ),
        _channels(against),
    ]  # fmt: skip


def _kept(layers: Sequence[NormEvidence], worst: dict[str, Severity]) -> list[Chart]:
    stds, weights = [], []
    for layer in layers:
        var, weight = layer.state.running_var, layer.state.weight
        if var is not None and np.all(np.isfinite(var)) and np.all(var > 0):
            stds.append((layer, np.sqrt(var)))
        if weight is not None and np.all(np.isfinite(weight)):
            weights.append((layer, np.abs(weight)))
    told = "For each layer the median channel, and a bar over the middle 80 % of its channels."
    charts = []
    if stds:
        title = "Running standard deviation, over depth"
        charts.append(
            _profile(title, stds, worst, log=True, value_title="√running_var", description=told)
        )
    if weights:
        title = "Scale, over depth"
        charts.append(_profile(title, weights, worst, value_title="|weight|", description=told))
    return charts


def _profile(
    title: str,
    values: Sequence[tuple[NormEvidence, np.ndarray]],
    worst: dict[str, Severity],
    **settings: Any,
) -> Chart:
    rows = []
    for layer, array in values:
        low, middle, high = np.percentile(array, [10, 50, 90]) if array.size else (0.0, 0.0, 0.0)
        rows.append(
            {
                "layer": named(layer),
                "10 %": _short(low),
                "median": _short(middle),
                "90 %": _short(high),
                "state": STATES[worst.get(layer.name)],
            }
        )
    return profile(
        title, rows, value="median", low="10 %", high="90 %", layer="layer", series="state",
        order=list(STATES.values()), **settings,
    )  # fmt: skip


def _channels(against: Sequence[Compared]) -> Chart:
    """The channels that are furthest off, layer by layer."""
    shown = max(4, min(SHOWN, ROWS // (2 * len(against))))
    rows = []
    distances = {named(c.layer): float(_distance(c).max(initial=0)) for c in against}
    for c in against:
        furthest = np.argsort(-_distance(c), kind="stable")[:shown]
        for rank, channel in enumerate(furthest):
            for source, mean, std in (
                ("running", c.running_mean[channel], c.running_std[channel]),
                ("data", c.mean[channel], c.std[channel]),
            ):
                rows.append(
                    {
                        "layer": named(c.layer),
                        "channel": int(channel),
                        "rank": rank,
                        "source": source,
                        "mean": _short(mean),
                        "low": _short(mean - std),
                        "high": _short(mean + std),
                    }
                )
    return channels(
        "Channel by channel",
        rows,
        layers=list(distances),
        chosen=max(distances, key=lambda name: distances[name]),
        order=("running", "data"),
        description=f"Mean and standard deviation that the layer keeps (running) and that the data "
        f"have, for up to {shown} channels that lie furthest apart.",
    )


def _distance(c: Compared) -> np.ndarray:
    """Kullback–Leibler divergence of the data's normal distribution from the running one's."""
    inverse = np.minimum(1 / c.ratio**2, 1e300)
    kl: np.ndarray = 0.5 * (inverse * (1 + c.shift**2) - 1 + np.log(c.ratio**2))
    return kl


def _short(value: float) -> float:
    """Four digits: what a chart can show, at a third of the page's size."""
    return float(f"{value:.4g}")
