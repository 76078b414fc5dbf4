"""Moments and gradient sums over the replicas of a process group: one small collective each way."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from steadynorm.kernels import compat
from steadynorm.kernels.reference.collectives import all_gather, all_reduce
from steadynorm.statistics import Ghost, Moments, Normalizer, Policy, contribution, pool

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


class Terms(NamedTuple):
    """What all replicas must call a layer with: else their messages do not fit, or mean others."""

    policy: Policy
    channels: int
    dtype: torch.dtype  # of the statistics
    tracked: bool  # whether running statistics move
    skip_nonfinite: bool

    def described(self) -> tuple[str, ...]:
        """The terms in words, each short enough for a message of fixed length."""
        words = (
            f"statistics={self.policy!r}",
            f"{self.channels} channels",
            f"statistics in {self.dtype}".replace("torch.", ""),
            f"{'with' if self.tracked else 'without'} running statistics",
            f"nonfinite={'skip' if self.skip_nonfinite else 'propagate'!r}",
        )
        return tuple(word[: DESCRIPTION // len(words) // 4] for word in words)


DESCRIPTION = 4096  # bytes in which a replica describes its terms
_agreed: Any = WeakTensorKeyDictionary()  # a layer's tensor -> the group and terms of its last call
_no_tensor = torch.empty(0)  # stands for layers without parameters and running statistics


class Replicas:
    """One forward's exchange with the other replicas; remembers it for the backward.

    Every replica contributes, also one without samples: its count of 0 gives it no say. A count
    below 0 announces that the replica's terms are no longer those that all agreed on.
    """

    def __init__(self, group: dist.ProcessGroup, owner: str) -> None:
        self.group = group
        self.owner = owner
        self._terms: Terms | None = None
        self._rows: _Rows | None = None  # only with ghost groups
        self._pooled: Moments | None = None

    @property
    def name(self) -> str:
        """The group's, by which compiled code finds it."""
        name: str = self.group.group_name
        return name

    def agree(self, layer: Tensor | None, terms: Terms, device: torch.device) -> None:
        """Compare terms with the other replicas, when a layer is new to the group or its terms are.

        `layer` is a tensor that the layer keeps. Where only some replicas' terms have changed the
        others do not expect a comparison, so it is announced in a message of the form that they do
        expect. They notice at once on CPU; elsewhere to look would make every call wait for the
        device, so they get NaN there, and only replicas that have changed raise.
        """
        if compat.is_traced():
            return
        self._terms = terms
        layer = _no_tensor if layer is None else layer
        group, agreed = _agreed.get(layer, (lambda: None, None))
        if group() is self.group:
            if agreed == terms:
                return
            self._announce(agreed, device)
        self._compare(device)
        _agreed[layer] = weakref.ref(self.group), terms

    def _announce(self, agreed: Terms, device: torch.device) -> None:
        if isinstance(agreed.policy, Ghost):
            message = torch.full((1,), -1, device=device)
        else:
            message = torch.full(
                (1, 2 + 3 * agreed.channels), float("nan"), dtype=agreed.dtype, device=device
            )
            message[0, 0] = -1
        counts = self._all_gather(message).reshape(self.group.size(), -1)[:, 0].tolist()
        unaware = [str(r) for r, count in zip(self._ranks(), counts, strict=True) if count >= 0]
        if unaware and device.type != "cpu" and not isinstance(agreed.policy, Ghost):
            raise self._disagreement(
                f"{', '.join(agreed.described())} on rank {', '.join(unaware)}, and something "
                f"else on this rank"
            )

    def _compare(self, device: torch.device) -> None:
        """Describe this replica's terms to all others; all raise if they are not the same."""
        if self._terms is None:
            return
        own = "\0".join(self._terms.described()).encode().ljust(DESCRIPTION)
        sent = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(device)
        rows = self._all_gather(sent[None]).cpu().numpy()
        told = [row.tobytes().decode().rstrip().split("\0") for row in rows]
        differences = []
        for values in zip(*told, strict=True):
            holders: dict[str, list[str]] = {}
            for rank, value in zip(self._ranks(), values, strict=True):
                holders.setdefault(value, []).append(str(rank))
            if len(holders) > 1:
                differences.append(
                    " and ".join(f"{value} on rank {', '.join(r)}" for value, r in holders.items())
                )
        if differences:
            raise self._disagreement("; ".join(differences))

    def _ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.group)

    def _disagreement(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"{self.owner}: `synchronize`: the replicas must call this layer alike; got {what}. "
            f"Make the layer and its input the same on every rank."
        )

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
        if min(counts) < 0:
            self._compare(input.device)
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
        if self._terms is not None and counts.is_cpu and bool((counts < 0).any()):
            self._compare(counts.device)
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
        return all_gather(row, self.group.size(), self.name, self.owner)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        return all_reduce(sums, self.name, self.owner)


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
