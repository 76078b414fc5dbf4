"""What a piece of surgery did to a model: records that print as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Change:
    """One thing done to a model, or one thing left as it was and why.

    `what`: the act in one word, such as "folded"; "left" says that nothing was done.
    `where`: the module's name in the model. `before`, `after`: the thing itself, then and now.
    `why`: the reason, or what follows from it.
    """

    what: str
    where: str
    before: str
    after: str
    why: str = ""


class Changes(list[Change]):
    """The records of one call, in the order of the model; prints as a table.

    An empty list means that there was nothing to do, and printing it says so.

    >>> print(Changes())
    nothing to do
    >>> print(Changes([Change("folded", "bn", "BatchNorm2d", "Identity", "into conv")]))
    what    where  before       after     why
    folded  bn     BatchNorm2d  Identity  into conv
    """

    def __str__(self) -> str:
        if not self:
            return "nothing to do"
        rows = [tuple(field.name for field in fields(Change)), *(astuple(c) for c in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        lines = (
            "  ".join(
                [cell.ljust(width) for cell, width in zip(row, widths, strict=False)] + [row[-1]]
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    @property
    def left(self) -> Changes:
        """The records of what was left as it was, each with its reason."""
        return Changes(change for change in self if change.what == "left")

    def tally(self) -> dict[str, int]:
        """How often each thing was done.

        >>> Changes([Change("left", "bn", "BatchNorm2d", "BatchNorm2d", "why")]).tally()
        {'left': 1}
        """
        return dict(Counter(change.what for change in self))
