"""The few kinds of chart that reports use, as Vega-Lite specifications made with altair.

Every chart is as wide as its place on the page and has tooltips; clicking an entry of the legend
singles out a series. Colours come from the page.
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

    `order` lists the series for the legend; with the same list a series has the same colour in all
    charts, even where others are missing. The default is the order of appearance. `highlight` is a
    series to draw thicker. With `replicate` (a seed, say) the line is the mean over it and a band
    shows the full range. What lies above `y_max` is cut off.
    """
    x_title, y_title = x_title or x, y_title or y
    present = list(dict.fromkeys(row[series] for row in rows))
    known = present if order is None else list(order)
    scale = alt.Scale(type="log") if log_y else alt.Scale(zero=False)
    if y_max is not None and max(row[y] for row in rows) > y_max:
        scale.domainMax = y_max
    axis = alt.Axis(format=".0%") if percent else alt.Axis(tickCount=5 if log_y else 6)
    across = alt.X(f"{x}:Q", title=x_title)
    if log_x:
        across = across.scale(type="log", nice=False).axis(tickCount=6, format="~g")
    upwards = alt.Y(f"{y}:Q", title=y_title, scale=scale, axis=axis)
    style: dict[str, Any] = {
        "scale": alt.Scale(domain=known),
        "legend": alt.Legend(values=[name for name in known if name in present]),
    }
    picked = alt.selection_point(fields=[series], bind="legend")

    def opacity(chosen: float, other: float) -> Any:
        return alt.condition(picked, alt.value(chosen), alt.value(other))

    base = base_of(rows).encode(x=across, color=alt.Color(f"{series}:N", **style))
    middle = base.encode(y=upwards.aggregate("mean") if replicate else upwards)
    line = middle.mark_line(clip=True).encode(
        strokeDash=alt.StrokeDash(f"{series}:N", **style),
        strokeWidth=alt.condition(
            alt.datum[series] == highlight, alt.value(4.0), alt.value(2.25)
        ),
        opacity=opacity(1.0, 0.12),
    )  # fmt: skip
    dots = middle.mark_circle(size=90, clip=True).encode(
        opacity=opacity(0.001, 0.0),
        tooltip=[
            alt.Tooltip(f"{series}:N"),
            alt.Tooltip(f"{x}:Q", title=x_title, format=","),
            alt.Tooltip(f"mean({y}):Q" if replicate else f"{y}:Q", title=y_title,
                        format=".1%" if percent else ".4g"),
        ],
    )  # fmt: skip
    layers = [line, dots]
    if replicate:
        low = alt.Y(f"min({y}):Q", title=y_title, scale=scale, axis=axis)
        band = base.mark_area(opacity=1.0, clip=True)
        layers.insert(0, band.encode(y=low, y2=f"max({y}):Q", opacity=opacity(0.15, 0.02)))
    return finished(title, alt.layer(*layers).add_params(picked), description, height=height)


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
    wide: bool = False,
    reference: float | None = None,
) -> Chart:
    """A dot for `value` with a bar from `low` to `high`, one line for each `label`, coloured by
    `series` and set side by side within a label. `reference` draws a line across.
    """
    labels = list(dict.fromkeys(row[label] for row in rows))
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    names = [label, series] if series else [label]
    base = base_of(rows).encode(
        y=alt.Y(f"{label}:N", sort=labels, title=None, axis=alt.Axis(grid=False, labelLimit=150)),
        tooltip=[*(alt.Tooltip(f"{name}:N") for name in names), *numbers(low, value, high)],
        opacity=alt.value(1.0),
    )
    count, params = 1, []
    if series is not None:
        order = list(dict.fromkeys(row[series] for row in rows))
        count = len(order)
        params = [alt.selection_point(fields=[series], bind="legend")]
        grouped: dict[str, Any] = {"sort": order, "scale": alt.Scale(domain=order)}
        base = base.encode(
            color=alt.Color(f"{series}:N", **grouped, legend=alt.Legend(symbolType="circle")),
            yOffset=alt.YOffset(f"{series}:N", **grouped),
            opacity=alt.condition(params[0], alt.value(1.0), alt.value(0.12)),
        )
    bar = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X(f"{low}:Q", title=value_title or value, scale=scale), x2=f"{high}:Q"
    )
    dot = base.mark_circle(size=70, opacity=1).encode(x=alt.X(f"{value}:Q", scale=scale))
    chart = alt.layer(*reference_line("x", reference), bar, dot).add_params(*params)
    height = max(len(labels) * (14 * count + 12), 90)
    return finished(title, chart, description, height=height, wide=wide)


def base_of(rows: Sequence[Row]) -> Any:
    """An altair chart of these rows."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def numbers(*names: str, form: str = ".3g") -> list[Any]:
    """Tooltips of numeric columns."""
    return [alt.Tooltip(f"{name}:Q", format=form) for name in names]


def reference_line(axis: str, value: float | None) -> list[Any]:
    """A dashed line at a value, if there is one."""
    if value is None:
        return []
    line = base_of([{"reference": value}]).mark_rule(strokeDash=[4, 4])
    return [line.encode(**{axis: "reference:Q"})]


def finished(title: str, chart: Any, description: str, *, height: int, wide: bool = False) -> Chart:
    """A `Chart` of the page from an altair chart."""
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict()
    spec.pop("config", None)  # altair's default look; the page has its own
    spec["description"] = description
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return Chart(title, spec, description, wide)
