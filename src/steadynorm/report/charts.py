"""The few kinds of chart that reports use, as Vega-Lite specifications made with altair.

Every chart is as wide as its place on the page, has tooltips, and a legend whose entries can be
clicked to single out a series. Colours come from the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from steadynorm.report.page import Chart

Row = Mapping[str, Any]


def lines(
    title: str,
    rows: Sequence[Row],
    *,
    x: str,
    y: str,
    series: str,
    description: str,
    x_title: str | None = None,
    y_title: str | None = None,
    log_y: bool = False,
    log_x: bool = False,
    percent: bool = False,
    replicate: str | None = None,
    y_max: float | None = None,
    order: Sequence[str] | None = None,
    highlight: str | None = None,
    height: int = 240,
) -> Chart:
    """Lines of `y` over `x`, one colour for each `series`.

    `order` lists the series, in the order of the legend; with the same list, a series has the same
    colour in every chart, also where others are missing. Without it, the order of appearance.
    `highlight` is a series to draw thicker.

    With `replicate` (a seed, say) the line is the mean over it and a band shows the full range.
    What lies above `y_max` is cut off.
    """
    present = list(dict.fromkeys(row[series] for row in rows))
    domain = alt.Scale(domain=present if order is None else list(order))
    legend = alt.Legend(values=present if order is None else [s for s in order if s in present])
    picked = alt.selection_point(fields=[series], bind="legend")
    scale = alt.Scale(type="log") if log_y else alt.Scale(zero=False)
    if y_max is not None and max(row[y] for row in rows) > y_max:
        scale.domainMax = y_max
    axis = alt.Axis(format=".0%") if percent else alt.Axis(tickCount=5 if log_y else 6)
    color = alt.Color(f"{series}:N", scale=domain, legend=legend)
    dash = alt.StrokeDash(f"{series}:N", scale=domain, legend=legend)
    width = alt.condition(alt.datum[series] == highlight, alt.value(4.0), alt.value(2.25))
    across = alt.X(f"{x}:Q", title=x_title or x)
    if log_x:
        across = across.scale(type="log", nice=False).axis(tickCount=6, format="~g")
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
    up = "mean" if replicate else None
    y_shown = alt.Y(f"{y}:Q", title=y_title or y, scale=scale, axis=axis)
    line = base.mark_line(clip=True).encode(
        x=across,
        y=y_shown if up is None else y_shown.aggregate("mean"),
        color=color,
        strokeDash=dash,
        strokeWidth=width,
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.12)),
    )
    shown = ".1%" if percent else ".4g"
    dots = base.mark_circle(size=90, clip=True).encode(
        x=across,
        y=y_shown if up is None else y_shown.aggregate("mean"),
        color=color,
        opacity=alt.condition(picked, alt.value(0.001), alt.value(0.0)),
        tooltip=[
            alt.Tooltip(f"{series}:N"),
            alt.Tooltip(f"{x}:Q", title=x_title or x, format=","),
            alt.Tooltip(f"{'mean(' + y + ')' if up else y}:Q", title=y_title or y, format=shown),
        ],
    )
    layers: list[Any] = [line, dots]
    if replicate:
        band = base.mark_area(opacity=1.0, clip=True).encode(
            x=across,
            y=alt.Y(f"min({y}):Q", title=y_title or y, scale=scale, axis=axis),
            y2=alt.Y2(f"max({y}):Q"),
            color=color,
            opacity=alt.condition(picked, alt.value(0.15), alt.value(0.02)),
        )
        layers.insert(0, band)
    chart = alt.layer(*layers).add_params(picked).properties(width="container", height=height)
    return Chart(title, specification(chart, description), description)


def intervals(
    title: str,
    rows: Sequence[Row],
    *,
    value: str,
    low: str,
    high: str,
    label: str,
    description: str,
    series: str | None = None,
    value_title: str | None = None,
    log: bool = False,
    zero: bool = False,
    wide: bool = False,
    reference: float | None = None,
) -> Chart:
    """A dot for `value` with a bar from `low` to `high`, one line for each `label`, coloured by
    `series` and set side by side within a label. `reference` draws a line across.
    """
    labels = list(dict.fromkeys(row[label] for row in rows))
    across = alt.Scale(type="log") if log else alt.Scale(zero=zero)
    encode: dict[str, Any] = {
        "y": alt.Y(f"{label}:N", sort=labels, title=None, axis=alt.Axis(grid=False, labelLimit=150))
    }
    params: list[Any] = []
    count = 1
    opacity: Any = alt.value(1.0)
    if series is not None:
        order = list(dict.fromkeys(row[series] for row in rows))
        count = len(order)
        picked = alt.selection_point(fields=[series], bind="legend")
        params.append(picked)
        domain = alt.Scale(domain=order)
        encode["color"] = alt.Color(
            f"{series}:N", sort=order, scale=domain, legend=alt.Legend(symbolType="circle")
        )
        encode["yOffset"] = alt.YOffset(f"{series}:N", sort=order, scale=domain)
        opacity = alt.condition(picked, alt.value(1.0), alt.value(0.12))
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
    names = [label] + ([series] if series else [])
    tooltip = [alt.Tooltip(f"{name}:N") for name in names] + [
        alt.Tooltip(f"{name}:Q", format=".3g") for name in (low, value, high)
    ]
    bar = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X(f"{low}:Q", title=value_title or value, scale=across),
        x2=f"{high}:Q",
        tooltip=tooltip,
        opacity=opacity,
        **encode,
    )
    dot = base.mark_circle(size=70, opacity=1).encode(
        x=alt.X(f"{value}:Q", scale=across), tooltip=tooltip, opacity=opacity, **encode
    )
    layers: list[Any] = [bar, dot]
    if reference is not None:
        layers.insert(
            0,
            alt.Chart(alt.InlineData(values=[{"reference": reference}]))
            .mark_rule(strokeDash=[4, 4])
            .encode(x="reference:Q"),
        )
    chart = alt.layer(*layers)
    for param in params:
        chart = chart.add_params(param)
    height = max(len(labels) * (14 * count + 12), 90)
    chart = chart.properties(width="container", height=height)
    return Chart(title, specification(chart, description), description, wide)


def specification(chart: Any, description: str) -> dict[str, Any]:
    """What a `Chart` holds, from an altair chart."""
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)  # altair's default look; the page has its own
    spec["description"] = description
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec
