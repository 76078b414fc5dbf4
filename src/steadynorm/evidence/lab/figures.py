"""Tables and charts that many experiments show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steadynorm.evidence import estimates
from steadynorm.evidence.lab.runs import FinishedRun, Runs
from steadynorm.report.charts import lines
from steadynorm.report.page import Chart, Table

BAND = "Mean over the seeds; the band is their range."
AXES = {
    "step": "steps",
    "samples_seen": "digits seen",
    "batch": "batch size",
    "accuracy": "accuracy on the test digits",
}


def table(
    title: str,
    runs: Runs,
    *,
    rows: str,
    columns: str,
    measure: str,
    times: float = 1.0,
    names: Mapping[Any, str] | None = None,
    corner: str | None = None,
    note: str = "",
) -> Table:
    """Mean of a measure over the seeds ± half the 95 % interval, for each value of two factors.

    `times`: a factor on the measure. `names`: what to call the factors' values. A dash stands where
    a run has no figure.
    """
    called = names or {}
    across = runs.distinct(columns)
    body = []
    for down in runs.distinct(rows):
        cells = [called.get(down, str(down))]
        for column in across:
            found = [run[measure] for run in runs.where(**{rows: down, columns: column})]
            cells.append("–" if not found or None in found else plus_minus(found, times))
        body.append(cells)
    head = [corner or rows, *(called.get(column, str(column)) for column in across)]
    return Table(title, head, body, note=note)


def plus_minus(values: Iterable[float], times: float = 1.0) -> str:
    """The mean ± half the 95 % interval."""
    return estimates.mean(times * value for value in values).plus_minus


def chart(
    title: str,
    runs: Iterable[FinishedRun],
    *,
    x: str,
    y: str,
    series: str | Callable[[FinishedRun], str],
    names: Mapping[Any, str] | None = None,
    description: str = BAND,
    **options: Any,
) -> Chart:
    """Lines of `y` over `x`, mean and range over the seeds; both are numbers of a run, or lists.

    `series`: the factor that tells the lines apart, its values called by `names`, or a function of
    the run. `options` go to `report.charts.lines`. A `y` of None is left out; so are values that
    are not positive where the axis is logarithmic.
    """
    titles = {"x_title": AXES.get(x), "y_title": AXES.get(y), "percent": y == "accuracy"}
    key = series if isinstance(series, str) else "series"
    rows = []
    for run in runs:
        value = run[series] if isinstance(series, str) else series(run)
        name = (names or {}).get(value, value)
        xs, ys = (v if isinstance(v, list) else [v] for v in (run[x], run[y]))
        rows += [
            {key: name, "seed": run.seed, x: at, y: height}
            for at, height in zip(xs, ys, strict=True)
            if height is not None and (height > 0 or not options.get("log_y"))
        ]
    return lines(
        title, rows, x=x, y=y, series=key, replicate="seed", description=description,
        **(titles | options),
    )  # fmt: skip


def first_reaching(steps: Sequence[int], values: Sequence[float], target: float) -> int | None:
    """The first step at which a value is at least `target`, and still is at the next one.

    A single lucky moment does not count; the last value has no next one and may.

    >>> first_reaching([10, 20, 30, 40], [0.95, 0.5, 0.91, 0.93], target=0.9)
    30
    """
    for at, step in enumerate(steps):
        if min(values[at : at + 2]) >= target:
            return step
    return None


def sentences(parts: Sequence[str], separator: str = ". ") -> str:
    """The parts in one text, which starts with a capital and ends with a full stop."""
    text = separator.join(parts)
    return f"{text[0].upper()}{text[1:]}."
