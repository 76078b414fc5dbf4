"""The CPU kernels as operators that torch.compile keeps whole.

What Inductor makes of batch normalization costs several times what they do (docs/speed.md).
Statistics between the operators stay visible to the compiler. Channel-sized arguments travel
stacked, since an operator's results must not share memory.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, impl, register_autograd, register_fake

from steadynorm.kernels import compat
from steadynorm.kernels.reference.closed_form import REFERENCE, ClosedForm
from steadynorm.kernels.reference.collectives import all_reduce
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import HALF, Call, Keep, Saved, coefficients_of, statistics_dtype
from steadynorm.statistics import Moments, Normalizer

from .backend import CPU

HAS_NUMBA = find_spec("numba") is not None


def serve(call: Call) -> bool:
    """Whether compiled code should call the operators.

    Always where a memory of the gradient moves in the backward pass, which no plain operations can
    say; else for the CPU kernels alone, and not where the code is to run elsewhere later.
    """
    if call.memory is not None:
        return True
    x, residual = call.x, call.residual
    return (
        HAS_NUMBA
        and torch.compiler.is_compiling()
        and not compat.is_exporting()
        and not compat.is_transforming()
        and call.replicas is None
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64, *HALF)
        and x.numel() > 0
        and (residual is None or residual.dtype == x.dtype)
        and (x.is_contiguous() or (x.ndim > 2 and x.movedim(1, -1).is_contiguous()))
    )


LIBRARY = Library("steadynorm", "FRAGMENT")
_SETTINGS = "float eps, str? activation, int[]? groups, str? replicas"
for schema in (
    "measure(Tensor x, Tensor? mask, int[]? groups) -> (Tensor, Tensor)",
    "apply(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
    f"Tensor normalizer, Tensor? batch, Tensor? memory, {_SETTINGS}) -> Tensor",
    "gradients(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
    "Tensor? mask, Tensor? y, Tensor normalizer, Tensor? batch, Tensor(a!)? memory, "
    f"{_SETTINGS}, bool want_residual) -> (Tensor, Tensor, Tensor, Tensor)",
):
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)


def _backend(x: Tensor, residual: Tensor | None = None) -> ClosedForm:
    """The kernels where they take such an input, else the reference."""
    if not x.is_cpu or CPU.load() is not None:
        return REFERENCE
    dtype = None if residual is None else residual.dtype
    refused = CPU.stages.unsupported(x.shape, x.stride(), x.dtype, dtype)
    return CPU if refused is None else REFERENCE


def _laid_out(t: Tensor | None, x: Tensor) -> Tensor | None:
    """A result of x's size in memory as compiled code expects it: as x is."""
    if t is None or t.shape != x.shape:
        return t
    made = torch.empty_like(x, dtype=t.dtype)
    return t if made.stride() == t.stride() else made.copy_(t)


def moments(x: Tensor, *, mask: Tensor | None, groups: tuple[int, ...] | None) -> Moments:
    """Moments of the batch, by the operator; nothing differentiates through them."""
    counts, stacked = torch.ops.steadynorm.measure(x.detach(), mask, groups)
    count: Any = counts if mask is not None or groups is not None else x.numel() // x.shape[1]
    return Moments(count, *stacked.unbind())


def apply(saved: Saved) -> Tensor:
    """The map by the operator, whose gradient is the closed form."""
    like = saved.normalizer.mean

    def stacked(parts: Any) -> Tensor:
        return torch.stack(
            [part.expand_as(like) if isinstance(part, Tensor) else torch.full_like(like, part)
             for part in parts]
        )  # fmt: skip

    batch = None if saved.batch is None else stacked(saved.batch)
    state, parts = None, tuple(saved.normalizer)
    if saved.memory is not None:  # the rate goes as one more row
        state, parts = saved.memory.state, (*parts, saved.memory.rate)
    replicas = None if saved.replicas is None else saved.replicas.name
    settings = (saved.eps, saved.activation, saved.groups, replicas)
    y: Tensor = torch.ops.steadynorm.apply(*saved[:5], stacked(parts), batch, state, *settings)
    return y


class _Group:
    """The replicas of a process group, for the backward."""

    def __init__(self, name: str) -> None:
        self.name = name

    def sum(self, sums: Tensor) -> Tensor:
        """The sums of the backward reduction, added over replicas."""
        return all_reduce(sums, self.name, "batch normalization in a compiled graph")

    def link(self, live: Moments) -> Moments:
        """Not needed: the operators are differentiated in closed form."""
        raise NotImplementedError


_ANYWHERE = "CompositeExplicitAutograd"


@impl(LIBRARY, "measure", _ANYWHERE)
def _(x: Tensor, mask: Tensor | None, groups: Any) -> Any:
    count, mean, var, low = _backend(x).stages.moments(x, mask=mask, groups=groups)
    counts = count.clone() if isinstance(count, Tensor) else mean.new_full((1,), count)
    return counts, torch.stack([mean, var, low])


@register_fake("steadynorm::measure", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, mask: Tensor | None, groups: Any) -> Any:
    rows = () if groups is None else (len(groups),)
    made = x.new_empty((3, *rows, x.shape[1]), dtype=statistics_dtype(x))
    return made.new_empty((*rows, 1)), made


@impl(LIBRARY, "apply", _ANYWHERE)
def _(
    x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, normalizer: Tensor, batch: Any,
    memory: Any, eps: float, activation: str | None, groups: Any, replicas: str | None,
) -> Any:  # fmt: skip
    known = coefficients_of(Normalizer(*normalizer[:6].unbind()), x, weight, bias, eps)
    options = {"residual": residual, "activation": activation, "groups": groups}
    return _laid_out(_backend(x, residual).stages.apply(x, *known[:3], **options), x)


@register_fake("steadynorm::apply", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Any, bias: Any, residual: Tensor | None, *_: Any) -> Tensor:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=dtype)


@impl(LIBRARY, "gradients", _ANYWHERE)
def _(
    grad: Tensor, x: Tensor, weight: Any, bias: Any, residual: Any, mask: Any, y: Any,
    normalizer: Tensor, batch: Any, memory: Any, eps: float, activation: str | None, groups: Any,
    replicas: str | None, want_residual: bool,
) -> Any:  # fmt: skip
    """Of x, weight, bias and residual; empty where there is none or none is wanted."""
    rows = normalizer.unbind()
    statistics = Normalizer(*rows[:6])
    known = coefficients_of(statistics, x, weight, bias, eps)
    measured = None if batch is None else Moments(*batch.unbind())
    remembered = None if memory is None else Memory(memory, rows[6])
    others = None if replicas is None else _Group(replicas)
    settings = (eps, activation, groups, others, grad.dtype, remembered)
    saved = Saved(x, weight, bias, residual, mask, y, None, measured, statistics, known, *settings)
    needs = (True, weight is not None, bias is not None, want_residual)
    gradients = _backend(x, residual).gradients(saved, grad, needs)
    return tuple(x.new_empty(0) if t is None else _laid_out(t, x) for t in gradients)


@register_fake("steadynorm::gradients", lib=LIBRARY)  # type: ignore[untyped-decorator]
def _(grad: Tensor, x: Tensor, weight: Any, bias: Any, *rest: Any) -> Any:
    like = torch.empty_like
    gradients = (like(x), *(None if t is None else like(t) for t in (weight, bias)))
    dresidual = like(x, dtype=grad.dtype) if rest[-1] else None
    return tuple(x.new_empty(0) if t is None else t for t in (*gradients, dresidual))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, mask, *statistics, memory, _, activation, _, _ = inputs
    kept = Keep.needed(activation, residual=residual is not None, compiled=True, signs=False)
    ctx.settings, ctx.want_residual = inputs[-4:], residual is not None and residual.requires_grad
    ctx.memory = memory  # moves in every backward: not under autograd's check of versions
    if memory is not None:
        compat.leave_unchecked(memory)
    rebuilds, y = kept is Keep.REBUILT, output if kept is Keep.OUTPUT else None
    ctx.save_for_backward(x, weight, bias, residual if rebuilds else None, mask, y, *statistics)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    activation = ctx.settings[1]
    # Without an activation the residual's gradient is the output's: no second copy of it.
    want = ctx.want_residual and activation is not None
    memory = ctx.memory if ctx.needs_input_grad[0] else None
    found = torch.ops.steadynorm.gradients(grad, *ctx.saved_tensors, memory, *ctx.settings, want)
    parameters = ctx.saved_tensors[1:3]
    dweight, dbias = (
        d if t is not None else None for d, t in zip(found[1:3], parameters, strict=True)
    )
    dresidual = (found[3] if want else grad) if ctx.want_residual else None
    return found[0], dweight, dbias, dresidual, *(None,) * 8


register_autograd("steadynorm::apply", _backward, setup_context=_setup, lib=LIBRARY)
