"""A bar on the terminal while batches are read."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

from steadynorm.models.calibration.batches import Batches


def _bars() -> Bars | None:
    """A bar for a terminal; None where there is no terminal, or no rich to draw with."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        return None
    # A console of its own, on stderr: the caller may have a bar on the usual one.
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    text, columns = TextColumn("{task.description}"), (BarColumn(), MofNCompleteColumn())
    return Bars(
        text, *columns, TextColumn("batches"), TimeElapsedColumn(), console=console, transient=True
    )


class Progress:
    """Counts batches over all passes; shows nothing where no terminal is."""

    def __init__(self, shown: bool, feed: Batches) -> None:
        self._bars = _bars() if shown else None
        try:
            self._each: int | None = len(feed)
        except TypeError:
            self._each = None
        if self._bars is not None:
            self._task = self._bars.add_task(feed.owner, total=self._each)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def step(self) -> None:
        """One batch is done."""
        if self._bars is not None:
            self._bars.advance(self._task)

    def expect(self, passes: int) -> None:
        """How many passes there will be in all."""
        if self._bars is not None and self._each is not None:
            self._bars.update(self._task, total=self._each * passes)
