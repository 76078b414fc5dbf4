"""The four stages by Triton's kernels; names and arguments are those of reference/__init__.py.

Each is one launch. `prepared.py` has calls whose policy is decided inside the reduction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.reference.gradient_sources import GradientSources, Kept
from steadynorm.kernels.spec import Groups, Keep
from steadynorm.statistics.moments import Moments

from . import backward, forward, replay
from . import plan as plans
from .plan import Plan, alike
from .policies import COUNT, ROWS

if TYPE_CHECKING:
    from typing_extensions import Unpack

KEPT = {
    Keep.NOTHING: None,
    Keep.OUTPUT: "output",
    Keep.REBUILT: "rebuilt",
    Keep.SIGNS: "signs",
}
"""What the kernels call what a backward keeps."""


def planned(x: Tensor, groups: Groups = None) -> Plan | str:
    """The plan for an input, or why there is none."""
    count = plans.multiprocessors(x.device)
    return plans.plan(x.shape, x.stride(), x.element_size(), groups, count)


def plan_of(x: Tensor, groups: Groups = None) -> Plan:
    """The plan for an input that the backend supports."""
    found = planned(x, groups)
    if isinstance(found, str):
        raise ValueError(f"`x` cannot be read by the GPU kernels: {found}; got {x.shape}.")
    return found


def new_rows(x: Tensor, number: int, groups: Groups) -> Tensor:
    """Uninitialized rows (number, G, C) in float32."""
    shape = (number, len(groups or (0,)), x.shape[1])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def empty_signs(x: Tensor, groups: Groups = None) -> Tensor:
    """Uninitialized memory for one bit for each output."""
    return torch.empty(plan_of(x, groups).sign_bytes, dtype=torch.uint8, device=x.device)


def outputs_for(signs: Tensor, x: Tensor, groups: Groups = None) -> Tensor:
    """1 where the signs let a gradient through, else 0: as good as y to the derivative."""
    p = plan_of(x, groups)
    bits = (signs[:, None] >> torch.arange(8, device=signs.device)) & 1
    lines = (p.A // 2, p.B // 4, 2, 4) if p.four else (p.A, p.B // 8, 1, 8)
    tiles = bits.view(-1, p.RB, p.blocks, p.SQ, *lines)
    # (group, row block, half, line | block, column block, byte, bit)
    tiles = tiles.permute(0, 1, 6, 4, 2, 3, 5, 7)
    across = (p.blocks * p.SQ * p.B,) if p.last else (p.blocks, p.SQ * p.B)
    spread = tiles.reshape(len(p.groups or (0,)), p.RB * p.A, *across)[..., : p.columns]
    parts = [spread[g, :n] for g, n in enumerate(p.groups or (p.rows,))]
    flat = torch.cat(parts).to(x.dtype).contiguous().untyped_storage()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(flat, 0, x.shape, x.stride())


def partial_values(x: Tensor, p: Plan, number: int) -> int:
    """How many values the programs of a reduction leave, `number` each for a channel."""
    return number * p.parts * len(p.groups or (0,)) * x.shape[1]


def workspace_for(x: Tensor, p: Plan, number: int) -> tuple[Tensor, Tensor]:
    """Partials of `number` values a program, and the tickets that tell the last program."""
    space = plans.workspace(x, plans.stream_of(x), p.blocks, partial_values(x, p, number))
    return space.partials, space.tickets


def laid_out(t: Tensor, x: Tensor, name: str) -> Tensor:
    """`t` in x's type and layout, if it has x's shape."""
    if t.shape != x.shape:
        raise ValueError(f"`{name}` must have x's shape {tuple(x.shape)}; got {tuple(t.shape)}.")
    return alike(t, x)


def run_moments(
    x: Tensor, p: Plan, parts: Tensor | None, tickets: Tensor | None, starts: Tensor | None,
    rows: Tensor, mask: Tensor | None, *decided: Any, **policy: Any,
) -> None:  # fmt: skip
    """The kernel `moments`; `decided` are its arguments from `weight` to `known`."""
    replay.launch(
        forward.moments, p, x,
        x, mask, starts, parts, tickets, rows, *decided, *p.sizes(), WELFORD=p.four, ALONE=p.alone,
        **p.tile(), **p.reduction(x.element_size(), light=mask is None), **policy,
    )  # fmt: skip


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    rows = new_rows(x, ROWS, groups)
    p = plan_of(x, groups)
    mask = None if mask is None else mask.contiguous()
    scratch = (None, None) if p.alone else workspace_for(x, p, 4)
    starts = plans.starts(p.groups, x.device)
    run_moments(
        x, p, *scratch, starts, rows, mask, None, None, None, None, None, 1.0, 0.0, 0.0, -1.0
    )
    measured = rows[COUNT.value : COUNT.value + 4]
    count, mean, low, var = measured if groups is not None else measured[:, 0]
    values: Any = count[..., :1]
    if groups is None:
        values = p.rows * (1 if p.last else p.columns) if mask is None else values
    return Moments(values, mean, var, low)


def run_apply(
    x: Tensor, p: Plan, y: Tensor, starts: Tensor | None, rows: Tensor | None,
    residual: Tensor | None, activation: str | None, signs: Tensor | None, *running: Any,
    fixed: bool = False,
) -> None:  # fmt: skip
    """The kernel `apply`; `running` are its arguments from `weight` to `eps`."""
    p = p.for_maps()
    replay.launch(
        forward.apply, p, x,
        x, residual, y, signs, starts, rows, *running, *p.sizes(), p.RB,
        ACT=activation, FIXED=fixed, **p.tile(bits=True),
    )  # fmt: skip


def apply(
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
    signs: Tensor | None = None,
) -> Tensor:
    """`activation((x - center)·scale + shift + residual)`; the sign bits into `signs`."""
    y, rows = torch.empty_like(x), stacked(x, center, scale, shift)
    residual = None if residual is None else laid_out(residual, x, "residual")
    p, nothing = plan_of(x, groups), (None,) * 5
    starts = plans.starts(p.groups, x.device)
    run_apply(x, p, y, starts, rows, residual, activation, signs, *nothing, 1.0)
    return y


def stacked(x: Tensor, *channels: Tensor) -> Tensor:
    """Arrays per channel, (C,) or (G, C), as the rows of one float32 tensor."""
    rows = [torch.as_tensor(t, device=x.device).float() for t in channels]
    shape = torch.broadcast_shapes(*(t.shape for t in rows), (x.shape[1],))
    return torch.stack([t.expand(shape) for t in rows])


class Read(NamedTuple):
    """What both backward kernels read, and what they take the activation's derivative from."""

    x: Tensor
    p: Plan
    tensors: tuple[Tensor | None, ...]
    """grad, x, `extra` and the sign bits."""
    starts: Tensor | None
    activation: str | None
    kept: str | None

    @classmethod
    def of(cls, sources: GradientSources, x: Tensor) -> Read:
        """What a stage was given, as arguments of the kernels."""
        p = plan_of(x, sources.groups)
        extra = sources.y if sources.residual is None else sources.residual
        tensors = (sources.grad, x, extra, sources.signs)
        starts = plans.starts(p.groups, x.device)
        return cls(x, p, tensors, starts, sources.activation, KEPT[sources.keep])

    def constants(self) -> dict[str, Any]:
        """ACT, KEPT and the tile's."""
        return {"ACT": self.activation, "KEPT": self.kept, **self.p.tile(bits=True)}

    def reduce(
        self, parts: Tensor | None, tickets: Tensor | None, rows: Tensor, sums: Tensor | None,
        *finished: Any, first: bool = True,
    ) -> None:  # fmt: skip
        """The kernel `reduce_grad`; `finished` are its arguments from `maps` to `rate`."""
        row = ACTIVATIONS.get(self.activation or "")
        light = row is None or row.source != "input"  # else z, and often an exponential, of each
        replay.launch(
            backward.reduce_grad, self.p, self.x,
            *self.tensors, self.starts, parts, tickets, rows, sums, *finished, *self.p.sizes(),
            self.p.RB, FIRST=first, **self.p.reduction(self.x.element_size(), light=light),
            **self.constants(),
        )  # fmt: skip

    def map(
        self, rows: Tensor, maps: Tensor | None, mask: Tensor | None, dx: Tensor | None,
        dresidual: Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel `apply_grad`, into `dx` and `dresidual`."""
        p = self.p.for_maps()
        replay.launch(
            backward.apply_grad, p, self.x,
            *self.tensors, mask, dx, dresidual, self.starts, rows, maps, *p.sizes(), p.RB,
            **self.constants(),
        )  # fmt: skip


def reduce_grad(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, **kept: Unpack[Kept]
) -> tuple[Tensor, ...]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    sources = GradientSources.of(laid_out, grad, x, **kept)
    read, groups = Read.of(sources, x), sources.groups
    sums, scratch = new_rows(x, 2, groups), workspace_for(x, read.p, 2)
    read.reduce(*scratch, stacked(x, center, scale, shift), sums, *(None,) * 5, 0.0)
    return tuple(sums.unbind() if groups is not None else sums[:, 0].unbind())


def apply_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    constant: Tensor,
    *,
    mask: Tensor | None = None,
    want_residual: bool = False,
    **kept: Unpack[Kept],
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted."""
    sources = GradientSources.of(laid_out, grad, x, **kept)
    rows, maps = stacked(x, center, scale, shift), stacked(x, slope, constant)
    dx, writes = torch.empty_like(x), sources.is_written(want_residual)
    dresidual = torch.empty_like(x) if writes else None
    mask = None if mask is None else mask.contiguous()
    Read.of(sources, x).map(rows, maps, mask, dx, dresidual)
    return dx, dresidual if writes or not want_residual else grad
