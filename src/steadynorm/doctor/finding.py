"""What a rule found: the defect, where, the numbers that show it, and the cure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum


class Severity(IntEnum):
    """How bad it is; they compare.

    `INFO`: worth knowing, the network is sound. `WARNING`: it works, and worse than it could or by
    luck. `ERROR`: what it computes is wrong.

    >>> Severity.from_name("warning") >= Severity.INFO
    True
    """

    INFO = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()

    @classmethod
    def from_name(cls, name: str) -> Severity:
        """The severity of a name. Raises ValueError for an unknown one."""
        try:
            return cls[name.upper()]
        except KeyError:
            names = ", ".join(str(severity) for severity in cls)
            raise ValueError(f"severity must be one of {names}; got {name!r}.") from None


@dataclass(frozen=True)
class Finding:
    """One defect in one place.

    `code`, `name`: the rule's, such as "SN101" and "statistics-never-updated".
    `layer`: the module's name in the model, "" for the model as a whole.
    `message`: what is wrong, with the numbers. `evidence`: the same numbers by name.
    `cure`: what to do, a sentence; `line`: code to copy, "" where no line does it.
    `safe`: the cure leaves what the network computes as it was, or brings it to what its training
    meant; False where it is a decision; None where there is no automatic cure.
    `because`: codes of other findings of the same report that explain this one.
    """

    code: str
    name: str
    severity: Severity
    layer: str
    message: str
    evidence: Mapping[str, float | int | str] = field(default_factory=dict)
    cure: str = ""
    line: str = ""
    safe: bool | None = None
    because: tuple[str, ...] = ()
