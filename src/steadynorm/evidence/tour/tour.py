"""Runs the stops and writes what they show."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steadynorm.evidence.lab import jobs
from steadynorm.evidence.lab.data import load
from steadynorm.evidence.tour.stop import Setting, Stop, StopResult
from steadynorm.files import replace_file
from steadynorm.report.machine import processor
from steadynorm.report.page import Page, Section


@dataclass(frozen=True)
class Tour:
    """A finished tour: what every stop showed, on which data, and where and how long it ran."""

    setting: Setting
    data: str
    results: Sequence[tuple[Stop, StopResult]]
    machine: dict[str, str]

    def page(self) -> Page:
        """The whole tour as one page."""
        return Page(
            "A tour of batch normalization",
            [
                Section(
                    stop.title,
                    [result.sentence, *result.text],
                    result.tables,
                    result.charts,
                    result.cards,
                )
                for stop, result in self.results
            ],
            lead=f"Small networks trained on real handwritten digits ({self.data}).",
            details=[*self.machine.items(), ("seeds", ", ".join(map(str, self.setting.seeds)))],
        )

    def record(self) -> dict[str, Any]:
        """Everything as plain dicts and lists. All but "machine" and times is the same for the same
        seeds, on the same processor with the same versions.
        """
        return {
            "data": self.data,
            "seeds": list(self.setting.seeds),
            "short": self.setting.short,
            "machine": self.machine,
            "stops": {
                stop.name: {
                    "title": stop.title,
                    "sentence": result.sentence,
                    "tables": [
                        {
                            "title": table.title,
                            "columns": list(table.columns),
                            "rows": [list(row) for row in table.rows],
                            "note": table.note,
                        }
                        for table in result.tables
                    ],
                    **result.figures,
                }
                for stop, result in self.results
            },
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `report.html` and `report.json`, each whole or not at all; returns their paths."""
        page = self.page().html()
        record = json.dumps(self.record(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        return (
            replace_file(folder / "report.html", page),
            replace_file(folder / "report.json", record),
        )


def run(
    stops: Sequence[Stop],
    setting: Setting,
    *,
    workers: int | None = None,
    begin: Callable[[Stop, int], None] | None = None,
    progress: jobs.Progress | None = None,
) -> Tour:
    """Visit the stops, their runs spread over the cores, the timed ones last and alone. `begin` is
    told of every stop and the steps it will take, `progress` of the steps done.
    """
    started = time.perf_counter()
    data = str(load(setting.data_dir))
    planned = {stop.name: list(stop.jobs(setting)) for stop in stops}
    outcomes: dict[str, dict[tuple[Any, ...], Any]] = {stop.name: {} for stop in stops}
    if begin is not None:
        for stop in stops:
            begin(stop, sum(job.steps for job in planned[stop.name]))
    every = [job for stop in stops for job in planned[stop.name]]
    for job, outcome in jobs.run(every, workers=workers, progress=progress):
        outcomes[job.group][job.key] = outcome
    results = [(stop, stop.result(setting, outcomes[stop.name])) for stop in stops]
    return Tour(setting, data, results, machine(time.perf_counter() - started))


def machine(seconds: float) -> dict[str, str]:
    """Where and when it ran, for whoever compares figures."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s",
        "processor": f"{processor()}, {jobs.cores()} cores",
        "versions": f"steadynorm {_version('steadynorm')}, torch {_version('torch')}, "
        f"Python {platform.python_version()}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "from source"
