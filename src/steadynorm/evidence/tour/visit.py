"""Runs the demonstrations of the tour and writes what they show."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steadynorm import __version__
from steadynorm.evidence import workers as processes
from steadynorm.evidence.digits import load
from steadynorm.evidence.tour.demo import Demo, DemoResult, TourOptions
from steadynorm.files import json_text, replace_file
from steadynorm.report.machine import processor
from steadynorm.report.page import Page


@dataclass(frozen=True)
class Tour:
    """A finished tour: what every demonstration showed, on which data, where and for how long."""

    options: TourOptions
    data: str
    results: Sequence[tuple[Demo, DemoResult]]
    machine: dict[str, str]

    def page(self) -> Page:
        """The whole tour as one page."""
        return Page(
            "A tour of batch normalization",
            [shown for _, shown in self.results],
            lead=f"Small networks trained on real handwritten digits ({self.data}).",
            details=[*self.machine.items(), ("seeds", ", ".join(map(str, self.options.seeds)))],
        )

    def record(self) -> dict[str, Any]:
        """Everything as plain dicts and lists. All but "machine" and times is the same for the same
        seeds, on the same processor with the same versions.
        """
        return {
            "data": self.data,
            "seeds": list(self.options.seeds),
            "short": self.options.short,
            "machine": self.machine,
            "stops": {
                demo.name: {
                    "title": demo.title,
                    "sentence": shown.sentence,
                    "tables": [
                        {
                            "title": table.title,
                            "columns": list(table.columns),
                            "rows": [list(row) for row in table.rows],
                            "note": table.note,
                        }
                        for table in shown.tables
                    ],
                    **shown.figures,
                }
                for demo, shown in self.results
            },
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `report.html` and `report.json`, each whole or not at all; returns their paths."""
        page = self.page().html()
        record = json_text(self.record())
        return (
            replace_file(folder / "report.html", page),
            replace_file(folder / "report.json", record),
        )


def run(
    demos: Sequence[Demo],
    options: TourOptions,
    *,
    workers: int | None = None,
    begin: Callable[[Demo, int], None] | None = None,
    progress: processes.Progress | None = None,
) -> Tour:
    """Run the demonstrations, spread over the cores, the timed ones last and alone. `begin` is
    called with each of them and its steps, `progress` with its name and the steps done so far.
    """
    started = time.perf_counter()
    data = str(load(options.data_dir))
    planned: list[processes.Job] = []
    for demo in demos:
        own = demo.jobs(options)
        planned += own
        if begin is not None:
            begin(demo, sum(job.steps for job in own))
    outcomes: dict[str, dict[tuple[Any, ...], Any]] = {demo.name: {} for demo in demos}
    for job, outcome in processes.run(planned, workers=workers, progress=progress):
        outcomes[job.group][job.key] = outcome
    results = [(demo, demo.result(options, outcomes[demo.name])) for demo in demos]
    return Tour(options, data, results, machine(time.perf_counter() - started))


def machine(seconds: float) -> dict[str, str]:
    """Where and when it ran, for whoever compares figures."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "took": f"{seconds:.0f} s",
        "processor": f"{processor()}, {processes.cores()} cores",
        "versions": f"steadynorm {__version__}, torch {version('torch')}, "
        f"Python {platform.python_version()}",
    }
