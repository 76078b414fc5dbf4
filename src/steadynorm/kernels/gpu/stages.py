"""The four stages by Triton's kernels; names and arguments are those of reference/__init__.py.

Each is one launch. `prepared.py` has calls whose policy is decided inside the reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.spec import Groups, Keep
from steadynorm.statistics.moments import Moments

from . import backward, forward
from . import plan as plans
from .plan import Plan, alike, empty_like
from .policies import COUNT, ROWS

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


def launch(kernel: Any, p: Plan, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on x's device, which need not be the current one."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[p.grid](*arguments, **constants)
    else:
        kernel[p.grid](*arguments, **constants)


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


def run_moments(
    x: Tensor, p: Plan, rows: Tensor, mask: Tensor | None, *decided: Any, **policy: Any
) -> None:
    """The kernel `moments`; `decided` are its arguments from `weight` to `known`."""
    alone = p.parts * p.grid[2] == 1
    parts = None if alone else new_rows(x, 4 * p.parts, p.groups)
    launch(
        forward.moments, p, x,
        x, mask, plans.starts(p.groups, x.device), parts,
        None if alone else plans.tickets(p.blocks, x.device), rows, *decided, *p.sizes(),
        WELFORD=p.four, ALONE=alone, **p.tile(),
        **p.reduction(x.element_size(), light=mask is None), **policy,
    )  # fmt: skip


def moments(x: Tensor, *, mask: Tensor | None = None, groups: Groups = None) -> Moments:
    """Count, mean and biased variance per channel, over valid positions where a mask is given."""
    rows = new_rows(x, ROWS, groups)
    p = plan_of(x, groups)
    mask = None if mask is None else mask.contiguous()
    run_moments(x, p, rows, mask, None, None, None, None, None, 1.0, 0.0, 0.0, -1.0)
    measured = rows[COUNT.value : COUNT.value + 4]
    count, mean, low, var = measured if groups is not None else measured[:, 0]
    values: Any = count[..., :1]
    if groups is None:
        values = p.rows * (1 if p.last else p.columns) if mask is None else values
    return Moments(values, mean, var, low)


def run_apply(
    x: Tensor, p: Plan, y: Tensor, rows: Tensor | None, residual: Tensor | None,
    activation: str | None, signs: Tensor | None, *running: Any, fixed: bool = False,
) -> None:  # fmt: skip
    """The kernel `apply`; `running` are its arguments from `weight` to `eps`."""
    launch(
        forward.apply, p, x,
        x, residual, y, signs, plans.starts(p.groups, x.device), rows, *running, *p.sizes(), p.RB,
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
    y, rows = empty_like(x), stacked(x, center, scale, shift)
    residual = None if residual is None else alike(residual, x)
    nothing = (None,) * 5
    run_apply(x, plan_of(x, groups), y, rows, residual, activation, signs, *nothing, 1.0)
    return y


def stacked(x: Tensor, *channels: Tensor) -> Tensor:
    """Arrays per channel, (C,) or (G, C), as the rows of one float32 tensor."""
    rows = [torch.as_tensor(t, device=x.device).float() for t in channels]
    shape = torch.broadcast_shapes(*(t.shape for t in rows), (x.shape[1],))
    return torch.stack([t.expand(shape) for t in rows])


class Read:
    """What both backward stages read: grad and what the activation's derivative is taken from."""

    def __init__(
        self, grad: Tensor, x: Tensor, *, y: Tensor | None, residual: Tensor | None,
        signs: Tensor | None, activation: str | None, groups: Groups,
    ) -> None:  # fmt: skip
        self.x, self.p, self.activation = x, plan_of(x, groups), activation
        self.kept = (
            None if activation is None
            else "signs" if signs is not None
            else "rebuilt" if y is None
            else "output"
        )  # fmt: skip
        extra = {"output": y, "rebuilt": residual}.get(self.kept or "")
        self.tensors = (alike(grad, x), x, None if extra is None else alike(extra, x), signs)
        self.starts = plans.starts(self.p.groups, x.device)

    def constants(self) -> dict[str, Any]:
        """ACT, KEPT and the tile's."""
        return {"ACT": self.activation, "KEPT": self.kept, **self.p.tile(bits=True)}

    def reduce(self, rows: Tensor, sums: Tensor | None, *finished: Any, first: bool = True) -> None:
        """The kernel `reduce_grad`; `finished` are its arguments from `maps` to `rate`."""
        p, x = self.p, self.x
        parts = new_rows(x, 2 * p.parts, p.groups)
        row = ACTIVATIONS.get(self.activation or "")
        light = row is None or row.source != "input"  # else z, and often an exponential, of each
        launch(
            backward.reduce_grad, p, x,
            *self.tensors, self.starts, parts, plans.tickets(p.blocks, x.device), rows, sums,
            *finished, *p.sizes(), p.RB, FIRST=first,
            **p.reduction(x.element_size(), light=light),
            **self.constants(),
        )  # fmt: skip

    def results(self, *, need_x: bool, want: bool) -> tuple[Tensor | None, Tensor | None]:
        """Memory for dx, and for the residual's gradient if that is another than `grad`."""
        own = want and self.activation is not None
        return empty_like(self.x) if need_x else None, empty_like(self.x) if own else None

    def map(
        self, rows: Tensor, maps: Tensor | None, mask: Tensor | None, *, need_x: bool, want: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The kernel `apply_grad`, into `results`."""
        out = self.results(need_x=need_x, want=want)
        if any(t is not None for t in out):
            mask = None if mask is None else mask.contiguous()
            launch(
                backward.apply_grad, self.p, self.x,
                *self.tensors, mask, *out, self.starts, rows, maps, *self.p.sizes(), self.p.RB,
                **self.constants(),
            )  # fmt: skip
        return out


def reduce_grad(
    grad: Tensor,
    x: Tensor,
    center: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    signs: Tensor | None = None,
    activation: str | None = None,
    groups: Groups = None,
) -> tuple[Tensor, ...]:
    """`Σg` and `Σg·(x - center)` over all positions, with g the gradient before the activation."""
    read = Read(grad, x, y=y, residual=residual, signs=signs, activation=activation, groups=groups)
    sums = new_rows(x, 2, groups)
    read.reduce(stacked(x, center, scale, shift), sums, *(None,) * 5, 0.0)
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
    y: Tensor | None = None,
    residual: Tensor | None = None,
    signs: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    groups: Groups = None,
    want_residual: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself if wanted."""
    read = Read(grad, x, y=y, residual=residual, signs=signs, activation=activation, groups=groups)
    rows, maps = stacked(x, center, scale, shift), stacked(x, slope, constant)
    dx, dresidual = read.map(rows, maps, mask, need_x=True, want=want_residual)
    assert dx is not None
    return dx, grad if want_residual and activation is None else dresidual
