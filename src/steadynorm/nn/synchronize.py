"""Moments and gradient sums over the replicas of a process group: one small collective each way."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from steadynorm.statistics import Ghost, Moments, Normalizer, contribution, pool

Synchronize = bool | dist.ProcessGroup
PerGroup = TypeVar("PerGroup", Moments, Normalizer)


def process_group(synchronize: Synchronize, owner: str) -> dist.ProcessGroup | None:
    """The group to reduce over; None where there is nothing to reduce.

    `True` is the default group, and means nothing as long as torch.distributed is not initialized,
    so that the same script runs on one process.
    """
    synchronize_setting(synchronize, owner)
    if synchronize is False or not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = dist.group.WORLD if synchronize is True else synchronize
    return group if group.size() > 1 else None


def synchronize_setting(synchronize: Any, owner: str) -> Any:
    """`synchronize`, if it is True, False or a process group."""
    is_group = dist.is_available() and isinstance(synchronize, dist.ProcessGroup)
    if not (isinstance(synchronize, bool) or is_group):
        raise TypeError(
            f"{owner}: `synchronize` must be True, False or a torch.distributed process group; "
            f"got {synchronize!r}."
        )
    return synchronize


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
        self._pooled: Moments | None = None

    def divide(self, policy: Ghost, input: Tensor) -> tuple[int, ...]:
        """How many of this process's samples fall into each ghost group that they touch.

        The whole batch is divided as one process would, the samples of rank 0 first, so a group may
        lie on several replicas. Where it is cut depends on the others' sample counts, which costs
        one more tiny collective.
        """
        if torch.compiler.is_compiling():
            raise NotImplementedError(
                f"{self.owner}: statistics=Ghost({policy.size}) with `synchronize` does not "
                f"compile into one graph: where groups are cut depends on the other replicas' "
                f"sample counts. Compile without fullgraph=True, or choose another policy."
            )
        samples = input.shape[0]
        counts = self._all_gather(torch.tensor([samples], device=input.device)).tolist()
        before, total = sum(counts[: self.group.rank()]), sum(counts)
        first, lengths = policy.pieces(before, samples, total)
        lengths = lengths or (0,)  # a replica without samples has one empty piece
        self._rows = _Rows(first, len(lengths), max(len(policy.lengths(total)), 1))
        return lengths

    def pool(self, local: Moments, samples: Any) -> tuple[Moments, Tensor]:
        """Pooled moments over all replicas, and how many samples they hold together.

        Weighted by the values per channel of each replica. The result is the same, to the bit, on
        every replica; with ghost groups it holds all groups of the whole batch.
        """
        column = (*local.mean.shape[:-1], 1)
        sizes = [
            n.reshape(column) if isinstance(n, Tensor) else local.mean.new_full(column, n)
            for n in (local.count, samples)
        ]
        row = self._spread(torch.cat([*sizes, local.mean, local.var, local.mean_low], dim=-1))
        rows = self._all_gather(row[None])
        channels = local.mean.shape[-1]
        counts, total, *moments = rows.split([1, 1, channels, channels, channels], dim=-1)
        self._pooled = pool(Moments(counts, *moments), xp=torch)
        return self._pooled, total.sum(0).flatten()[0]

    def own(self, whole: PerGroup) -> PerGroup:
        """What concerns this process's samples, of moments or a normalizer of the whole batch."""
        if self._rows is None:
            return whole
        return type(whole)(*(self._select(part) for part in whole))

    def link(self, live: Moments) -> Moments:
        """Pooled moments that carry gradient to this replica's input, summed over all losses.

        Exact to any order: with the other replicas held fixed, what this one contributes depends
        on nothing of theirs but the pooled mean, whose own movement is accounted for.
        """
        if self._pooled is None:
            raise RuntimeError("Replicas.link needs Replicas.pool first.")
        whole = self.own(self._pooled)
        moved = torch.stack(contribution(live, whole))
        moved = moved - moved.detach()  # 0, with gradient
        moved = self._select(
            _SumOfGradients.apply(self._spread(moved), self)  # type: ignore[no-untyped-call]
        )
        return whole._replace(
            mean_low=whole.mean_low + moved[0], var=whole.var + moved[1] - moved[0] * moved[0]
        )

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of a backward reduction, (2, C) or (2, G, C), added over replicas."""
        total: Tensor = self._select(self._all_reduce(self._spread(sums)))
        return total

    def _spread(self, own: Tensor) -> Tensor:
        """This process's rows among those of all ghost groups, zeros elsewhere."""
        if self._rows is None:
            return own
        return F.pad(
            own, (0, 0, self._rows.first, self._rows.all - self._rows.first - self._rows.own)
        )

    def _select(self, whole: Any) -> Any:
        if self._rows is None or not isinstance(whole, Tensor):
            return whole
        return whole.narrow(-2, self._rows.first, self._rows.own)

    def _all_gather(self, row: Tensor) -> Tensor:
        gather = torch.ops._c10d_functional.all_gather_into_tensor
        return self._finished(gather, row, self.group.size(), self.group.group_name)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        reduce = torch.ops._c10d_functional.all_reduce
        return self._finished(reduce, sums.contiguous(), "sum", self.group.group_name)

    def _finished(self, collective: Any, *arguments: Any) -> Tensor:
        """The result of a collective, one that the compiler can see; or an error that explains."""
        try:
            result: Tensor = torch.ops._c10d_functional.wait_tensor(collective(*arguments))
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.owner}: `synchronize`: the exchange of statistics with the other replicas "
                f"failed: another replica stopped, or did not reach this layer in time. Look at "
                f"the first replica that ended; all replicas must call the layer equally often. "
                f"({error})"
            ) from error
        return result


class _SumOverReplicas(torch.autograd.Function):
    """A sum over replicas; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return replicas._all_reduce(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _SumOverReplicas.apply(  # type: ignore[no-untyped-call]
            grad, ctx.replicas
        )
        return total, None


class _SumOfGradients(torch.autograd.Function):
    """Identity whose gradient is added over replicas."""

    @staticmethod
    def forward(ctx: Any, statistics: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        return statistics.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _SumOverReplicas.apply(  # type: ignore[no-untyped-call]
            grad, ctx.replicas
        )
        return total, None
