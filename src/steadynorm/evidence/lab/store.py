"""Finished runs on disk, each written once and whole, and the results file made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steadynorm.evidence.lab.experiment import (
    Cell,
    Experiment,
    Profile,
    Result,
    Run,
    Runs,
    canonical,
)
from steadynorm.files import replace_file
from steadynorm.report.machine import processor

DIGITS = 6  # significant digits that a stored number keeps


class Store:
    """`folder/runs/NAME/KEY.json` for every run, `folder/results/NAME.json` for an experiment.

    The results of a timed experiment lie in `NAME.timed.json`: they alone differ when everything
    is run again.
    """

    def __init__(self, folder: str | Path, data: str, *, processes: int = 1) -> None:
        self.folder = Path(folder)
        self.data = data
        self.processes = processes

    def path(self, experiment: Experiment, cell: Cell) -> Path:
        """Where a run lies, or will lie."""
        return self.folder / "runs" / experiment.name / f"{cell.key(experiment, self.data)}.json"

    def has(self, experiment: Experiment, cell: Cell) -> bool:
        """Whether a run is finished: a run's file is written whole or not at all."""
        return self.path(experiment, cell).is_file()

    def put(self, experiment: Experiment, cell: Cell, result: Result) -> None:
        """Store a finished run."""
        record = {
            "setting": dict(cell.setting),
            "seed": cell.seed,
            "result": plain(result),
            "made_with": made_with(self.processes),
        }
        replace_file(self.path(experiment, cell), canonical(record) + "\n")

    def get(self, experiment: Experiment, cell: Cell) -> dict[str, Any]:
        """A finished run as it was stored."""
        record: dict[str, Any] = json.loads(self.path(experiment, cell).read_text("utf-8"))
        return record

    def finish(self, experiment: Experiment, profile: Profile, cells: Sequence[Cell]) -> Path:
        """Write the results file, verdict included, from the stored runs; returns its path."""
        records = [self.get(experiment, cell) for cell in cells]
        runs = Runs(Run(record["setting"], record["seed"], record["result"]) for record in records)
        head = {
            "experiment": experiment.name,
            "revision": experiment.revision,
            "profile": profile,
            "data": self.data,
            "made_with": sorted({record["made_with"] for record in records}),
            **declaration(experiment),
            "verdict": plain(experiment.verdict(runs).record()),
        }
        suffix = ".timed.json" if experiment.timed else ".json"
        path = self.folder / "results" / f"{experiment.name}{suffix}"
        return replace_file(path, _text(head, [_row(run) for run in runs]))


def declaration(experiment: Experiment) -> dict[str, Any]:
    """What an experiment says of itself."""
    return {
        "title": experiment.title,
        "claim": experiment.claim,
        "source": experiment.source,
        "factors": dict(experiment.factors),
        "measure": experiment.measure,
        "rule": experiment.rule,
    }


def read(path: str | Path) -> tuple[dict[str, Any], Runs]:
    """A results file: all but the runs as a dict, and the runs."""
    record = json.loads(Path(path).read_text("utf-8"))
    runs = Runs(Run(row["setting"], row["seed"], row["result"]) for row in record.pop("runs"))
    return record, runs


def made_with(processes: int = 1) -> str:
    """What figures depend on besides settings, seeds and data."""
    together = f", {processes} processes" if processes > 1 else ""
    return f"torch {version('torch')} on {processor()}{together}"


def plain(value: Any) -> Any:
    """`value` with numbers of `DIGITS` significant digits and None for those not finite.

    >>> plain({"loss": [1 / 3, float("nan")], "steps": 1234567})
    {'loss': [0.333333, None], 'steps': 1234567}
    """
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(
        f"plain: a result must hold dicts, lists, strings, numbers, booleans and None; "
        f"got {type(value).__name__}: {value!r}."
    )


def _row(run: Run) -> dict[str, Any]:
    return {"setting": run.setting, "seed": run.seed, "result": run.result}


def _text(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON with one run on a line."""
    start = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    lines = ",\n".join(f"  {canonical(row)}" for row in rows)
    return f'{start[:-2]},\n "runs": [\n{lines}\n ]\n}}\n'
