"""Charts over the depth of a network: one place for each layer, in the model's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from steadynorm.report.charts import Row, base_of, finished, numbers, reference_line
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
    names are `order`, from sound to broken: four at most. Where a value exceeds 10, an axis that is
    not `log` is "symlog", so that far values do not flatten the near ones. `reference` draws a line
    across, where all is well.
    """
    ends = [row[end] for row in rows for end in (low, high)]
    scale = alt.Scale(zero=False)
    drawn = ends if reference is None else [*ends, reference]
    if log and max(drawn, default=1) > 4 * min(drawn, default=1):
        # Not out to the next powers of ten, which would flatten what lies near 1.
        scale = alt.Scale(
            type="log", nice=False, domainMin=min(drawn) / 1.25, domainMax=max(drawn) * 1.25
        )
    elif max(map(abs, ends), default=0.0) > 10:
        scale.type = "symlog"
    names = [row[layer] for row in rows]
    present = [name for name in order if any(row[series] == name for row in rows)]
    base = base_of(rows).encode(
        x=alt.X(
            f"{layer}:N", sort=names, title="layer, from input to output",
            axis=alt.Axis(
                labelAngle=-40 if max(map(len, names), default=0) > 4 else 0, labelLimit=130,
                labelOverlap="greedy", grid=False,
            ),
        ),
        color=alt.Color(
            f"{series}:N",
            scale=alt.Scale(domain=list(order), range="ordinal"),  # the page's colours of states
            legend=alt.Legend(symbolType="circle", symbolStrokeWidth=0, values=present),
        ),
        tooltip=[
            alt.Tooltip(f"{layer}:N"), alt.Tooltip(f"{series}:N", title="state"),
            *numbers(low, value, high, form=".4g"),
        ],
    )  # fmt: skip

    def upwards(name: str) -> Any:
        return alt.Y(f"{name}:Q", title=value_title, scale=scale)

    bar = base.mark_rule(strokeWidth=4, strokeCap="round", opacity=0.45)
    dot = base.mark_circle(size=60, opacity=1)
    parts = [bar.encode(y=upwards(low), y2=f"{high}:Q"), dot.encode(y=upwards(value))]
    chart = alt.layer(*reference_line("y", reference), *parts)
    return finished(title, chart, description, height=230, wide=True)


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
    select = alt.binding_select(options=list(layers), name="Layer")
    choice = alt.param(name="chosen_layer", value=chosen, bind=select)
    domain = alt.Scale(domain=list(order))
    # Two channels may not share a place, and a name must not be read as an expression.
    base = base_of(rows).transform_filter("datum.layer === chosen_layer").encode(
        x=alt.X(
            "channel:O", sort=alt.SortField("rank"), title="channel, the furthest off first",
            axis=alt.Axis(labelAngle=0, labelOverlap="greedy", grid=False),
        ),
        xOffset=alt.XOffset("source:N", sort=list(order), scale=domain),
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
    chart = alt.layer(bar, dot).add_params(choice)
    return finished(title, chart, description, height=260, wide=True)


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
    across = alt.Axis(
        labelAngle=0, labelOverlap="greedy", grid=False, format=",d",
        values=places[:: max(1, len(places) // 8)],
    )  # fmt: skip
    down = alt.Axis(labelLimit=150, labelOverlap="greedy", grid=False)
    chart = base_of(rows).mark_rect().encode(
        x=alt.X(f"{x}:O", title=x_title, axis=across),
        y=alt.Y(f"{layer}:N", sort=list(layers), title=None, axis=down),
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
    )  # fmt: skip
    height = max(110, min(16 * len(layers), 480))
    return finished(title, chart, description, height=height, wide=True)
