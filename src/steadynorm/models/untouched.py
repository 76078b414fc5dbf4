"""Leave a model and all random states exactly as they were, whatever is tried in between.

The only place of the package that remembers and restores; calibration, surgery and the doctor all
run other people's models inside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def untouched(model: nn.Module) -> Iterator[Original]:
    """Restores the model and every random state when the block ends, on exceptions too.

    Restored are, of every submodule: its own training mode; its buffers, each the same tensor with
    the same values, also where another tensor was bound to the name or a buffer was added; its
    hooks and attributes (a model that adds hooks in its first call keeps a flag beside them); of
    every parameter: `requires_grad`, and `grad`, which is None inside the block so that a
    backward adds nothing to it. Random states are those of Python, NumPy's global generator, and
    torch on the CPU, MPS and every CUDA device in use.

    Parameters are not copied, so the block must not write into them. Buffers of lazy layers that
    have not seen an input have no values to restore.

    Yields what was remembered: `accept_buffers` says what stays changed, and the `restore_*`
    methods go back to the beginning inside the block.

    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
    >>> with untouched(model):
    ...     output = model(torch.tensor([[1.0], [2.0]]))
    >>> model[0].running_mean, int(model[0].num_batches_tracked)
    (tensor([0.]), 0)
    """
    original = Original(model)
    try:
        for parameter in model.parameters():
            parameter.grad = None
        yield original
    finally:
        original.restore()


class Original:
    """A model's modes, buffers, hooks and gradients, and the random states, as they were."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attributes = [(module, dict(vars(module))) for module in modules]
        self._modes = [(module, module.training) for module in modules]
        self._bindings = [(module, dict(module._buffers.items())) for module in modules]
        self._hooks = [
            (hooks, dict(hooks))
            for module in modules
            for name, hooks in vars(module).items()
            if "hooks" in name and isinstance(hooks, dict)
        ]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._random = _random_states()
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self.accept_buffers(b for _, held in self._bindings for b in held.values() if b is not None)

    @property
    def training(self) -> bool:
        """Whether the model itself was in training mode."""
        return self._modes[0][1]

    def accept_buffers(self, buffers: Iterable[Tensor]) -> None:
        """The values that these buffers hold now are the ones to restore from now on."""
        now = {id(b): (b, b.detach().clone()) for b in buffers if not (is_lazy(b) or b.is_meta)}
        self._values = self._values | now  # at once: an interruption leaves all old or all new

    def restore(self) -> None:
        """Everything as it was."""
        self.restore_modes()
        self.restore_buffers()
        for hooks, held in self._hooks:
            hooks.clear()
            hooks.update(held)
        for module, attributes in self._attributes:
            now = vars(module)
            if now.keys() != attributes.keys() or any(now[n] is not attributes[n] for n in now):
                now.clear()
                now.update(attributes)
        for parameter, requires_grad, grad in self._parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        self.restore_random()

    def restore_modes(self) -> None:
        """Every submodule's own mode; set one by one, as a class's own `train` may do more."""
        for module, training in self._modes:
            module.training = training

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Every buffer the same tensor with the same values."""
        for module, held in self._bindings:
            for name in [name for name in module._buffers if name not in held]:
                del module._buffers[name]
            for name, buffer in held.items():
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
        for buffer, value in self._values.values():
            # Writing what is there already would fail a backward that has saved the buffer.
            if buffer.layout is not torch.strided or not torch.equal(buffer, value):
                if buffer.shape != value.shape:  # observers of quantization grow theirs
                    buffer.resize_(value.shape)
                buffer.copy_(value)

    def restore_random(self) -> None:
        """All random states, so that a shuffling loader repeats its batches."""
        random.setstate(self._random["python"])
        np.random.set_state(self._random["numpy"])  # noqa: NPY002  the state that loaders use
        torch.set_rng_state(self._random["torch"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state_all(self._random["cuda"])
        if "mps" in self._random:
            torch.mps.set_rng_state(self._random["mps"])


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # to ask would initialize it
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def seed(value: int) -> None:
    """Seeds torch, inside an `untouched` block.

    `torch.manual_seed` would also seed a CUDA that is not in use yet, when it comes into use.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(value)


def set_training(model: nn.Module, training: bool | None) -> None:
    """Sets the mode of every submodule, past whatever a model's own `train()` does.

    None leaves each in its own.
    """
    for module in model.modules():
        module.training = module.training if training is None else training
