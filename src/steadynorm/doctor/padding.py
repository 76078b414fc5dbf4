"""Padded positions in the input of a layer, by a mask in the batch or by their equal values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from steadynorm.doctor.observed import Padding
from steadynorm.kernels.dispatch import stages_for
from steadynorm.statistics import Moments, merge

EDGE = 4  # positions at the end that a convolution's own zeros may have touched
CALLS = 4  # inputs of a layer that are searched; what they hold, the others hold too


class Padded:
    """What has been seen of padding in one layer's input, over the first calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.positions = 0
        self.padded = 0
        self.counted: Moments | None = None
        self.valid: Moments | None = None
        self.known = False

    def add(self, x: Tensor, part: Moments, known: Sequence[Tensor]) -> None:
        """Take in one input (N, C, *), its moments, and the masks that its batch held."""
        if self.calls == CALLS:
            return
        self.calls += 1
        shape = (x.shape[0], *x.shape[2:])
        valid = next((mask.bool() for mask in known if mask.shape == shape), None)
        self.known |= valid is not None
        if valid is None:
            valid = by_values(x)
        self.positions += valid.numel()
        padded = int((~valid).sum())
        self.padded += padded
        self.counted = _joined(self.counted, part)
        if not padded:
            self.valid = _joined(self.valid, part)
        elif padded < valid.numel():
            count, mean, var, low = stages_for(x).moments(x.detach(), mask=valid)
            wide = [t.to("cpu", torch.float64).reshape(-1) for t in (mean, var, low)]
            total = torch.as_tensor(count).to("cpu", torch.float64).reshape(1)
            rest = Moments(total, wide[0] + wide[2], wide[1], torch.zeros_like(wide[0]))
            self.valid = _joined(self.valid, rest)

    def result(self) -> Padding | None:
        """What was found; None where nothing was padded."""
        if not self.padded or self.valid is None or self.counted is None:
            return None
        return Padding(
            self.padded / self.positions, *_numbers(self.valid), *_numbers(self.counted), self.known
        )


def _joined(a: Moments | None, b: Moments) -> Moments:
    return b if a is None else merge(a, b)


def _numbers(of: Moments) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray((of.mean + of.mean_low).numpy()), np.asarray(of.var.numpy())


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
    best = torch.zeros(len(lines), dtype=torch.int64, device=lines.device)
    for vector, skipped in _candidates(lines):
        # One line first: nearly all inputs end their search there.
        for part in (lines[..., :1], lines):
            run = _run(part, vector, skipped)
            if not bool(run.any()):
                break
        if run.sum() > best.sum():
            best = run
    return best


def _run(lines: Tensor, vector: Tensor, skipped: int) -> Tensor:
    same = (lines == vector[None, :, None, None]).all(1).all(-1)  # (N, L)
    same[:, same.shape[1] - skipped :] = True
    run = same.flip(1).to(torch.int64).cumprod(1).sum(1)
    return torch.where(run > skipped + 1, run, 0)


def _candidates(lines: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Vectors that several samples hold near their end, and how many positions lie behind."""
    for skipped in range(min(EDGE, lines.shape[2] - 1)):
        ends = lines[:, :, lines.shape[2] - 1 - skipped, 0]
        vectors, counts = torch.unique(ends, dim=0, return_counts=True)
        if int(counts.max()) > 1:
            yield vectors[int(counts.argmax())], skipped
