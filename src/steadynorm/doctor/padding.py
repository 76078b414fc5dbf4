"""Padded positions in the input of a layer, by a mask in the batch or by their equal values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from steadynorm.doctor.observed import Padding
from steadynorm.kernels.choice import stages_for
from steadynorm.statistics import Moments, merge

EDGE = 4  # positions at the end that a convolution's own zeros may have touched


class Padded:
    """What has been seen of padding in one layer's input, over all calls."""

    def __init__(self) -> None:
        self.positions = 0
        self.padded = 0
        self.valid: Moments | None = None
        self.known = False

    def add(self, x: Tensor, known: Sequence[Tensor]) -> None:
        """Take in one input (N, C, *), with the masks that its batch held."""
        shape = (x.shape[0], *x.shape[2:])
        valid = next((mask.bool() for mask in known if mask.shape == shape), None)
        self.known |= valid is not None
        if valid is None:
            valid = by_values(x)
        self.positions += valid.numel()
        self.padded += int((~valid).sum())
        if not bool(valid.any()):
            return
        count, mean, var, low = stages_for(x, None).moments(x.detach(), mask=valid)
        wide = [t.to("cpu", torch.float64).reshape(-1) for t in (mean, var, low)]
        total = torch.as_tensor(count).to("cpu", torch.float64).reshape(1)
        part = Moments(total, wide[0] + wide[2], wide[1], torch.zeros_like(wide[0]))
        self.valid = part if self.valid is None else merge(self.valid, part)

    def result(self) -> Padding | None:
        """What was found; None where nothing was padded."""
        if not self.padded or self.valid is None:
            return None
        mean = np.asarray((self.valid.mean + self.valid.mean_low).numpy())
        var = np.asarray(self.valid.var.numpy())
        return Padding(self.padded / self.positions, mean, var, self.known)


def by_values(x: Tensor) -> Tensor:
    """Valid positions (N, *): all but those that look padded.

    Along each axis of positions: the values of a sample are the same vector from some place up to
    its end (or from its beginning), the vector is the same for all such samples, and the place is
    not. A picture's plain margin has two sides: what one side has more than the other is counted.
    """
    valid = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
    if x.shape[0] < 2:
        return valid
    for axis in range(2, x.ndim):
        lines = x.detach().movedim(axis, 2).unsqueeze(3).flatten(3)  # (N, C, L, the others)
        runs, plain = max(
            ((_runs(lines), False), (_runs(lines.flip(2)), True)), key=lambda run: int(run[0].sum())
        )
        other = _runs(lines if plain else lines.flip(2))
        if runs.max() == runs.min() or runs.sum() <= 2 * other.sum():
            continue
        place = torch.arange(x.shape[axis], device=x.device)
        padded = place[None] >= x.shape[axis] - runs[:, None]
        padded = padded.flip(1) if plain else padded
        shape = [x.shape[0], *(1 for _ in x.shape[2:])]
        shape[axis - 1] = x.shape[axis]
        valid &= ~padded.reshape(shape)
    return valid


def _runs(lines: Tensor) -> Tensor:
    """How many positions at the end of each sample hold the padding's vector, (N,); 0 for none."""
    count, _, length, _ = lines.shape
    best = torch.zeros(count, dtype=torch.int64, device=lines.device)
    for vector, skipped in _candidates(lines):
        same = (lines == vector[None, :, None, None]).all(1).all(-1)  # (N, L)
        same[:, length - skipped :] = True
        run = same.flip(1).to(torch.int64).cumprod(1).sum(1)
        run = torch.where(run > skipped + 1, run, 0)
        if run.sum() > best.sum():
            best = run
    return best


def _candidates(lines: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Vectors that several samples hold near their end, and how many positions lie behind."""
    for skipped in range(min(EDGE, lines.shape[2] - 1)):
        ends = lines[:, :, lines.shape[2] - 1 - skipped, 0]
        vectors, counts = torch.unique(ends, dim=0, return_counts=True)
        if int(counts.max()) > 1:
            yield vectors[int(counts.argmax())], skipped
