"""Moments and gradient sums over the replicas of a process group: one small collective each way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.nn import functional as F

from steadynorm.statistics import Ghost, Moments, Normalizer, pool

Synchronize = bool | dist.ProcessGroup
PerGroup = TypeVar("PerGroup", Moments, Normalizer)


def process_group(synchronize: Synchronize, owner: str) -> dist.ProcessGroup | None:
    """The group to reduce over; None where there is nothing to reduce.

    `True` is the default group, and means nothing as long as torch.distributed is not initialized,
    so that the same script runs on one process.
    """
    if not (isinstance(synchronize, bool) or _is_group(synchronize)):
        raise TypeError(
            f"{owner}: `synchronize` must be True, False or a torch.distributed process group; "
            f"got {synchronize!r}."
        )
    if synchronize is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = dist.group.WORLD if synchronize is True else synchronize
    return group if group.size() > 1 else None


def _is_group(value: object) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


class _Rows(NamedTuple):
    """Which of the whole batch's ghost groups this process has samples of."""

    first: int
    own: int
    all: int


class Replicas:
    """One forward's exchange with the other replicas; remembers it for the backward.

    Every replica contributes, also one without samples: its count of 0 gives it no say.
    """

    def __init__(self, group: dist.ProcessGroup, owner: str) -> None:
        self.group = group
        self.owner = owner
        self._rows: _Rows | None = None  # only with ghost groups
        self._parts: Moments | None = None

    def divide(self, policy: Ghost, input: Tensor) -> tuple[int, ...]:
        """How many of this process's samples fall into each ghost group that they touch.

        The whole batch is divided as one process would, the samples of rank 0 first, so a group may
        lie on several replicas. Where it is cut depends on the others' sample counts, which costs
        one more tiny collective.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{self.owner}: statistics={policy!r} with `synchronize` does not compile into one "
                f"graph: where groups are cut depends on the other replicas' sample counts. "
                f"Compile without fullgraph=True, or choose another policy."
            )
        samples = input.shape[0]
        counts = self._all_gather(torch.tensor([samples], device=input.device)).tolist()
        before, total = sum(counts[: self.group.rank()]), sum(counts)
        first, lengths = policy.pieces(before, samples, total)
        lengths = lengths or (0,)  # a replica without samples has one empty piece
        self._rows = _Rows(first, len(lengths), max(len(policy.lengths(total)), 1))
        return lengths

    def pool(self, local: Moments, samples: int) -> tuple[Moments, Tensor]:
        """Pooled moments over all replicas, and how many samples they hold together.

        Weighted by the values per channel of each replica. The result is the same, to the bit, on
        every replica; with ghost groups it holds all groups of the whole batch.
        """
        column = (*local.mean.shape[:-1], 1)
        count = local.count
        sizes = [
            count.reshape(column) if isinstance(count, Tensor) else local.mean.new_full(column, count),
            local.mean.new_full(column, samples),
        ]
        row = self._spread(torch.cat([*sizes, local.mean, local.var, local.mean_low], dim=-1))
        rows = self._all_gather(row[None])
        channels = local.mean.shape[-1]
        counts, total, *moments = rows.split([1, 1, channels, channels, channels], dim=-1)
        self._parts = Moments(counts, *moments)
        return pool(self._parts, xp=torch), total.sum(0).flatten()[0]

    def own(self, whole: PerGroup) -> PerGroup:
        """What concerns this process's samples, of moments or a normalizer of the whole batch."""
        if self._rows is None:
            return whole
        return whole._make(self._select(part) for part in whole)

    def link(self, live: Moments) -> Moments:
        """Pooled moments that carry gradient to this replica's input, summed over all losses."""
        if self._parts is None:
            raise RuntimeError("Replicas.link needs Replicas.pool first.")
        var, low = self._spread(live.var), self._spread(live.mean_low)
        ranks = torch.arange(self.group.size(), device=var.device)
        mine = (ranks == self.group.rank()).reshape(-1, *(1,) * var.ndim)
        parts = self._parts._replace(
            var=torch.where(mine, var, self._parts.var),
            mean_low=torch.where(mine, low, self._parts.mean_low),
        )
        pooled = pool(parts, xp=torch)
        var, low = _SumOfGradients.apply(torch.stack([pooled.var, pooled.mean_low]), self)
        return self.own(pooled._replace(var=var, mean_low=low))

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of a backward reduction, (2, C) or (2, G, C), added over replicas."""
        total: Tensor = self._select(self._all_reduce(self._spread(sums)))
        return total

    def _spread(self, own: Tensor) -> Tensor:
        """This process's rows among those of all ghost groups, zeros elsewhere."""
        if self._rows is None:
            return own
        return F.pad(own, (0, 0, self._rows.first, self._rows.all - self._rows.first - self._rows.own))

    def _select(self, whole: Any) -> Any:
        if self._rows is None or not isinstance(whole, Tensor):
            return whole
        return whole.narrow(-2, self._rows.first, self._rows.own)

    def _all_gather(self, row: Tensor) -> Tensor:
        with _explained(self.owner):
            return _finished(collectives.all_gather_tensor(row, 0, self.group))

    def _all_reduce(self, sums: Tensor) -> Tensor:
        with _explained(self.owner):
            return _finished(collectives.all_reduce(sums.contiguous(), "sum", self.group))


def _finished(result: Tensor) -> Tensor:
    """The tensor of a collective that has ended, so that its failure shows here and not later."""
    if isinstance(result, collectives.AsyncCollectiveTensor):
        return result.wait()
    return result


class _SumOfGradients(torch.autograd.Function):
    """Identity whose gradient is added over replicas."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return statistics.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.replicas._all_reduce(grad), None


@contextmanager
def _explained(owner: str) -> Iterator[None]:
    """Says in one error which layer waited for other replicas when a collective fails."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{owner}: `synchronize`: the exchange of statistics with the other replicas failed: "
            f"another replica stopped, or did not reach this layer in time. Look at the first "
            f"replica that ended; all replicas must call the layer equally often. ({error})"
        ) from error
