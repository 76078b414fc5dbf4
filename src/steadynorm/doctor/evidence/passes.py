"""The same batches in several passes: in inference, as in training, and once calibrated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.evidence import sample_worth
from steadynorm.doctor.evidence.divergence import ENOUGH
from steadynorm.doctor.evidence.inputs import Reached, Watch, watching
from steadynorm.models.calibration.batches import Batches, moved
from steadynorm.models.calibration.functions import calibrate
from steadynorm.models.calibration.layers import Layer
from steadynorm.models.surgery.graph import tensors
from steadynorm.models.untouched import set_training

BATCHES = 32  # read so many: their means' scatter is then known to about a quarter
SAMPLES = 256  # and at least so many samples, if it takes no more than 256 batches
CALLS = 4096  # of the model, at most, to measure layer by layer
SOME = 4096  # values of a batch's outputs that are compared

Exact = dict[str, tuple[np.ndarray, np.ndarray]]
"""By layer, mean and variance measured with the layers before it as they are in inference."""


class Pass:
    """What one pass gave: per batch some of the outputs, and the loss where there is one."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.outputs: list[np.ndarray] = []
        self.losses: list[float] = []


class Passes:
    """The same batches again and again, each time from the same statistics and random state."""

    def __init__(
        self, model: nn.Module, feed: Batches, held: list[Any], layers: Sequence[Layer], loss: Any
    ) -> None:
        self.model = model
        self.feed = feed
        self.held = held
        self.layers = layers
        self.loss = loss
        self.buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self.modes = [(module, module.training) for module in model.modules()]
        self.random = torch.get_rng_state()

    @torch.no_grad()
    def rewind(self) -> None:
        """Buffers as they were."""
        for buffer, value in self.buffers:
            buffer.copy_(value)

    def run(self, *, training: bool) -> Pass:
        """All batches in inference, or with every batch norm normalizing as in training."""
        with watching(self.layers, training=training) as watch:
            return self._over(self.held, watch)

    def _over(self, batches: Iterable[Any], watch: Watch) -> Pass:
        done = Pass(watch)
        torch.set_rng_state(self.random)
        set_training(self.model, False)
        for batch in batches:
            watch.known, watch.samples = _masks(batch), samples_of(batch)
            answer = self.feed.forward(self.model, batch)
            done.outputs.append(_some(answer))
            loss = loss_of(self.loss, answer, batch)
            if loss is not None:
                done.losses.append(float(loss.detach()))
            self.rewind()
            set_training(self.model, False)
        return done

    def calibrated(self, inference: Pass, training: Pass) -> tuple[Pass, Exact]:
        """All batches in inference, with the statistics that calibration keeps; and these.

        They are those of the pass in training, as `calibrate` measures in one pass; layer by layer
        where batches know so little that the layers behind meet other values than in inference.
        """
        movable = [layer for layer in self.layers if layer.left is None]
        small = any(_known(inference.watch.found.get(layer.name)) < ENOUGH for layer in movable)
        if small and len(movable) * len(self.held) <= CALLS and not training.watch.first_nonfinite:
            self._modes_as_given()
            calibrate(
                self.model, self.held, forward=self.feed.forward, passes="layerwise",
                synchronize=False, progress=False,
            )  # fmt: skip
        else:
            small = False
            for layer in movable:
                _write(layer, training.watch.found.get(layer.name))
        exact = {layer.name: layer.kept for layer in movable} if small else {}
        now = [(buffer, buffer.detach().clone()) for buffer, _ in self.buffers]
        self.buffers, before = now, self.buffers
        try:
            with watching((), training=False) as watch:
                done = self._over(self.held, watch)
        finally:
            self.buffers = before
            self.rewind()
        return done, {name: (k.mean.numpy(), k.var.numpy()) for name, k in exact.items()}

    def _modes_as_given(self) -> None:
        """Layers that somebody holds in inference mode are told by it."""
        for module, training in self.modes:
            module.training = training

    def reference(self, held: list[Any]) -> Pass:
        """The batches of a second set, in inference."""
        with watching(self.layers, training=False) as watch:
            return self._over(held, watch)

    def one(self) -> Any:
        """The model's answer to the first batch."""
        set_training(self.model, False)
        return self.feed.forward(self.model, self.held[0])

    def differentiable(self) -> Tensor | None:
        """A number that depends on the outputs, in training: the loss, or a random mix of them."""
        answer = self.feed.forward(self.model, self.held[0])
        loss = loss_of(self.loss, answer, self.held[0])
        if loss is not None:
            return loss if loss.requires_grad else None
        found = [t for t in tensors(answer) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        mixed = [
            (t * torch.randn(t.shape, generator=generator).to(t)).sum() / t.numel() for t in found
        ]
        return torch.stack([m.float() for m in mixed]).sum() if mixed else None


def read(feed: Batches, argument: str) -> list[Any]:
    """Batches on the model's device: as many as were asked for, or enough to judge by.

    Raises ValueError where there is none.
    """
    held: list[Any] = []
    samples = 0
    for batch in islice(iter(feed.source), feed.limit or SAMPLES):
        held.append(moved(batch, feed.device))
        samples += samples_of(batch)
        if feed.limit is None and len(held) >= BATCHES and samples >= SAMPLES:
            break
    if not held:
        raise ValueError(f"diagnose: `{argument}` must hold at least one batch; got none.")
    return held


def _known(reached: Reached | None) -> float:
    """Independent values in a batch of this layer; infinity where that is not known."""
    worth = None if reached is None else reached.worth()
    if reached is None or worth is None or not reached.samples:
        return math.inf
    return float(np.median(reached.samples)) * sample_worth(*worth, reached.positions)


@torch.no_grad()
def _write(layer: Layer, reached: Reached | None) -> None:
    """Put what was measured into the running statistics."""
    if reached is None or reached.whole is None:
        return
    factor = reached.values / max(reached.values - 1, 1) if layer.unbiased else 1.0
    kept: Any = layer.module
    kept.running_mean.copy_(torch.from_numpy(reached.mean))
    kept.running_var.copy_(torch.from_numpy(reached.var * factor))


def loss_of(loss: Any, answer: Any, batch: Any) -> Tensor | None:
    """The loss of one batch, None where there is none.

    Raises TypeError where `loss` gives no single number.
    """
    if loss is None:
        held = answer.get("loss") if isinstance(answer, dict) else getattr(answer, "loss", None)
        return held if isinstance(held, Tensor) and held.numel() == 1 else None
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    value = loss(answer, batch[1] if pair else batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TypeError(
            f"diagnose: `loss` must return one number as a tensor; got {type(value).__name__}. It "
            f"is called with the outputs and a batch's second element, or the batch itself."
        )
    return value


def samples_of(batch: Any) -> int:
    """How many samples a batch holds, by its first tensor."""
    first = next(tensors(batch), None)
    return 0 if first is None or not first.ndim else first.shape[0]


def _some(answer: Any) -> np.ndarray:
    """Up to `SOME` of each output's values, always the same ones."""
    parts = []
    for tensor in tensors(answer):
        if tensor.is_floating_point() and tensor.ndim:
            flat = tensor.detach().flatten()
            step = len(flat) // SOME + 1 | 1  # odd, so that classes of even number take turns
            parts.append(flat[::step].to("cpu", torch.float64).numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def _masks(batch: Any) -> list[Tensor]:
    """The masks in a batch of keyword arguments, by their names."""
    if not isinstance(batch, Mapping):
        return []
    return [v for k, v in batch.items() if str(k).endswith("mask") and isinstance(v, Tensor)]
