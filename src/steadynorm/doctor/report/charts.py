"""Charts of the layers: running statistics against the data, over the depth of the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt
import numpy as np

from steadynorm.doctor.evidence.divergence import EPS, Divergence, divergence
from steadynorm.doctor.evidence.records import Evidence, NormEvidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.report.groups import named
from steadynorm.report.charts import Row, base_of, finished, numbers, reference_line
from steadynorm.report.page import Chart

SHOWN = 24  # channels of a layer that fit side by side
ROWS = 6_000  # in one chart: what a page can carry and a browser draws at once
STATES = {None: "no finding", Severity.INFO: "remark", Severity.WARNING: "warning",
          Severity.ERROR: "error"}  # fmt: skip
SOURCES = ["running", "data"]


def compared(layer: NormEvidence) -> Divergence | None:
    """Running statistics against the data's; None where a side is missing or not finite."""
    state, data = layer.state, layer.data
    if data is None or state.running_mean is None or state.running_var is None:
        return None
    parts = (state.running_mean, state.running_var, data.mean, data.var)
    if not all(np.all(np.isfinite(part)) for part in parts):
        return None
    return divergence(*parts, eps=state.eps or EPS)


def layer_charts(evidence: Evidence, findings: Iterable[Finding]) -> list[Chart]:
    """How far running statistics lie from the data; without data, what the layers keep."""
    worst: dict[str, Severity] = {}
    for finding in findings:
        worst[finding.layer] = max(finding.severity, worst.get(finding.layer, Severity.INFO))
    against = [(layer, found) for layer in evidence.layers if (found := compared(layer))]
    if not against:
        return _kept(evidence.layers, worst)
    shifts = [(layer, found.shift) for layer, found in against]
    ratios = [(layer, found.ratio) for layer, found in against]
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
    *,
    description: str,
    value_title: str,
    log: bool = False,
    reference: float | None = None,
) -> Chart:
    """For each layer a dot at the median channel and a bar over the middle 80 %, coloured by its
    worst finding. Where a value exceeds 10, an axis that is not `log` is "symlog", so that far
    values do not flatten the near ones. `reference` draws a line across, where all is well.
    """
    rows: list[dict[str, Any]] = []
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
    ends = [row[end] for row in rows for end in ("10 %", "90 %")]
    scale = alt.Scale(zero=False)
    drawn = ends if reference is None else [*ends, reference]
    if log and max(drawn) > 4 * min(drawn):
        # Not out to the next powers of ten, which would flatten what lies near 1.
        scale = alt.Scale(
            type="log", nice=False, domainMin=min(drawn) / 1.25, domainMax=max(drawn) * 1.25
        )
    elif max(map(abs, ends)) > 10:
        scale.type = "symlog"
    names = [named(layer) for layer, _ in values]
    states = list(STATES.values())
    present = [name for name in states if any(row["state"] == name for row in rows)]
    base = base_of(rows).encode(
        x=alt.X(
            "layer:N", sort=names, title="layer, from input to output",
            axis=alt.Axis(
                labelAngle=-40 if max(map(len, names)) > 4 else 0, labelLimit=130,
                labelOverlap="greedy", grid=False,
            ),
        ),
        color=alt.Color(
            "state:N",
            scale=alt.Scale(domain=states, range="ordinal"),  # the page's colours of states
            legend=alt.Legend(symbolType="circle", symbolStrokeWidth=0, values=present),
        ),
        tooltip=[
            alt.Tooltip("layer:N"), alt.Tooltip("state:N", title="state"),
            *numbers("10 %", "median", "90 %", form=".4g"),
        ],
    )  # fmt: skip

    def upwards(name: str) -> Any:
        return alt.Y(f"{name}:Q", title=value_title, scale=scale)

    bar = base.mark_rule(strokeWidth=4, strokeCap="round", opacity=0.45)
    dot = base.mark_circle(size=60, opacity=1)
    parts = [bar.encode(y=upwards("10 %"), y2="90 %:Q"), dot.encode(y=upwards("median"))]
    chart = alt.layer(*reference_line("y", reference), *parts)
    return finished(title, chart, description, height=230, wide=True)


def _channels(against: Sequence[tuple[NormEvidence, Divergence]]) -> Chart:
    """The channels that are furthest off, of one layer at a time, to be chosen: for each a dot at
    the mean and a bar over one standard deviation, as the layer keeps it and as the data have it.
    """
    shown = max(4, min(SHOWN, ROWS // (2 * len(against))))
    rows = []
    for layer, found in against:
        for rank, channel in enumerate(np.argsort(-found.kl, kind="stable")[:shown]):
            for source, (mean, var) in zip(SOURCES, _statistics(layer), strict=True):
                std = np.sqrt(max(var[channel], 0) + (layer.state.eps or EPS))
                rows.append(
                    {
                        "layer": named(layer),
                        "channel": int(channel),
                        "rank": rank,
                        "source": source,
                        "mean": _short(mean[channel]),
                        "low": _short(mean[channel] - std),
                        "high": _short(mean[channel] + std),
                    }
                )
    layers = [named(layer) for layer, _ in against]
    furthest, _ = max(against, key=lambda pair: float(pair[1].kl.max(initial=0)))
    choice = alt.param(
        name="chosen_layer", value=named(furthest),
        bind=alt.binding_select(options=layers, name="Layer"),
    )  # fmt: skip
    domain = alt.Scale(domain=SOURCES)
    # Two channels may not share a place, and a name must not be read as an expression.
    base = base_of(rows).transform_filter("datum.layer === chosen_layer").encode(
        x=alt.X(
            "channel:O", sort=alt.SortField("rank"), title="channel, the furthest off first",
            axis=alt.Axis(labelAngle=0, labelOverlap="greedy", grid=False),
        ),
        xOffset=alt.XOffset("source:N", sort=SOURCES, scale=domain),
        color=alt.Color(
            "source:N", scale=domain, legend=alt.Legend(symbolType="circle", symbolStrokeWidth=0)
        ),
        tooltip=[
            alt.Tooltip("channel:O"), alt.Tooltip("source:N"),
            *numbers("mean", "low", "high", form=".4g"),
        ],
    )  # fmt: skip
    scale = alt.Scale(zero=False)
    bar = base.mark_rule(strokeWidth=3, strokeCap="round", opacity=0.55).encode(
        y=alt.Y("low:Q", title="mean ± one standard deviation", scale=scale), y2="high:Q"
    )
    dot = base.mark_circle(size=48, opacity=1).encode(y=alt.Y("mean:Q", scale=scale))
    description = (
        f"Mean and standard deviation that the layer keeps (running) and that the data have, for "
        f"up to {shown} channels that lie furthest apart."
    )
    chart = alt.layer(bar, dot).add_params(choice)
    return finished("Channel by channel", chart, description, height=260, wide=True)


def _statistics(layer: NormEvidence) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Mean and variance, by `SOURCES`."""
    assert layer.data is not None
    return (layer.state.running_mean, layer.state.running_var), (layer.data.mean, layer.data.var)


def heat(
    title: str,
    rows: Sequence[Row],
    *,
    value: str,
    layers: Sequence[str],
    description: str,
    value_title: str,
    log: bool,
) -> Chart:
    """Colour for each of `layers` (downwards) at each step; brighter is more of `value`."""
    steps = sorted({row["step"] for row in rows})
    across = alt.Axis(
        labelAngle=0, labelOverlap="greedy", grid=False, format=",d",
        values=steps[:: max(1, len(steps) // 8)],
    )  # fmt: skip
    down = alt.Axis(labelLimit=150, labelOverlap="greedy", grid=False)
    chart = base_of(rows).mark_rect().encode(
        x=alt.X("step:O", title="step", axis=across),
        y=alt.Y("layer:N", sort=list(layers), title=None, axis=down),
        color=alt.Color(
            f"{value}:Q",
            scale=alt.Scale(type="log" if log else "linear", scheme="viridis"),
            legend=alt.Legend(
                title=value_title, gradientLength=180, gradientThickness=10, tickCount=4
            ),
        ),
        tooltip=[
            alt.Tooltip("layer:N"),
            alt.Tooltip("step:Q", title="step", format=","),
            alt.Tooltip(f"{value}:Q", title=value_title, format=".4g"),
        ],
    )  # fmt: skip
    height = max(110, min(16 * len(layers), 480))
    return finished(title, chart, description, height=height, wide=True)


def _short(value: float) -> float:
    """Four digits: what a chart can show, at a third of the page's size."""
    return float(f"{value:.4g}")
