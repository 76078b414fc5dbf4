"""The stages on CPU, compiled by Numba."""

from .kernels import backward_kernel, forward_kernel, warmup
from .signs import outputs_for, signs_for
from .stages import (
    apply,
    apply_grad,
    calls,
    moments,
    normalize,
    normalize_grad,
    reduce_grad,
    takes,
)

__all__ = [
    "apply", "apply_grad", "backward_kernel", "calls", "forward_kernel", "moments", "normalize",
    "normalize_grad", "outputs_for", "reduce_grad", "signs_for", "takes", "warmup",
]  # fmt: skip
