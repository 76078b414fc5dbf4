"""A layer's memory of the gradient, from one forward to its backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.statistics import GradientMemory, Moments, Normalizer, remember


class Memory:
    """What one forward and its backward passes share of a layer's memory of the gradient.

    `state` is the layer's, (2, C), and moves in the first backward pass. Later ones through the
    same forward start from where the first did, and so give the same for the same gradient.
    """

    def __init__(self, state: Tensor, rate: Any = None) -> None:
        self.state = state
        self.rate = rate  # of this batch; known once the call has decided
        self.before: Tensor | None = None

    def read(self) -> Tensor:
        """What is remembered now."""
        return self.state

    def write(self, after: Tensor) -> None:
        """Remember this from now on."""
        self.state.copy_(after)

    def in_place(self) -> tuple[Tensor, Tensor | None]:
        """What a kernel starts from, and, in the first backward pass, where it is to write."""
        if self.before is not None:
            return self.before, None
        self.before = self.state.clone()
        torch.autograd.graph.increment_version(self.state)
        return self.before, self.state

    def follow(
        self,
        normalizer: Normalizer,
        batch: Moments,
        rho: Tensor,
        sum_grad: Tensor,
        sum_grad_x: Tensor,
    ) -> GradientMemory:
        """The memory after this backward pass, by its sums over all replicas."""
        first = self.before is None
        if self.before is None:
            self.before = self.read().to(rho.dtype, copy=True)
        memory = GradientMemory(*self.before.unbind())
        memory = remember(memory, self.rate, normalizer, batch, rho, sum_grad, sum_grad_x, xp=torch)
        if first:
            self.write(torch.stack(memory))
        return memory
