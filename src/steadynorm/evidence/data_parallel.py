"""Data-parallel training under `torchrun`: every process takes its part of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class DataParallelGroup:
    """The processes that train together, or this one alone.

    Each takes a contiguous part of the batch, which may be empty. With synchronized layers the
    figures are those of one process, up to rounding.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.count = dist.get_world_size() if together else 1

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a batch."""
        return batch if self.count == 1 else batch.tensor_split(self.count)[self.rank]

    def wrapped(self, network: nn.Module) -> nn.Module:
        """The network to call in training, whose gradients are averaged over the processes."""
        if self.count == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def loss(self, logits: Tensor, labels: Tensor, samples: int) -> Tensor:
        """The loss whose gradient, averaged over the processes, is that of the mean over all
        `samples` of the whole batch.
        """
        if self.count == 1:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") * (self.count / samples)

    def mean(self, value: Tensor) -> float:
        """The mean over the processes."""
        return self.sum(value) / self.count

    def sum(self, value: Tensor) -> float:
        """The sum over the processes."""
        value = value.detach().double()
        if self.count > 1:
            dist.all_reduce(value)
        return float(value)


def launched() -> bool:
    """Whether `torchrun` started this process with others beside it."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[DataParallelGroup]:
    """The processes that `torchrun` started, over gloo, with one thread each as any other run."""
    dist.init_process_group("gloo")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield DataParallelGroup()
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()
