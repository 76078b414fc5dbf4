"""Operations that an accelerator launches for a layer, and their passes over the input.

    python benchmarks/launches.py

Counted on meta tensors, which have a shape and a layout but no values, so that no device is needed:
an accelerator gets the same operations. Nothing here is a time.

A pass reads or writes one tensor of the input's size and type once. PyTorch's batch normalization
reads its input twice in training, for the statistics and for the map, and so does its backward with
input and gradient; that is what its CUDA kernels do (aten/src/ATen/native/cuda/Normalization.cu).
An operation is at least one launch: that operator has 3 launches forward and 2 backward there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import steadynorm as sn

SHAPE = (8, 64, 16, 16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {"BN": (None, False), "BN + ReLU": ("relu", False), "BN + add + ReLU": ("relu", True)}
POLICIES = {
    "torch.nn": None,
    "Batch": sn.Batch(),
    "Batch, exact": sn.Batch(),
    "Steady": sn.Steady(),
}

READS_TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}  # tensors
NO_LAUNCH = {
    "detach", "view", "_unsafe_view", "reshape", "unbind", "select", "slice", "unsqueeze",
    "expand", "alias", "permute", "as_strided", "t", "transpose", "squeeze", "promote_types",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor",
}  # fmt: skip
"""Views and memory without a kernel; a scalar tensor is made on the host."""


class Count(NamedTuple):
    """Passes over the input, operations on tensors of its size, and on smaller ones."""

    passes: float
    large: int
    small: int


class Counter(TorchDispatchMode):
    """Counts what runs beneath it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.values, self.unit = x.numel(), x.numel() * x.element_size()
        self.moved, self.operations = 0.0, {True: 0, False: 0}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Runs the operation and notes what it reads and writes."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in NO_LAUNCH:
            return result
        inputs = {key: value for key, value in (kwargs or {}).items() if key != "out"}
        read = [t for t in tree_leaves((args, inputs)) if isinstance(t, Tensor)]
        read = read[1:] if name == "copy_" else read  # the first is written alone
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        large = [t for t in read if t.numel() == self.values]
        if name in READS_TWICE and args[5 if name == "native_batch_norm" else 7]:
            large += large[: READS_TWICE[name]]
        large += [t for t in written if t.numel() == self.values]
        self.moved += sum(t.numel() * t.element_size() for t in large)
        self.operations[bool(large)] += 1
        return result

    @property
    def count(self) -> Count:
        """What has run so far."""
        return Count(self.moved / self.unit, self.operations[True], self.operations[False])


def layer_for(policy: str, activation: str | None, device: str = "meta") -> Any:
    """A layer of ours; for "torch.nn" a function of torch's layers."""
    if policy == "torch.nn":
        norm = torch.nn.BatchNorm2d(SHAPE[1], device=device)

        def layer(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y: Tensor = norm(x)
            y = y if residual is None else y.add_(residual)
            return y if activation is None else torch.relu_(y)

        layer.eval = norm.eval  # type: ignore[attr-defined]
        return layer
    numerics = "exact" if policy.endswith("exact") else "device"
    settings = {"activation": activation, "numerics": numerics, "device": device}
    return sn.BatchNorm2d(SHAPE[1], statistics=POLICIES[policy], **settings)


def tensors(dtype: torch.dtype, layout: str, residual: bool, device: str = "meta") -> list[Any]:
    """Input, residual or None, and the output's gradient."""
    x, extra, grad = (
        torch.empty(SHAPE, dtype=dtype, device=device).to(memory_format=LAYOUTS[layout])
        for _ in range(3)
    )
    return [x.requires_grad_(), extra.requires_grad_() if residual else None, grad]


def count(policy: str, case: str, dtype: torch.dtype, layout: str) -> tuple[Count, Count, Count]:
    """Of a forward and a backward in training, and of a forward in inference."""
    activation, residual = CASES[case]
    layer = layer_for(policy, activation)
    x, extra, grad = tensors(dtype, layout, residual)
    with Counter(x) as forward:
        y = layer(x, residual=extra)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    leaves = [x, *layer.parameters()] if isinstance(layer, torch.nn.Module) else [x]
    with Counter(x) as backward:
        torch.autograd.grad(y, leaves if extra is None else [*leaves, extra], grad)
    layer.eval()
    with torch.no_grad(), Counter(x) as inference:
        layer(x, residual=extra)
    return forward.count, backward.count, inference.count


def table() -> str:
    """All cases, rows of equal figures merged over layouts."""
    head = "| | type | forward | backward | inference |\n|---|---|---|---|---|"
    rows = [head]
    for case in CASES:
        for policy in POLICIES:
            for dtype in DTYPES[:2]:
                counts = count(policy, case, dtype, "contiguous")
                cells = (f"{c.passes:g} ({c.large} + {c.small})" for c in counts)
                label = f"{case}, {policy}"
                rows.append(f"| {label} | {str(dtype)[6:]} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
