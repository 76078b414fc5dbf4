"""What a piece of surgery did to a model: records that print as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields

from steadynorm.files import json_text


def aligned(rows: Sequence[Sequence[str]], numbers_from: int | None = None) -> str:
    """Rows as a table of text; columns from `numbers_from` on are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width)
            if numbers_from is not None and at >= numbers_from
            else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


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
        return aligned([[field.name for field in fields(Change)], *map(astuple, self)])

    def to_json(self) -> str:
        """The records as JSON, a list of objects with a key for each column of the table."""
        return json_text([asdict(change) for change in self])

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
