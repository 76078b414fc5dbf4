"""Finished runs on disk, each written once and whole, and the results file made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steadynorm.evidence.lab.experiment import Experiment, PlannedRun, canonical
from steadynorm.evidence.lab.runs import FinishedRun, Profile, Result, Runs
from steadynorm.files import replace_file
from steadynorm.report.machine import processor

DIGITS = 6  # significant digits that a stored number keeps


class Store:
    """`folder/runs/NAME/KEY.json` for every run, `folder/results/NAME.json` for an experiment.

    The results of a timed experiment lie in `NAME.timed.json`: only these differ when everything is
    run again. `checksum`: of `data`, where the words do not say all.
    """

    def __init__(
        self, folder: str | Path, data: str, *, checksum: str = "", processes: int = 1
    ) -> None:
        self.folder = Path(folder)
        self.data = data
        self.checksum = checksum
        self.processes = processes

    def path(self, experiment: Experiment, run: PlannedRun) -> Path:
        """Where a run lies, or will lie."""
        key = run.key(experiment, self.data + self.checksum)
        return self.folder / "runs" / experiment.name / f"{key}.json"

    def results(self, experiment: Experiment) -> Path:
        """Where the results of an experiment lie, or will lie."""
        suffix = ".timed.json" if experiment.timed else ".json"
        return self.folder / "results" / f"{experiment.name}{suffix}"

    def has(self, experiment: Experiment, run: PlannedRun) -> bool:
        """Whether a run is finished: a run's file is written whole or not at all."""
        return self.path(experiment, run).is_file()

    def put(self, experiment: Experiment, run: PlannedRun, result: Result) -> None:
        """Store a finished run."""
        record = {
            "setting": dict(run.setting),
            "seed": run.seed,
            "result": plain(result),
            "made_with": made_with(self.processes),
        }
        replace_file(self.path(experiment, run), canonical(record) + "\n")

    def finish(
        self, experiment: Experiment, profile: Profile, planned: Sequence[PlannedRun]
    ) -> Path:
        """Write the results file, verdict included, from the stored runs; returns its path."""
        records = [json.loads(self.path(experiment, run).read_text("utf-8")) for run in planned]
        runs = _finished(records)
        head = {
            "experiment": experiment.name,
            "revision": experiment.revision,
            "profile": profile,
            "data": self.data,
            "made_with": sorted({record["made_with"] for record in records}),
            **declaration(experiment),
            "verdict": plain(experiment.verdict(runs).record()),
        }
        return replace_file(self.results(experiment), _text(head, runs))


def declaration(experiment: Experiment) -> dict[str, Any]:
    """What an experiment says of itself."""
    fields = ("title", "claim", "source", "factors", "measure", "rule")
    return {name: getattr(experiment, name) for name in fields}


def read(path: str | Path) -> tuple[dict[str, Any], Runs]:
    """A results file: all but the runs as a dict, and the runs. Raises ValueError for another."""
    try:
        record = json.loads(Path(path).read_text("utf-8"))
        runs = _finished(record.pop("runs"))
        record["experiment"], record["verdict"], record["revision"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no results file of the lab ({error!r}).") from error
    return record, runs


def _finished(records: Sequence[Mapping[str, Any]]) -> Runs:
    return Runs(FinishedRun(row["setting"], row["seed"], row["result"]) for row in records)


def made_with(processes: int = 1) -> str:
    """What results depend on besides settings, seeds and data."""
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


def _text(head: Mapping[str, Any], runs: Runs) -> str:
    """JSON with one run on a line."""
    start = json.dumps(head, indent=1, ensure_ascii=False, allow_nan=False)
    rows = ({"setting": run.setting, "seed": run.seed, "result": run.result} for run in runs)
    lines = ",\n".join(f"  {canonical(row)}" for row in rows)
    return f'{start[:-2]},\n "runs": [\n{lines}\n ]\n}}\n'
