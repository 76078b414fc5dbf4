"""Tables and chart rows that many experiments need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from steadynorm.evidence.lab.experiment import Run, Runs
from steadynorm.evidence.lab.runs import interval
from steadynorm.report.page import Table

Value = Callable[[Run], float | None]
"""A run's figure; None where it has none."""


def table(
    title: str,
    runs: Runs,
    *,
    rows: str,
    columns: str,
    value: Value,
    names: Mapping[Any, str] | None = None,
    corner: str | None = None,
    note: str = "",
) -> Table:
    """Mean over the seeds ± half the 95 % interval, a row and a column for each value of two
    factors. `names`: how factors' values are called. A dash where a run had no figure.
    """
    called = names or {}
    across = runs.distinct(columns)
    body = []
    for down in runs.distinct(rows):
        cells = [called.get(down, str(down))]
        for column in across:
            found = [value(run) for run in runs.where(**{rows: down, columns: column})]
            known = [one for one in found if one is not None]
            cells.append(str(interval(known)) if known and len(known) == len(found) else "–")
        body.append(cells)
    head = [corner or rows, *(called.get(column, str(column)) for column in across)]
    return Table(title, head, body, note=note)


def scaled(name: str, factor: float = 1.0) -> Value:
    """A run's measure times a factor."""
    return lambda run: None if run[name] is None else factor * run[name]


def curves(
    runs: Iterable[Run], x: str, y: str, series: Callable[[Run], str], *, every: int = 1
) -> list[dict[str, Any]]:
    """Rows for `steadynorm.report.charts.lines` from runs that hold lists `x` and `y`."""
    return [
        {"series": series(run), "seed": run.seed, x: at, y: value}
        for run in runs
        for at, value in list(zip(run[x], run[y], strict=True))[::every]
        if value is not None
    ]


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
