"""Launches, noted when a kind of call first runs and repeated with other addresses.

At every launch Triton decides anew what each of some forty arguments is, which takes the host
twenty times as long as to repeat the launch (benchmarks/host_time.py), and longer than small
kernels run. Calls of one kind differ in addresses alone, which compiled kernels take as integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan

ALIGNED = 16
"""Bytes: what Triton takes addresses to be multiples of, if they were when it compiled."""


class _Noted(NamedTuple):
    """One launch as Triton made it."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]


_noted: ContextVar[list[_Noted] | None] = ContextVar("noted", default=None)


def launch(kernel: Any, plan: Plan, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on x's device, which need not be the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            compiled = kernel[plan.grid](*arguments, **constants)
    else:
        compiled = kernel[plan.grid](*arguments, **constants)
    noted = _noted.get()
    if noted is not None and compiled is not None:  # interpreted kernels leave nothing to repeat
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        bound = [given.get(parameter.name, parameter.default) for parameter in kernel.params]
        noted.append(_Noted(compiled, plan.grid, bound))


class Replay:
    """The launches of one kind of call, with the addresses of its tensors left open.

    `tensors` are all that the launches read or write, in the same order at every call; which of
    them are None, their types and their strides are the kind's.
    """

    def __init__(self, noted: list[_Noted], tensors: Sequence[Tensor | None]) -> None:
        place = {id(t): k for k, t in enumerate(tensors) if t is not None}
        constants: list[Any] = []
        self.launches: list[tuple[Any, ...]] = []
        for compiled, grid, arguments in noted:
            picked = []
            for value in arguments:
                if isinstance(value, Tensor):
                    picked.append(place[id(value)])
                else:
                    picked.append(len(tensors) + len(constants))
                    constants.append(value)
            run, pick = compiled.run, itemgetter(*picked)  # reading `run` loads `function`
            self.launches.append((run, grid, compiled.function, compiled.packed_metadata, pick))
        self.constants = tuple(constants)

    def __call__(self, stream: int, addresses: tuple[int, ...]) -> bool:
        """Launch; False, and nothing done, where an address is not aligned. 0 is no tensor."""
        if reduce(or_, addresses) % ALIGNED:
            return False
        values = addresses + self.constants
        for run, (x, y, z), function, metadata, pick in self.launches:
            run(x, y, z, stream, function, metadata, None, None, None, *pick(values))
        return True


def note(
    tensors: Sequence[Tensor | None], launches: Callable[..., None], *arguments: Any
) -> Replay | None:
    """Call `launches(*arguments)`. Returns how to repeat it, if it can be repeated."""
    noted: list[_Noted] = []
    token = _noted.set(noted)
    try:
        launches(*arguments)
    finally:
        _noted.reset(token)
    can = noted and _can_be_noted([t for t in tensors if t is not None])
    return Replay(noted, tensors) if can else None


def is_current(x: Tensor) -> bool:
    """Whether x lies on the current device, to which launches are made."""
    return not x.is_cuda or x.get_device() == torch.cuda.current_device()


def _can_be_noted(tensors: list[Tensor]) -> bool:
    """Whether addresses are aligned, and tell one argument from another.

    A tensor that is two arguments at once, as `layer(x, residual=x)`, is two in another call.
    """
    aligned = all(t.data_ptr() % ALIGNED == 0 for t in tensors)
    return aligned and len({id(t) for t in tensors}) == len(tensors)
