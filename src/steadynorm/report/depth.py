"""Charts over the depth of a network: one place for each layer, in the model's order."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from steadynorm.report.charts import Row, specification
from steadynorm.report.page import Chart


def profile(
    title: str,
    rows: Sequence[Row],
    *,
    value: str,
    low: str,
    high: str,
    layer: str,
    series: str,
    order: Sequence[str],
    description: str,
    value_title: str,
    log: bool = False,
    reference: float | None = None,
) -> Chart:
    """For each `layer` a dot at `value` and a bar from `low` to `high`, coloured by `series`, whose
    names are `order`, from sound to broken: four at most. Far values do not flatten the
    near ones: beyond 10 the axis, where it is not `log`, goes in powers. `reference` draws a line
    across, where all is well.
    """
    largest = max((abs(row[end]) for row in rows for end in (low, high)), default=0.0)
    scale = alt.Scale(zero=False)
    if log:
        ends = [row[end] for row in rows for end in (low, high)]
        ends += [] if reference is None else [reference]
    if log and max(ends, default=1) > 4 * min(ends, default=1):
        # Not out to the next powers of ten, which would flatten what lies near 1.
        room = {"domainMin": min(ends) / 1.25, "domainMax": max(ends) * 1.25} if ends else {}
        scale = alt.Scale(type="log", nice=False, **room)
    elif largest > 10:
        scale.type = "symlog"
    names = [row[layer] for row in rows]
    across = alt.X(
        f"{layer}:N",
        sort=names,
        title="layer, from input to output",
        axis=alt.Axis(
            labelAngle=-40 if max(map(len, names), default=0) > 4 else 0,
            labelLimit=130,
            labelOverlap="greedy",
            grid=False,
        ),
    )
    present = [name for name in order if any(row[series] == name for row in rows)]
    legend = alt.Legend(symbolType="circle", symbolStrokeWidth=0, values=present)
    # "ordinal" is the page's own colours for such states.
    scale_of_states = alt.Scale(domain=list(order), range="ordinal")
    color = alt.Color(f"{series}:N", scale=scale_of_states, legend=legend)
    tooltip = [alt.Tooltip(f"{layer}:N"), alt.Tooltip(f"{series}:N", title="state")] + [
        alt.Tooltip(f"{name}:Q", format=".4g") for name in (low, value, high)
    ]
    base = alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
    bar = base.mark_rule(strokeWidth=4, strokeCap="round", opacity=0.45).encode(
        x=across,
        y=alt.Y(f"{low}:Q", title=value_title, scale=scale),
        y2=f"{high}:Q",
        color=color,
        tooltip=tooltip,
    )
    dot = base.mark_circle(size=60, opacity=1).encode(
        x=across,
        y=alt.Y(f"{value}:Q", title=value_title, scale=scale),
        color=color,
        tooltip=tooltip,
    )
    parts = [bar, dot]
    if reference is not None:
        line = alt.Chart(alt.InlineData(values=[{"reference": reference}]))
        parts.insert(0, line.mark_rule(strokeDash=[4, 4]).encode(y="reference:Q"))
    chart = alt.layer(*parts).properties(width="container", height=230)
    return Chart(title, specification(chart, description), description, wide=True)


def channels(
    title: str,
    rows: Sequence[Row],
    *,
    layers: Sequence[str],
    chosen: str,
    order: Sequence[str],
    description: str,
) -> Chart:
    """The channels of one layer at a time, to be chosen from `layers`: for each channel and each
    `source` in `order` a dot at `mean` and a bar from `low` to `high`.

    `rows` hold layer, channel, rank (which orders the channels), source, mean, low and high.
    """
    choice = alt.param(
        name="chosen_layer",
        value=chosen,
        bind=alt.binding_select(options=list(layers), name="Layer"),
    )
    # Two channels may not share a place, and a name must not be read as an expression.
    base = (
        alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
        .transform_filter("datum.layer === chosen_layer")
        .encode(
            x=alt.X(
                "channel:O",
                sort=alt.SortField("rank"),
                title="channel, the furthest off first",
                axis=alt.Axis(labelAngle=0, labelOverlap="greedy", grid=False),
            ),
            xOffset=alt.XOffset("source:N", sort=list(order), scale=alt.Scale(domain=list(order))),
            color=alt.Color(
                "source:N",
                scale=alt.Scale(domain=list(order)),
                legend=alt.Legend(symbolType="circle", symbolStrokeWidth=0),
            ),
            tooltip=[
                alt.Tooltip("channel:O"),
                alt.Tooltip("source:N"),
                *(alt.Tooltip(f"{n}:Q", format=".4g") for n in ("mean", "low", "high")),
            ],
        )
    )
    bar = base.mark_rule(strokeWidth=3, strokeCap="round", opacity=0.55).encode(
        y=alt.Y("low:Q", title="mean ± one standard deviation", scale=alt.Scale(zero=False)),
        y2="high:Q",
    )
    dot = base.mark_circle(size=48, opacity=1).encode(
        y=alt.Y("mean:Q", scale=alt.Scale(zero=False))
    )
    chart = alt.layer(bar, dot).add_params(choice).properties(width="container", height=260)
    return Chart(title, specification(chart, description), description, wide=True)


def heat(
    title: str,
    rows: Sequence[Row],
    *,
    x: str,
    value: str,
    layer: str,
    layers: Sequence[str],
    description: str,
    x_title: str,
    value_title: str,
    log: bool = False,
) -> Chart:
    """Colour for each of `layers` (downwards) at each `x`; brighter is more of `value`."""
    places = sorted({row[x] for row in rows})
    chart = (
        alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))
        .mark_rect()
        .encode(
            x=alt.X(
                f"{x}:O",
                title=x_title,
                axis=alt.Axis(
                    labelAngle=0,
                    labelOverlap="greedy",
                    grid=False,
                    format=",d",
                    values=places[:: max(1, len(places) // 8)],
                ),
            ),
            y=alt.Y(
                f"{layer}:N",
                sort=list(layers),
                title=None,
                axis=alt.Axis(labelLimit=150, labelOverlap="greedy", grid=False),
            ),
            color=alt.Color(
                f"{value}:Q",
                scale=alt.Scale(type="log" if log else "linear", scheme="viridis"),
                legend=alt.Legend(
                    title=value_title, gradientLength=180, gradientThickness=10, tickCount=4
                ),
            ),
            tooltip=[
                alt.Tooltip(f"{layer}:N"),
                alt.Tooltip(f"{x}:Q", title=x_title, format=","),
                alt.Tooltip(f"{value}:Q", title=value_title, format=".4g"),
            ],
        )
        .properties(width="container", height=max(110, min(16 * len(layers), 480)))
    )
    return Chart(title, specification(chart, description), description, wide=True)
