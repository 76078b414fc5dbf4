"""Interfaces of PyTorch that are not public: each with why, and what serves in its place.

Tested with torch 2.13.0 (all tests), 2.7.1 and 2.15.0 (docs/install.md). Those that have no other
form stand where they are used:

- `torch.nn.modules.batchnorm._BatchNorm` and `_LazyNormBase`: the classes by which everybody
  tells a batch norm;
- `_parameters`, `_buffers`, `_modules` and the hooks of a module: surgery replaces entries, and
  reading a name there costs a small call 0.4 µs less;
- `_DEFAULT_OP_LIST_TO_FUSER_METHOD` of `torch.ao.quantization`: which types `fuse_modules` knows
  (nn/eager_quantization.py);
- `torch.ops._c10d_functional`: collectives that the compiler sees;
- `torch._foreach_copy_`: several small copies in one launch;
- `torch._C._cuda_getCurrentRawStream`: a device's current stream (kernels/gpu/plan.py);
- `_dynamo_marked_constant`: what the compiler calls as it traces (kernels/checks.py);
- `torch.utils._python_dispatch.TorchDispatchMode`: which operators a model runs (models/graph.py);
- a node's `_register_hook_dict` and `_saved_input`, before 2.14 (reference/differentiable.py);
- the path of `torch._C`: PyTorch's OpenMP threads (kernels/cpu/runtime.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules

is_compiling: Callable[[], bool] = torch.compiler.is_compiling
is_exporting: Callable[[], bool] = torch.compiler.is_exporting

# What decides whether a result is right has no default: a torch without it fails at the import.

# `torch.jit.trace`, and ONNX export by it; the public function costs three times as much.
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing

# Inside `vmap`, `grad`, `jvp` and the like; there is no public way to know.
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active

# The backward pass that this thread runs, -1 for none: how a recomputation is told apart.
graph_task: Callable[[], int] = torch._C._current_graph_task_id

# The node whose backward runs, for its hooks, which are not told.
current_node: Callable[[], Any] = torch._C._current_autograd_node

# Whether a gradient is one of `autograd.grad(is_grads_batched=True)`, which has no memory.
is_batched: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# How many modes record every operator, as make_fx does; a kernel over raw memory is none.
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack

# The innermost pair of hooks on saved tensors, or None; activation checkpointing runs its first
# forward under such. torch 2.7 cannot be asked: perhaps.
saved_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def is_traced() -> bool:
    """Whether PyTorch has to see through the call: compilation, transforms, forward mode."""
    return is_compiling() or is_jit_tracing() or is_transforming() or forward_ad._current_level >= 0


def has_global_hooks() -> bool:
    """Whether hooks run at the call of every module; torch 2.7 has no function that tells."""
    return bool(
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def is_recomputed_when_compiled() -> bool:
    """Whether the operator being traced lies in a region under activation checkpointing."""
    from torch.fx.traceback import current_meta
    from torch.utils.checkpoint import CheckpointPolicy as Policy

    again = (Policy.PREFER_RECOMPUTE, Policy.MUST_RECOMPUTE)
    return current_meta.get("recompute") in again


def leave_unchecked(saved: Any) -> None:
    """Let a compiled graph save a tensor that may change before its backward.

    As autograd does with what stands in `ctx` itself. torch before 2.13 cannot: there a backward
    fails, with autograd's own error, if another one has come between it and its forward.
    """
    from torch.fx.experimental import proxy_tensor

    for proxy in getattr(proxy_tensor, "_get_proxies", lambda _: ())(saved):
        proxy.node.meta["saved_tensor_with_no_vc_check"] = True


def direct_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its own look for transforms, which the caller has ruled out.

    That look costs 1.5 µs of 20 for a small call.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc, no-any-return]
