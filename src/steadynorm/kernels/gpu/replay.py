"""Launches, noted when a kind of call first runs and repeated with other addresses.

At every launch Triton decides anew what each of some forty arguments is: 28 µs of a processor at
3 GHz, four times a training step, longer than the kernels run. Calls of one kind differ in
addresses alone, and a compiled kernel takes these as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import plan as plans
from .plan import Plan

ALIGNED = 16
"""Bytes: what Triton takes addresses to be multiples of, if they were when it compiled."""


class _Noted(NamedTuple):
    """One launch as Triton made it."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]


_noted: ContextVar[list[_Noted] | None] = ContextVar("noted", default=None)


def launch(kernel: Any, p: Plan, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on x's device, which need not be the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            compiled = kernel[p.grid](*arguments, **constants)
    else:
        compiled = kernel[p.grid](*arguments, **constants)
    noted = _noted.get()
    if noted is not None and compiled is not None:  # interpreted kernels leave nothing to repeat
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        bound = [given.get(q.name, q.default) for q in kernel.params]
        noted.append(_Noted(compiled, p.grid, bound))


class Replay:
    """The launches of one kind of call.

    `tensors` are all that a launch reads or writes, in the same order at every call; which of them
    are None, their types and their strides are the kind's.
    """

    def __init__(self, noted: list[_Noted], tensors: Sequence[Tensor | None]) -> None:
        self.present = [k for k, t in enumerate(tensors) if t is not None]
        place = {id(tensors[k]): n for n, k in enumerate(self.present)}
        self.constants: list[Any] = []
        self.launches: list[tuple[Any, ...]] = []
        for compiled, grid, arguments in noted:
            picked = []
            for value in arguments:
                if isinstance(value, Tensor):
                    picked.append(place[id(value)])
                else:
                    picked.append(len(self.present) + len(self.constants))
                    self.constants.append(value)
            run, pick = compiled.run, itemgetter(*picked)  # reading `run` loads `function`
            self.launches.append((run, grid, compiled.function, compiled.packed_metadata, pick))

    def __call__(self, tensors: Sequence[Tensor | None], device: int) -> bool:
        """Launch; False, and nothing done, where an address is not aligned."""
        pool: list[Any] = [tensors[k].data_ptr() for k in self.present]  # type: ignore[union-attr]
        low = 0
        for address in pool:
            low |= address
        if low % ALIGNED:
            return False
        pool += self.constants
        stream = plans.raw_stream(device)
        for run, grid, function, metadata, pick in self.launches:
            run(*grid, stream, function, metadata, None, None, None, *pick(pool))
        return True


def run(
    replay: Replay | None,
    tensors: Sequence[Tensor | None],
    x: Tensor,
    launches: Callable[..., None],
    *arguments: Any,
) -> Replay | None:
    """Repeat what was noted, or call `launches(*arguments)` and note. Returns what to repeat."""
    device = x.get_device()
    if (
        replay is not None
        and (device < 0 or device == torch.cuda.current_device())
        and replay(tensors, device)
    ):
        return replay
    noted: list[_Noted] = []
    token = _noted.set(noted)
    try:
        launches(*arguments)
    finally:
        _noted.reset(token)
    if replay is None and noted and _can_be_noted([t for t in tensors if t is not None]):
        return Replay(noted, tensors)
    return replay


def _can_be_noted(tensors: list[Tensor]) -> bool:
    """Whether addresses are aligned, and tell one argument from another.

    A tensor that is two arguments at once, as `layer(x, residual=x)`, is two in another call.
    """
    aligned = all(t.data_ptr() % ALIGNED == 0 for t in tensors)
    return aligned and len({id(t) for t in tensors}) == len(tensors)
