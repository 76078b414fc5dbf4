"""Which kernel serves a call, in one table, and why."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm._extras import lacking
from steadynorm.kernels import eager, native

# Values in the input up to which PyTorch's own operator beats a Python autograd node, for plain
# calls: the crossover that benchmarks/small_calls.py measures, in docs/speed.md.
NATIVE_LIMIT = 1 << 13

HAS_NUMBA = find_spec("numba") is not None


def _never() -> bool:
    return False


# torch before 2.7 does not tell export from compilation.
is_exporting = getattr(torch.compiler, "is_exporting", _never)


class Choice(NamedTuple):
    """The kernel that would run (`native`, `cpu`, `eager` or `traced`), and why."""

    kernel: str
    why: str


@lru_cache(maxsize=1)
def _cpu_kernels() -> tuple[ModuleType | None, str]:
    try:
        from steadynorm.kernels import cpu
    except ImportError as error:  # numba does not install on every platform
        return None, f"the CPU kernels cannot be loaded ({lacking(error) or error})"
    return cpu, ""


def cpu_kernels() -> ModuleType:
    """The CPU kernels, for callers that have made sure of them."""
    found, trouble = _cpu_kernels()
    if found is None:
        raise RuntimeError(trouble)
    return found


def needs_plain_operations() -> bool:
    """Whether PyTorch has to see through the layer: compilation, transforms, forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def plain_call(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    *,
    training: bool,
) -> Any:
    """What serves a plain call by its `train` and `infer`; None if the general node has to.

    Plain: policy `Batch` or inference, no mask, no replicas, non-finite values propagate.
    """
    if x.__class__ is not Tensor or x.ndim < 2 or needs_plain_operations():
        return None
    if (
        _native_pays(x)
        and (not training or native_sums_well(x))
        and _native_goes_with(x, weight, running_mean, running_var)
    ):
        return native
    tracked_or_not = (running_mean is None) is (running_var is None)
    if tracked_or_not and x.is_cpu and _cpu_kernels()[0] is not None:
        around = (weight, bias, running_mean, running_var)
        return _plain_node().prepare(x, residual, activation, *around)
    return None


@lru_cache(maxsize=1)
def _plain_node() -> ModuleType:
    from steadynorm.kernels import plain

    return plain


def _native_pays(x: Tensor) -> bool:
    return x.numel() <= NATIVE_LIMIT or not x.is_cpu


def _native_goes_with(
    x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None
) -> bool:
    """Whether PyTorch's own operator takes these together; False also for what is amiss."""
    channels = x.size(1)
    kind = x.dtype if weight is None else weight.dtype
    if kind is not x.dtype and (kind is not torch.float32 or x.dtype not in native.HALF):
        return False
    for channel in (weight, running_mean, running_var):
        if channel is not None and (channel.dtype is not kind or channel.numel() != channels):
            return False
    return (running_mean is None) is (running_var is None)


def native_sums_well(x: Tensor) -> bool:
    """Whether PyTorch's operator measures this batch to the project's bar.

    Over planes of contiguous (N, C, *) it sums in float64; over rows of (N, C) or channels_last one
    by one in float32: off by 9e-7 at 64 rows and mean 1e6, by 3e-6 at 256, by 3e-5 at 16384.
    """
    return (x.is_contiguous() and x.stride(1) > 1) or x.numel() <= 64 * x.size(1)


def compiler_calls_cpu_kernels(x: Tensor) -> bool:
    """Whether compiled code should call the CPU kernels: not where it is to run elsewhere later."""
    return (
        HAS_NUMBA
        and x.is_cpu
        and torch.compiler.is_compiling()
        and not is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def stages_for(x: Tensor, residual: Tensor | None) -> ModuleType:
    """The module whose four stages serve this input: `cpu`, or `eager` for all the rest."""
    if x.is_cpu and x.__class__ is Tensor:
        cpu, _ = _cpu_kernels()
        if cpu is not None and cpu.takes(x, residual=residual) is None:
            return cpu
    return eager


def explain(
    x: Tensor,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: str = "batch",
) -> Choice:
    """Which kernel a layer would run on this input, and why.

    >>> import torch
    >>> explain(torch.randn(2, 16, 4, 4)).kernel
    'native'
    >>> explain(torch.randn(32, 64, 28, 28)).kernel
    'cpu'
    """
    if needs_plain_operations():
        return Choice("traced", "PyTorch is compiling or transforming this call")
    plain = statistics in ("batch", "frozen") and mask is None and x.__class__ is Tensor
    if plain and x.ndim > 1 and _native_pays(x):
        size = f"{x.numel()} values, up to {NATIVE_LIMIT}"
        return Choice("native", size if x.is_cpu else "a plain call on an accelerator")
    cpu, trouble = _cpu_kernels()
    refused = trouble if cpu is None else cpu.takes(x, residual=residual)
    if refused is None:
        return Choice("cpu", "a CPU tensor of a type and layout that the compiled kernels take")
    return Choice("eager", refused)
