"""Which statistics normalize a training batch: six policies, one normal form.

A policy answers two questions from the batch's moments and the running statistics as they were
before this batch: what normalizes (`normalizer`), and what is kept (`update`). Both are pure.
"""

from __future__ import annotations

from typing import Literal

from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.policies.batch import Batch
from steadynorm.statistics.policies.frozen import Frozen
from steadynorm.statistics.policies.ghost import Ghost
from steadynorm.statistics.policies.renorm import Renorm
from steadynorm.statistics.policies.running import Running
from steadynorm.statistics.policies.steady import Steady

__all__ = [
    "Batch",
    "Context",
    "Frozen",
    "Ghost",
    "Policy",
    "PolicyName",
    "Renorm",
    "Running",
    "Steady",
    "policy_from",
]

PolicyName = Literal["batch", "steady", "running", "renorm", "ghost", "frozen"]
"""The keys of the table below, for type checkers."""

POLICIES: dict[str, type[Policy]] = {
    kind.__name__.lower(): kind for kind in (Batch, Steady, Running, Renorm, Ghost, Frozen)
}


def policy_from(value: object) -> Policy:
    """A policy from itself or from its lower-case name.

    Raises ValueError for an unknown name and TypeError for anything else.

    >>> policy_from("steady")
    Steady(prior=16, horizon=640, window=16)
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        if value in POLICIES:
            return POLICIES[value]()
        raise ValueError(
            f"statistics must be one of {', '.join(map(repr, POLICIES))} or a policy; "
            f"got {value!r}."
        )
    hint = f" Write {value.__name__}()." if isinstance(value, type) else ""
    raise TypeError(
        f"statistics must be a policy such as sn.Steady() or its lower-case name; "
        f"got {value!r}.{hint}"
    )
