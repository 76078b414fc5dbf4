"""Moments and gradient sums over the replicas of a process group: one small collective each way."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from steadynorm.statistics import Moments, pool

Synchronize = bool | dist.ProcessGroup


def process_group(synchronize: Synchronize, owner: str) -> dist.ProcessGroup | None:
    """The group to reduce over; None where there is nothing to reduce.

    `True` is the default group, and means nothing as long as torch.distributed is not initialized,
    so that the same script runs on one process.
    """
    if synchronize is False or synchronize is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if synchronize is True else synchronize
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{owner}: `synchronize` must be True, False or a torch.distributed process group; "
            f"got {synchronize!r}."
        )
    return group if group.size() > 1 else None


class Replicas:
    """One forward's exchange with the other replicas; remembers it for the backward."""

    def __init__(self, group: dist.ProcessGroup, owner: str) -> None:
        self.group = group
        self.owner = owner
        self._parts: Moments | None = None

    def pool(self, local: Moments, samples: int) -> tuple[Moments, Tensor]:
        """Pooled moments over all replicas, and how many samples they hold together.

        Weighted by the values per channel of each replica; replicas without a value take part and
        have no say. The result is the same, to the bit, on every replica.
        """
        channels = local.mean.shape[-1]
        row = local.mean.new_zeros(1, 2 + 3 * channels)
        row[0, 0] = local.count if isinstance(local.count, int) else local.count.reshape(())
        row[0, 1] = samples
        row[0, 2:] = torch.cat([local.mean, local.var, local.mean_low])
        rows = self._all_gather(row)
        sizes, means, variances, lows = rows.split([2, channels, channels, channels], dim=1)
        self._parts = Moments(sizes[:, :1], means, variances, lows)
        return pool(self._parts, xp=torch), sizes[:, 1].sum()

    def link(self, live: Moments) -> Moments:
        """Pooled moments that carry gradient to this replica's input, summed over all losses."""
        if self._parts is None:
            raise RuntimeError("Replicas.link needs Replicas.pool first.")
        mine = torch.arange(self.group.size(), device=live.var.device)[:, None] == self.group.rank()
        parts = self._parts._replace(
            var=torch.where(mine, live.var, self._parts.var),
            mean_low=torch.where(mine, live.mean_low, self._parts.mean_low),
        )
        pooled = pool(parts, xp=torch)
        var, low = _SumOfGradients.apply(torch.stack([pooled.var, pooled.mean_low]), self)
        return pooled._replace(var=var, mean_low=low)

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of a backward reduction, added over replicas."""
        with _explained(self.owner):
            return _waited(collectives.all_reduce(sums.contiguous(), "sum", self.group))

    def _all_gather(self, row: Tensor) -> Tensor:
        with _explained(self.owner):
            return _waited(collectives.all_gather_tensor(row, 0, self.group))


def _waited(result: Tensor) -> Tensor:
    """The finished tensor of a collective, so that its failure shows here and not later."""
    if isinstance(result, collectives.AsyncCollectiveTensor):
        return result.wait()
    return result


class _SumOfGradients(torch.autograd.Function):
    """Identity whose gradient is added over replicas."""

    @staticmethod
    def forward(ctx, statistics: Tensor, replicas: Replicas) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.replicas = replicas
        return statistics.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.replicas.sum(grad), None


class _explained:
    """Says in one error which layer waited for which replicas when a collective fails."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        if kind is not None and issubclass(kind, RuntimeError):
            raise RuntimeError(
                f"{self.owner}: `synchronize`: the exchange of statistics with the other replicas "
                f"failed: another replica stopped, or did not reach this layer in time. Look at "
                f"the first replica that ended; all replicas must call the layer equally often. "
                f"({error})"
            ) from error  # type: ignore[misc]
