"""Where a monitor's readings go: TensorBoard, a CSV file, a function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from steadynorm.doctor.evidence.training import Reading

FIGURES = tuple(name for name in Reading._fields if name not in ("step", "layer"))

Writer = Callable[[Reading], None]


def scalars(board: Any) -> Writer:
    """To `board.add_scalar("steadynorm/<layer>/<figure>", value, step)`; NaN is left out."""

    def write(reading: Reading) -> None:
        for name in FIGURES:
            value = getattr(reading, name)
            if not isnan(value):
                tag = f"steadynorm/{reading.layer or 'model'}/{name}"
                board.add_scalar(tag, value, reading.step)

    return write


def csv_rows(path: Path) -> Writer:
    """To a CSV file, a row for each reading; the file is made anew with the first one.

    It is closed after each, so that a run that ends badly leaves its readings.
    """
    written = False

    def write(reading: Reading) -> None:
        nonlocal written
        if not written:
            path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if written else "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            if not written:
                rows.writerow(Reading._fields)
            rows.writerow("" if isinstance(v, float) and isnan(v) else v for v in reading)
        written = True

    return write


def writers(to: Any) -> list[Writer]:
    """What `monitor`'s argument means. Raises TypeError for what readings cannot be given to."""
    if to is None:
        return []
    if isinstance(to, str | Path):
        return [csv_rows(Path(to))]
    if hasattr(to, "add_scalar"):
        return [scalars(to)]
    if callable(to):
        return [lambda reading: to(reading._asdict())]
    if isinstance(to, Sequence):
        return [writer for part in to for writer in writers(part)]
    raise TypeError(
        "monitor: `to` must be a SummaryWriter (anything with add_scalar), the path of a CSV file, "
        f"a function that takes a dict, or several of them; got {type(to)}."
    )
