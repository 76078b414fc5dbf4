"""Whether calling a module runs more than its forward."""

from __future__ import annotations

from torch import nn


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own, forward or backward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
