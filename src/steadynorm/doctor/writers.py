"""Where a monitor's readings go: TensorBoard, a CSV file, a function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from math import isnan
from pathlib import Path
from typing import Any, Protocol

from steadynorm.doctor.evidence.training import Reading

FIGURES = ("shift", "ratio", "divergence", "dead", "saturated", "gradient", "nonfinite")


class Sink(Protocol):
    """Takes readings one by one."""

    def write(self, reading: Reading) -> None:
        """Take one."""

    def close(self) -> None:
        """No more will come."""


class Scalars:
    """To `writer.add_scalar("steadynorm/<layer>/<figure>", value, step)`; what is NaN is left out.

    The writer is somebody else's, and stays open.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, reading: Reading) -> None:
        """One scalar for each figure."""
        place = reading.layer or "model"
        for name in FIGURES:
            value = getattr(reading, name)
            if not isnan(value):
                self._writer.add_scalar(f"steadynorm/{place}/{name}", value, reading.step)

    def close(self) -> None:
        """Nothing to close."""


class Csv:
    """To a CSV file, a row for each reading, flushed, so that a run that ends badly leaves its
    readings. The file is made anew with the first reading.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._stream: Any = None

    def write(self, reading: Reading) -> None:
        """One row."""
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("w", newline="", encoding="utf-8")
            csv.writer(self._stream).writerow(Reading._fields)
        csv.writer(self._stream).writerow(
            "" if isinstance(part, float) and isnan(part) else part for part in reading
        )
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


class Call:
    """To a function, each reading as a dict."""

    def __init__(self, function: Callable[[dict[str, Any]], object]) -> None:
        self._function = function

    def write(self, reading: Reading) -> None:
        """One call."""
        self._function(reading._asdict())

    def close(self) -> None:
        """Nothing to close."""


def sinks_from(to: Any) -> list[Sink]:
    """What `monitor`'s argument means. Raises TypeError for what readings cannot be given to.

    >>> sinks_from(["a.csv", print])  # doctest: +ELLIPSIS
    [<...Csv object at ...>, <...Call object at ...>]
    """
    if to is None:
        return []
    if isinstance(to, str | Path):
        return [Csv(to)]
    if hasattr(to, "add_scalar"):
        return [Scalars(to)]
    if callable(to):
        return [Call(to)]
    if isinstance(to, Sequence):
        return [sink for part in to for sink in sinks_from(part)]
    raise TypeError(
        "monitor: `to` must be a SummaryWriter (anything with add_scalar), the path of a CSV file, "
        f"a function that takes a dict, or several of them; got {type(to)}."
    )
