"""What a stop of the tour is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from steadynorm.evidence.lab.jobs import Job
from steadynorm.report.page import Card, Chart, Table


@dataclass(frozen=True)
class Setting:
    """What the visitor asked for. `short` is a look around in under half a minute."""

    data_dir: str | None
    seeds: tuple[int, ...]
    short: bool


@dataclass(frozen=True)
class StopResult:
    """What a stop shows: a sentence for the terminal, more text and cards for the page, tables,
    charts, and all figures as plain dicts and lists for `report.json`.
    """

    sentence: str
    tables: Sequence[Table]
    charts: Sequence[Chart] = ()
    text: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    cards: Sequence[Card] = ()


class Stop(Protocol):
    """One thing to see. To add one: write it in a file of its own in `stops/`, and list it in
    `stops/__init__.py`. The tour does the rest: workers, progress, terminal, page and JSON.
    """

    name: str
    """Its key in `report.json`."""
    title: str
    """Its heading."""

    def jobs(self, setting: Setting) -> Sequence[Job]:
        """The runs it needs, independent of each other, with `group` set to its name. One that
        takes times says `alone=True`, and runs after all others with nothing beside it.
        """
        ...

    def result(self, setting: Setting, outcomes: Mapping[tuple[Any, ...], Any]) -> StopResult:
        """What the runs show, from what each returned, by `Job.key`."""
        ...
