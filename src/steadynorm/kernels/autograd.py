"""The one autograd function of every backend, and the path for compilation and transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steadynorm.kernels import aten, compat
from steadynorm.kernels.checks import check_export
from steadynorm.kernels.cpu import operators
from steadynorm.kernels.reference.differentiable import (
    differentiable,
    live_moments,
    second_order,
    several_at_once,
    without_gradient,
)
from steadynorm.kernels.reference.torch_arrays import moments_at_once, reference
from steadynorm.kernels.spec import Backend, Call, Packed, Saved


class Normalize(torch.autograd.Function):
    """Forward and backward of a backend; second derivatives in plain operations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        backend: Backend,
    ) -> Tensor:
        y, (tensors, ctx.rest) = backend.forward(call)
        ctx.backend = backend
        ctx.save_for_backward(*tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, needs = (ctx.saved_tensors, ctx.rest), ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = second_order(ctx.backend, ctx.backend.unpack(saved), grad, needs)
        elif compat.is_batched(grad) or compat.is_transforming():
            gradients = several_at_once(ctx.backend, ctx.backend.unpack(saved), grad, needs)
        else:
            gradients = ctx.backend.backward(saved, grad, needs)
        return *gradients, None, None


normalize = compat.direct_apply(Normalize)


class Traced(Backend):
    """The call in operations that PyTorch differentiates, transforms, compiles or exports."""

    name = "traced"

    def supports(self, call: Call) -> str | None:
        """Only while compiling, tracing or transforming."""
        return None if compat.is_traced() else "PyTorch neither compiles nor transforms this call"

    def forward(self, call: Call) -> tuple[Tensor, Packed]:
        """y, by operators that keep the kernels whole where compiled code may call these."""
        if call.memory is not None and not _may_remember():
            raise NotImplementedError(
                f"statistics={call.policy!r} keeps a memory that moves in the backward pass, which "
                f"torch.func, forward mode and torch.jit.trace do not follow. Use "
                f"sn.Steady(window=None) there."
            )
        x, measured = call.x, not call.by_running
        if _is_exported():
            if aten.is_one_operator(call):
                return aten.one_operator(call), ((), None)
            compiled, onnx = torch.compiler.is_compiling(), torch.onnx.is_in_onnx_export()
            check_export(call.policy, grouped=bool(call.groups), compiled=compiled, onnx=onnx)
        by_operators = operators.serve(call)
        live = None
        if measured and by_device(call):
            live = moments_at_once(x)
        elif measured:
            moments = operators.moments if by_operators else reference.moments
            live = moments(x, mask=call.mask, groups=call.groups)
        batch, normalizer = call.decide(None if live is None else without_gradient(live))
        saved = Saved(
            x, call.weight, call.bias, call.residual, call.mask, None, None, batch, normalizer,
            None, call.eps, call.activation, call.groups, call.replicas, None, call.memory,
        )  # fmt: skip
        live = None if by_operators or live is None else live_moments(saved, live)
        y = operators.apply(saved) if by_operators else differentiable(saved, live)
        return y, ((), None)


TRACED = Traced()


def by_device(call: Call) -> bool:
    """Whether the call is one of PyTorch's operator and its device's numerics will do."""
    return call.basic and not call.exact and not call.x.is_cpu and call.x.numel() > 0


def _may_remember() -> bool:
    """Whether the operator, whose backward moves the memory, can stand for the call."""
    return torch.compiler.is_compiling() and not compat.is_transforming()


def _is_exported() -> bool:
    if torch.compiler.is_compiling():
        return compat.is_exporting()
    return torch.onnx.is_in_onnx_export() or compat.is_jit_tracing()
