"""Measurements of all replicas as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from steadynorm.statistics import Moments, merge

T = TypeVar("T")


class LayerMoments(NamedTuple):
    """What has reached a layer: its moments in float64, in how many calls, of how many samples."""

    moments: Moments
    calls: int
    samples: int

    def joined(self, other: LayerMoments) -> LayerMoments:
        """Both together, as if measured at once."""
        return LayerMoments(
            merge(self.moments, other.moments),
            self.calls + other.calls,
            self.samples + other.samples,
        )

    def cpu(self) -> LayerMoments:
        """The same with its tensors on the CPU."""
        return self._replace(moments=Moments(*(part.cpu() for part in self.moments)))


class PassResult(NamedTuple):
    """What one pass gave: how many batches there were, and what reached each layer, on the CPU."""

    batches: int
    found: dict[str, LayerMoments]


class ReplicaGroup:
    """The processes of a group, or this one alone.

    Each pass ends with one exchange of channel-sized numbers, so replicas may hold different
    numbers of batches, or none.
    """

    def __init__(self, group: dist.ProcessGroup | None, owner: str) -> None:
        self.group = group
        self.owner = owner
        self.leads = group is None or group.rank() == 0

    def pooled(self, measure: Callable[[], PassResult]) -> PassResult:
        """`measure()` of every replica as one, the same on all of them to the bit.

        An exception on one replica is raised there, and as RuntimeError on the others.
        """
        if self.group is None:
            return measure()
        try:
            own = measure()
        except Exception as error:
            self._exchange(f"{type(error).__name__}: {error}")
            raise
        answers = self._exchange(own)
        for rank, answer in enumerate(answers):
            if isinstance(answer, str):
                raise RuntimeError(f"{self.owner}: replica {rank} failed: {answer}")
        found: dict[str, LayerMoments] = {}
        for answer in answers:
            for name, part in answer.found.items():
                found[name] = found[name].joined(part) if name in found else part
        return PassResult(sum(answer.batches for answer in answers), found)

    def first(self, value: T) -> T:
        """The first replica's value, on all of them."""
        if self.group is not None:
            value = self._exchange(value)[0]
        return value

    def _exchange(self, value: Any) -> list[Any]:
        answers: list[Any] = [None] * (1 if self.group is None else self.group.size())
        try:
            dist.all_gather_object(answers, value, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner}: the exchange of statistics with the other replicas failed: another "
                f"replica stopped, or does not take part. All replicas must make this call; "
                f"synchronize=False measures each on its own. ({error})"
            ) from error
        return answers
