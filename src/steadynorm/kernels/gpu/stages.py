"""The four stages by Triton's kernels; names and arguments are those of reference/__init__.py.

Each is one launch. `prepared.py` has calls whose policy is decided inside the reduction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.reference import Groups
from steadynorm.kernels.reference.gradient_sources import GradientSources, Kept
from steadynorm.kernels.spec import Keep
from steadynorm.statistics.moments import Moments

from . import backward, forward, replay
from . import plan as plans
from .plan import Plan, laid_out_as
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
    plan = plan_of(x, groups)
    bits = (signs[:, None] >> torch.arange(8, device=signs.device)) & 1
    lines = (
        (plan.tile_rows // 2, plan.tile_columns // 4, 2, 4)
        if plan.four
        else (plan.tile_rows, plan.tile_columns // 8, 1, 8)
    )
    tiles = bits.view(-1, plan.row_blocks, plan.blocks, plan.column_splits, *lines)
    # (group, row block, half, line | block, column block, byte, bit)
    tiles = tiles.permute(0, 1, 6, 4, 2, 3, 5, 7)
    across = (
        (plan.blocks * plan.column_splits * plan.tile_columns,)
        if plan.last
        else (plan.blocks, plan.column_splits * plan.tile_columns)
    )
    spread = tiles.reshape(len(plan.groups or (0,)), plan.row_blocks * plan.tile_rows, *across)[
        ..., : plan.columns
    ]
    partials = [spread[g, :n] for g, n in enumerate(plan.groups or (plan.rows,))]
    flat = torch.cat(partials).to(x.dtype).contiguous().untyped_storage()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(flat, 0, x.shape, x.stride())


def partial_values(x: Tensor, plan: Plan, number: int) -> int:
    """How many values the programs of a reduction leave, `number` each for a channel."""
    return number * plan.parts * len(plan.groups or (0,)) * x.shape[1]


def workspace_for(x: Tensor, plan: Plan, number: int) -> tuple[Tensor, Tensor]:
    """Partials of `number` values a program, and the tickets that tell the last program."""
    space = plans.workspace(x, plans.stream_of(x), plan.blocks, partial_values(x, plan, number))
    return space.partials, space.tickets


def laid_out(t: Tensor, x: Tensor, name: str) -> Tensor:
    """`t` in x's type and layout, if it has x's shape."""
    if t.shape != x.shape:
        raise ValueError(f"`{name}` must have x's shape {tuple(x.shape)}; got {tuple(t.shape)}.")
    return laid_out_as(t, x)


def run_moments(
    x: Tensor, plan: Plan, partials: Tensor | None, tickets: Tensor | None, starts: Tensor | None,
    rows: Tensor, mask: Tensor | None, *decided: Any, **policy: Any,
) -> None:  # fmt: skip
    """The kernel `moments`; `decided` are its arguments from `weight` to `known`."""
    replay.launch(
        forward.moments, plan, x,
        x, mask, starts, partials, tickets, rows, *decided, *plan.sizes(), WELFORD=plan.four,
        ALONE=plan.alone, **plan.tile(), **plan.reduction(x.element_size(), light=mask is None),
        **policy,
    )  # fmt: skip


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    rows = new_rows(x, ROWS, groups)
    plan = plan_of(x, groups)
    mask = None if mask is None else mask.contiguous()
    scratch = (None, None) if plan.alone else workspace_for(x, plan, 4)
    starts = plans.starts(plan.groups, x.device)
    run_moments(
        x, plan, *scratch, starts, rows, mask, None, None, None, None, None, 1.0, 0.0, 0.0, -1.0
    )
    measured = rows[COUNT.value : COUNT.value + 4]
    count, mean, low, var = measured if groups is not None else measured[:, 0]
    values: Any = count[..., :1]
    if groups is None:
        values = plan.rows * (1 if plan.last else plan.columns) if mask is None else values
    return Moments(values, mean, var, low)


def run_apply(
    x: Tensor, plan: Plan, y: Tensor, starts: Tensor | None, rows: Tensor | None,
    residual: Tensor | None, activation: str | None, signs: Tensor | None, *running: Any,
    fixed: bool = False,
) -> None:  # fmt: skip
    """The kernel `apply`; `running` are its arguments from `weight` to `eps`."""
    plan = plan.for_maps()
    replay.launch(
        forward.apply, plan, x,
        x, residual, y, signs, starts, rows, *running, *plan.sizes(), plan.row_blocks,
        ACT=activation, FIXED=fixed, **plan.tile(bits=True),
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
    plan, nothing = plan_of(x, groups), (None,) * 5
    starts = plans.starts(plan.groups, x.device)
    run_apply(x, plan, y, starts, rows, residual, activation, signs, *nothing, 1.0)
    return y


def stacked(x: Tensor, *channels: Tensor) -> Tensor:
    """Arrays per channel, (C,) or (G, C), as the rows of one float32 tensor."""
    rows = [torch.as_tensor(t, device=x.device).float() for t in channels]
    shape = torch.broadcast_shapes(*(t.shape for t in rows), (x.shape[1],))
    return torch.stack([t.expand(shape) for t in rows])


class Read(NamedTuple):
    """What both backward kernels read, and what they take the activation's derivative from."""

    x: Tensor
    plan: Plan
    tensors: tuple[Tensor | None, ...]
    """grad, x, `extra` and the sign bits."""
    starts: Tensor | None
    activation: str | None
    kept: str | None

    @classmethod
    def of(cls, sources: GradientSources, x: Tensor) -> Read:
        """What a stage was given, as arguments of the kernels."""
        plan = plan_of(x, sources.groups)
        extra = sources.y if sources.residual is None else sources.residual
        tensors = (sources.grad, x, extra, sources.signs)
        starts = plans.starts(plan.groups, x.device)
        return cls(x, plan, tensors, starts, sources.activation, KEPT[sources.keep])

    def constants(self) -> dict[str, Any]:
        """ACT, KEPT and the tile's."""
        return {"ACT": self.activation, "KEPT": self.kept, **self.plan.tile(bits=True)}

    def reduce(
        self, partials: Tensor | None, tickets: Tensor | None, rows: Tensor, sums: Tensor | None,
        *finished: Any, first: bool = True, mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The kernel `reduce_grad`; `finished` are its arguments from `maps` to `rate`."""
        row = ACTIVATIONS.get(self.activation or "")
        light = row is None or row.source != "input"  # else z, and often an exponential, of each
        plan, itemsize = self.plan, self.x.element_size()
        replay.launch(
            backward.reduce_grad, plan, self.x,
            *self.tensors, mask, self.starts, partials, tickets, rows, sums, *finished,
            *plan.sizes(),
            plan.row_blocks, FIRST=first, **plan.reduction(itemsize, light=light),
            **self.constants(),
        )  # fmt: skip

    def map(
        self, rows: Tensor, maps: Tensor | None, mask: Tensor | None, dx: Tensor | None,
        dresidual: Tensor | None,
    ) -> None:  # fmt: skip
        """The kernel `apply_grad`, into `dx` and `dresidual`."""
        plan = self.plan.for_maps()
        replay.launch(
            backward.apply_grad, plan, self.x,
            *self.tensors, mask, dx, dresidual, self.starts, rows, maps, *plan.sizes(),
            plan.row_blocks, **self.constants(),
        )  # fmt: skip


def reduce_grad(
    grad: Tensor, x: Tensor, center: Tensor, scale: Tensor, shift: Tensor, **kept: Unpack[Kept]
) -> tuple[Tensor, ...]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    sources = GradientSources.of(laid_out, grad, x, **kept)
    read, groups = Read.of(sources, x), sources.groups
    sums, scratch = new_rows(x, 2, groups), workspace_for(x, read.plan, 2)
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
