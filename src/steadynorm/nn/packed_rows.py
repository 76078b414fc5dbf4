"""A cell over packed sequences: the rows of time step 0 first, the longest sequence first."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steadynorm.nn.recurrent_checks import State


def read(
    cell: Any, rows: Tensor, sizes: tuple[int, ...], state: State, start: int
) -> tuple[Tensor, State]:
    """One cell over packed rows, from time step `start` on: its h at every row, and last states."""
    terms = cell.input_norm.sequence(F.linear(rows, cell.weight_ih), sizes, start)
    served = [norm.serving(start, len(sizes)) for norm in (cell.hidden_norm, cell.cell_norm)]
    done: list[Tensor] = []
    ended: list[State] = []
    for time, (term, *pair) in enumerate(zip(terms, *served, strict=True), start):
        h, c = state
        if term.shape[0] < h.shape[0]:
            ended.append((h[term.shape[0] :], c[term.shape[0] :]))
            state = (h[: term.shape[0]], c[: term.shape[0]])
        state = cell.advance(term, state, time, pair)
        done.append(state[0])
    if ended:  # the shortest sequences stand last
        parts = [state, *reversed(ended)]
        state = (torch.cat([h for h, _ in parts]), torch.cat([c for _, c in parts]))
    kind = terms[0].dtype  # autocast's; the recurrence itself adds up in the states' type
    return torch.cat(done).to(kind), (state[0].to(kind), state[1].to(kind))


def backwards(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """For packed rows, where each sequence's rows in reverse order come from; its own inverse."""
    host: Any = {"device": "cpu"}  # whatever the default device is
    rows = sum(sizes)  # a number, not read from a tensor: for graphs
    starts = torch.tensor([0, *accumulate(sizes)], **host)
    per_step = torch.tensor(sizes, **host)
    time = torch.arange(len(sizes), **host).repeat_interleave(per_step, output_size=rows)
    sample = torch.arange(rows, **host) - starts[time]
    length = (per_step.unsqueeze(1) > torch.arange(sizes[0], **host)).sum(0)
    return (starts[length[sample] - 1 - time] + sample).to(device)
