"""What a demonstration of the tour is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steadynorm.evidence import estimates
from steadynorm.evidence.workers import Job
from steadynorm.report.page import Section

Outcomes = Mapping[tuple[Any, ...], Any]
"""What the runs of a demonstration returned, by `Job.key`."""


@dataclass(frozen=True)
class TourOptions:
    """What the user asked for. `short` is a version of under half a minute."""

    data_dir: str | None
    seeds: tuple[int, ...]
    short: bool

    @property
    def seeds_in_words(self) -> str:
        """How many seeds."""
        return f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"


@dataclass(frozen=True)
class DemoResult(Section):
    """What a demonstration shows on the page, tables and first paragraph on the terminal too;
    `figures`: all figures as plain dicts and lists for `report.json`.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The first paragraph."""
        return self.text[0]


@dataclass(frozen=True)
class Demo:
    """One thing to see. To add one, write it in a file of its own in `demos/`, as `DEMO`, and list
    it in `demos/__init__.py`.

    `name`: its key in `report.json`. `jobs(options)`: the independent runs it needs, whose group is
    its name; one that takes times has `alone=True`. `result(options, outcomes)`: what they show.
    """

    name: str
    title: str
    jobs: Callable[[TourOptions], Sequence[Job]]
    result: Callable[[TourOptions, Outcomes], DemoResult]


def error_of(accuracies: Sequence[float]) -> estimates.Estimate:
    """The error in per cent, from accuracies by seed."""
    return estimates.mean(100 * (1 - accuracy) for accuracy in accuracies)
