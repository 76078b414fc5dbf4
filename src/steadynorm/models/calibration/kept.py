"""A model left exactly as it was, whatever happens while it is measured."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


class Kept:
    """Modes, buffers and random state as they were, to be put back.

    Parameters need no copy: nothing here computes gradients or steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self._random = _random_state()

    def rewind_random(self) -> None:
        """The random state of the beginning, so that a shuffled loader repeats its batches."""
        _set_random_state(self._random)

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was, each buffer the same tensor with the same values."""
        for module, training in self._modes:
            module.training = training
        for module, name, buffer, value in self._buffers:
            module._buffers[name] = buffer
            buffer.copy_(value)
        self.rewind_random()


@contextmanager
def in_inference(model: nn.Module) -> Iterator[Kept]:
    """The model in inference mode; any exception puts back modes, buffers and random state.

    Modes are set one by one: a `train()` that a class overrides may do more than that.
    """
    kept = Kept(model)
    try:
        for module in model.modules():
            module.training = False
        yield kept
    except BaseException:  # Ctrl-C too
        kept.put_back()
        raise


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "random": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if "numpy" in sys.modules:  # loaders augment with it
        state["numpy"] = sys.modules["numpy"].random.get_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["random"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
