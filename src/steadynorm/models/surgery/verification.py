"""Run a model before and after surgery, and compare what it answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.models.surgery.graph import call, tensors
from steadynorm.models.untouched import seed, set_training, untouched

# Largest difference allowed between outputs, over the largest output: what a deep network loses by
# rounding alone, times about ten.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def answers(model: nn.Module, example_inputs: Any, *, training: bool) -> list[Tensor]:
    """Every tensor the model returns, from a fixed seed; the model is left as it was."""
    with untouched(model), torch.no_grad():
        set_training(model, training)
        seed(0)
        return [tensor.clone() for tensor in tensors(call(model, example_inputs))]


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
