"""A bar on the terminal while batches are read."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from steadynorm.models.batches import Batches


class Progress:
    """Counts batches over all passes; shows nothing where no terminal is, or rich is missing."""

    def __init__(self, shown: bool, feed: Batches) -> None:
        self._bar: Any = None
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:
            return
        console = Console(stderr=True)  # the caller may have a bar on the usual one
        if not (shown and console.is_terminal):
            return
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("batches"),
            progress.TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        try:
            self._batches: int | None = len(feed)
        except TypeError:
            self._batches = None
        self._task = self._bar.add_task(feed.owner, total=self._batches)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self) -> None:
        """One batch is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def expect(self, passes: int) -> None:
        """How many passes there will be in all."""
        if self._bar is not None and self._batches is not None:
            self._bar.update(self._task, total=self._batches * passes)
