"""A monitored run as sections of the page: how each layer fared, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steadynorm.doctor.evidence.training import Reading, TrainingRun
from steadynorm.doctor.report.groups import named, plural
from steadynorm.report.page import Chart, Section, Table

FEW = 7  # layers that lines can tell apart
COLUMNS = 100  # steps that fit side by side

FIGURES = (
    ("shift", "Batch mean against running mean", "standard deviations apart", False,
     "Root mean square over channels, in running standard deviations. What single batches scatter "
     "stays; what remains above it is lag."),
    ("ratio", "Batch standard deviation over the running one", "ratio", True,
     "Geometric mean over channels. At 1 inference normalizes with what the batches have."),
    ("gradient", "Gradient that reaches the layer", "norm", True,
     "Norm of the loss's gradient for the layer's output."),
    ("dead", "Channels nowhere above 0", "share of channels", False,
     "In one batch; nothing of them passes a ReLU."),
    ("saturated", "Outputs where a sigmoid is flat", "share of outputs", False,
     "Beyond ±4.36, where its slope is below a twentieth of its largest."),
)  # fmt: skip


def run_sections(run: TrainingRun, *, draw: bool) -> list[Section]:
    """Charts over the steps, one for each figure that ever showed anything, and the last readings
    as a table.
    """
    steps = sorted({reading.step for reading in run.readings})
    shown = set(steps[:: max(1, math.ceil(len(steps) / COLUMNS))])
    readings = [reading for reading in run.readings if reading.step in shown]
    figures = FIGURES if draw else ()
    charts = [chart for figure in figures if (chart := _chart(run, readings, *figure))]
    every = f"one in {run.every} read" if run.every > 1 else "all of them read"
    told = f"{plural(run.steps, 'training step')}, {every}, before the step's own update."
    return [
        Section("Over the run", [told], charts=charts),
        Section("The last reading", tables=[_table(run)]),
    ]


def _chart(
    run: TrainingRun,
    readings: Sequence[Reading],
    name: str,
    title: str,
    unit: str,
    log: bool,
    told: str,
) -> Chart | None:
    from steadynorm.doctor.report.charts import heat
    from steadynorm.report.charts import lines

    values = [(r, float(getattr(r, name))) for r in readings]
    rows = [
        {"step": r.step, "layer": named(r.layer), name: float(f"{value:.4g}")}
        for r, value in values
        if math.isfinite(value) and (value > 0 or not log)
    ]
    least = 0.05 if unit.startswith("share") else 0.0  # fewer is nothing to draw
    if not any(value > least for _, value in values):
        return None
    layers = [named(layer) for layer in run.layers]
    if len(layers) > FEW:
        return heat(title, rows, value=name, layers=layers, log=log, value_title=unit,
                    description=f"{told} Layers from input to output, downwards.")  # fmt: skip
    return lines(title, rows, x="step", y=name, series="layer", order=layers, log_y=log,
                 y_title=unit, description=told)  # fmt: skip


def _table(run: TrainingRun) -> Table:
    last = {reading.layer: reading for reading in run.readings}
    rows = []
    for layer in run.layers:
        if layer not in last:
            continue
        reading = last[layer]
        bad = len({r.step for r in run.readings if r.layer == layer and r.nonfinite})
        figures = (reading.shift, reading.ratio, reading.divergence, reading.gradient)
        shares = (reading.dead, reading.saturated)
        rows.append(
            (
                named(layer),
                *(None if math.isnan(value) else f"{value:.3g}" for value in figures),
                *(None if math.isnan(value) else f"{value:.0%}" for value in shares),
                bad,
            )
        )
    step = max((reading.step for reading in run.readings), default=0)
    return Table(
        f"Step {step:,}",
        ("layer", "mean apart", "std ratio", "divergence, nats", "gradient", "dead", "saturated",
         "steps not finite"),
        rows,
    )  # fmt: skip
