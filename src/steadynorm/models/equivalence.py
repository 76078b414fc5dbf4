"""Copy a model, run it before and after a change, and compare what it answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.models.graph import call, tensors
from steadynorm.models.untouched import seed, set_training, untouched

# Largest difference allowed between outputs, over the largest output: what a deep network loses by
# rounding alone, times about ten.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


_uninitialized: Any = nn.UninitializedBuffer


def copied(model: nn.Module, owner: str) -> Any:
    """A deep copy; sharing inside the model is kept.

    Activations that a model keeps from its last forward are copied without their graph, which torch
    refuses to copy, and buffers of lazy layers stay uninitialized.

    Raises ValueError where something in the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for buffer in module._buffers.values():
            if isinstance(buffer, nn.UninitializedBuffer):
                memo[id(buffer)] = _uninitialized(device=buffer.device, dtype=buffer.dtype)
        memo |= {id(t): t.detach().clone() for t in tensors(vars(module)) if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"{owner}: `model` must be one that copy.deepcopy can copy ({error}). "
            "Pass inplace=True to change the model itself."
        ) from error


@contextmanager
def reproducible() -> Iterator[None]:
    """cuDNN's convolutions in float32 itself, by the same algorithm each time.

    By default a GPU rounds their inputs to TF32's 11 bits: two algorithms, between which
    `cudnn.benchmark` chooses by time, then differ by more than `TOLERANCE`.
    """
    enabled = torch.backends.cudnn.enabled
    with torch.backends.cudnn.flags(enabled, deterministic=True, allow_tf32=False):
        yield


def answers(model: nn.Module, example_inputs: Any, *, training: bool | None) -> list[Tensor]:
    """Every tensor the model returns, from a fixed seed; the model is left as it was.

    `training`: None leaves every module in its own mode.
    """
    with untouched(model), reproducible(), torch.no_grad():
        set_training(model, training)
        seed(0)
        return [tensor.clone() for tensor in tensors(call(model, example_inputs))]


def training_step(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """Outputs, gradients for a random upstream gradient, and buffers of one step in training.

    All from a fixed seed; the model is left as it was.
    """
    with untouched(model), reproducible(), torch.enable_grad():
        set_training(model, True)
        seed(0)
        outputs = list(tensors(call(model, example_inputs)))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses = [(t * torch.randn_like(t)).sum() for t in outputs if t.requires_grad]
        found: Any = ()
        if losses and trained:
            found = torch.autograd.grad(torch.stack(losses).sum(), trained, allow_unused=True)
        gradients = [gradient for gradient in found if gradient is not None]
        return [t.detach().clone() for t in (*outputs, *gradients, *model.buffers())]


def in_double(value: Any) -> Any:
    """Example inputs with their floating tensors in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: in_double(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(in_double(part) for part in value)
    return value


def largest_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest relative difference of norms, infinity where shapes differ.

    What is below a thousandth of the largest tensor is compared with that: it may be zero but for
    rounding.
    """
    if [t.shape for t in expected] != [t.shape for t in got]:
        return float("inf")
    sizes = [float(t.double().norm()) for t in expected]
    floor = 1e-3 * max(sizes, default=0.0) + 1e-30
    return max(
        (
            float((a.double() - b.double()).norm()) / max(size, floor)
            for a, b, size in zip(expected, got, sizes, strict=True)
        ),
        default=0.0,
    )


def compare(expected: list[Tensor], got: list[Tensor], owner: str) -> None:
    """Raises RuntimeError where the answers differ by more than rounding."""
    for index, (was, now) in enumerate(zip(expected, got, strict=True)):
        if not was.is_floating_point():
            continue
        largest = float(was.abs().nan_to_num(0, 0, 0).max()) if was.numel() else 0.0
        limit = TOLERANCE.get(was.dtype, 1e-1) * largest
        if not torch.allclose(now, was, rtol=0, atol=limit, equal_nan=True):
            raise RuntimeError(
                f"{owner}: output {index} of the changed model differs by "
                f"{float((now - was).abs().max()):.3g}, where at most {limit:.3g} was expected. "
                "Do not use the changed model; please report the one given."
            )
