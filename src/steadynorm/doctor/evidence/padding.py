"""Padded positions in the input of a layer: by a mask in the batch, or by their equal values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.doctor.evidence.moments import joined, mean_and_var, wide_moments
from steadynorm.doctor.evidence.records import Padding
from steadynorm.models.graph import tensors
from steadynorm.statistics import Moments, pool

BETWEEN = ("attn_mask", "src_mask", "tgt_mask", "memory_mask")
EDGE = 4  # positions at the end that a convolution's own zeros may have touched
CALLS = 4  # inputs of a layer that are searched; the others hold the same
FEW = 0.1  # of the samples may be constant at the other end too


class PaddingHint(NamedTuple):
    """What a batch says of padding: `masks`, true where valid, by the names of arguments; `seen`
    whether samples of its tensors end, or begin, in equal values of different lengths.
    """

    masks: Sequence[Tensor]
    seen: bool = False

    def with_arguments(self, forward: Any, args: Any, kwargs: Any) -> PaddingHint:
        """The hint, and the masks among the arguments of a call of the model."""
        try:
            named = signature(forward).bind_partial(*args, **kwargs).arguments
        except (TypeError, ValueError):
            named = kwargs
        return self._replace(masks=_masks({**named, **named.get("kwargs", {})}) or self.masks)

    @classmethod
    def of(cls, batch: Any) -> PaddingHint:
        """The hint that a batch gives."""
        masks = _masks(batch if isinstance(batch, Mapping) else {})
        batched = [t for t in tensors(batch) if t.ndim > 1 and len(t) > 1 and t.numel()]
        # Any axis may hold the positions: (N, C, L), (N, L, C), or tokens (N, L).
        lines = (
            t.detach()
            .movedim(axis, 1)
            .reshape(len(t), t.shape[axis], -1)
            .transpose(1, 2)[..., None]
            for t in batched
            for axis in range(1, t.ndim)
            if t.shape[axis] > EDGE
        )
        return cls(masks, any(_padded(line) is not None for line in lines))


def _masks(named: Mapping[str, Any]) -> list[Tensor]:
    """Masks of valid positions. torch's `key_padding_mask` is true where nothing is; its
    `attn_mask` and `src_mask` say who may look at whom.
    """
    return [
        ~mask.bool() if str(name).endswith("padding_mask") else mask.bool()
        for name, mask in named.items()
        if str(name).endswith("mask") and isinstance(mask, Tensor) and name not in BETWEEN
    ]


class PaddingStatistics:
    """What has been seen of padding in one layer's input, over the first calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.positions = 0
        self.padded = 0
        self.counted: Moments | None = None
        self.valid: Moments | None = None
        self.by_mask = False

    def add(self, x: Tensor, part: Moments, hint: PaddingHint) -> None:
        """Take in one input (N, C, *), its moments, and what its batch says of padding."""
        if self.calls == CALLS:
            return
        self.calls += 1
        shape = (x.shape[0], *x.shape[2:])
        valid = next((mask for mask in hint.masks if mask.shape == shape), None)
        self.by_mask |= valid is not None
        if valid is None:
            valid = by_values(x) if hint.seen else torch.ones(shape, dtype=torch.bool)
        self.positions += valid.numel()
        padded = int((~valid).sum())
        self.padded += padded
        self.counted = joined(self.counted, part)
        if not padded:
            self.valid = joined(self.valid, part)
        elif padded < valid.numel():
            self.valid = joined(self.valid, pool(wide_moments(x, valid), xp=torch))

    def result(self) -> Padding | None:
        """What was found; None where nothing was padded."""
        if not self.padded or self.valid is None or self.counted is None:
            return None
        of_valid, of_all = mean_and_var(self.valid), mean_and_var(self.counted)
        return Padding(self.padded / self.positions, *of_valid, *of_all, self.by_mask)


def by_values(x: Tensor) -> Tensor:
    """Valid positions (N, *): all but those that look padded; see `_padded`."""
    valid = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool, device=x.device)
    if x.shape[0] < 2:
        return valid
    for axis in range(2, x.ndim):
        lines = x.detach().movedim(axis, 2).unsqueeze(3).flatten(3)
        padded = _padded(lines)
        if padded is not None:
            shape = [x.shape[0], *(1 for _ in x.shape[2:])]
            shape[axis - 1] = x.shape[axis]
            valid &= ~padded.reshape(shape)
    return valid


def _padded(lines: Tensor) -> Tensor | None:
    """Padded positions (N, L) of lines (N, C, L, others); None where none look so.

    The values of a sample are the same vector from some place up to its end (or from its
    beginning), and the place differs. The vector is the same for all such samples; or it is each
    sample's own, repeated more than `EDGE` times. Next to no sample is constant at the other end:
    that would be the plain background of a picture.
    """
    at_end, at_beginning = _runs(lines), _runs(lines.flip(2))
    runs, other = sorted((at_end, at_beginning), key=lambda run: -int(run.sum()))
    if runs.max() == runs.min() or (other > 0).float().mean() > FEW:
        return None
    position = torch.arange(lines.shape[2], device=lines.device)
    padded = position[None] >= lines.shape[2] - runs[:, None]
    return padded if runs is at_end else padded.flip(1)


def _runs(lines: Tensor) -> Tensor:
    """How many positions at the end of each sample hold the padding's vector, (N,); 0 for none."""
    best = torch.zeros(len(lines), dtype=torch.int64, device=lines.device)
    for vector, skipped in _candidates(lines):
        # One line first: nearly all inputs end their search there.
        for others in (1, lines.shape[3]):
            run = _run(lines[..., :others], vector[..., :others], skipped)
            if not bool(run.any()):
                break
        if run.sum() > best.sum():
            best = run
    return best


def _run(lines: Tensor, vector: Tensor, skipped: int) -> Tensor:
    """`vector`: (C, others), or (N, C, others) with each sample's own, which must be repeated
    `EDGE` times.
    """
    expected = vector.unsqueeze(-2)
    if vector.ndim == 2:
        equal = lines == expected
    else:  # a convolution rounds the same values one way here and another there
        equal = torch.isclose(lines, expected, rtol=1e-5, atol=1e-6 * float(lines.abs().max()))
    same = equal.all(1).all(-1)  # (N, L)
    same[:, same.shape[1] - skipped :] = True
    run = same.flip(1).to(torch.int64).cumprod(1).sum(1)
    return torch.where(run > skipped + (1 if vector.ndim == 2 else EDGE), run, 0)


def _candidates(lines: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Vectors that several samples hold near their end, or each sample's own, and how many
    positions lie behind.
    """
    for skipped in range(min(EDGE, lines.shape[2] - 1)):
        ends = lines[:, :, lines.shape[2] - 1 - skipped]
        vectors, counts = torch.unique(ends, dim=0, return_counts=True)
        if int(counts.max()) > 1:
            yield vectors[int(counts.argmax())], skipped
        if lines.shape[2] > 4 * EDGE:  # shorter ones end in a few equal values by chance
            yield ends, skipped
