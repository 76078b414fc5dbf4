"""Passes over the same batches: in inference, as in training, and once calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.evidence.divergence import ENOUGH
from steadynorm.doctor.evidence.inputs import InputObserver, InputStatistics, observed
from steadynorm.doctor.evidence.records import sample_worth
from steadynorm.models.batches import Batches, checked, cloned, moved
from steadynorm.models.calibrate import adapt, calibrate
from steadynorm.models.graph import tensors
from steadynorm.models.layers import NormLayer
from steadynorm.models.untouched import Original, set_training, untouched

BATCHES = 32  # read so many: the scatter of their means is then known to about a quarter
SAMPLES = 256  # and at least so many samples, if that takes no more than 256 batches
CALLS = 1024  # of the model, at most, to measure layer by layer
COMPARED = 4096  # values of a batch's outputs

Exact = dict[str, tuple[np.ndarray, np.ndarray]]
"""By layer, mean and variance measured with the layers before it as they are in inference."""


class PassResult(NamedTuple):
    """One pass: the layers' inputs, and per batch some of the outputs and the loss, if any."""

    observer: InputObserver
    outputs: list[np.ndarray]
    losses: list[float]

    @property
    def inputs(self) -> dict[str, InputStatistics]:
        """By layer, those that values reached, in the order of first calls."""
        return {k: v for k, v in self.observer.found.items() if v.whole is not None}


class Passes:
    """The same batches again and again, each pass from the same buffers and random states."""

    def __init__(
        self, model: nn.Module, original: Original, feed: Batches, batches: list[Any],
        layers: Sequence[NormLayer], loss: Any, forwards: Forwards,
    ) -> None:  # fmt: skip
        self.model, self.original, self.feed, self.batches = model, original, feed, batches
        self.layers, self.loss, self.forwards = layers, loss, forwards

    def run(
        self, *, training: bool = False, by_sample: bool = False, groups: int = 0,
        batches: list[Any] | None = None, state: Original | None = None,
    ) -> PassResult:  # fmt: skip
        """All batches in inference, or with every batch norm normalizing as in training.

        `groups`: how many groups of samples to keep in all. `state`: what every batch starts from.
        """
        batches, state = self.batches if batches is None else batches, state or self.original
        parts = -(-groups // len(batches))
        with ExitStack() as hooks:
            observer = hooks.enter_context(
                observed(self.layers, training=training, by_sample=by_sample, parts=parts)
            )
            called = self.model.register_forward_pre_hook(observer.called, with_kwargs=True)
            hooks.callback(called.remove)
            result = PassResult(observer, [], [])
            state.restore_random()
            for batch in batches:
                observer.begin(batch, samples_of(batch))
                answer = self.forward(batch)
                result.outputs.append(_values(answer))
                loss = loss_of(self.loss, answer, batch)
                if loss is not None:
                    result.losses.append(float(loss.detach()))
                state.restore_buffers()
        return result

    def forward(self, batch: Any) -> Any:
        """The model's answer in inference."""
        set_training(self.model, False)
        return self.feed.forward(self.model, batch)

    def in_training_mode(self, batch: Any) -> Any:
        """The model's answer with all of it in training mode, but what its owner holds in inference
        while the rest trains.
        """
        if self.original.training:
            self.original.restore_modes()
        else:
            set_training(self.model, True)
        return self.feed.forward(self.model, batch)

    def calibrated(self, training: PassResult) -> tuple[PassResult, Exact]:
        """All batches in inference with the statistics that calibration keeps; and these.

        They are those of the pass in training, as `calibrate` measures in one pass; layer by layer
        where batches hold so few independent values that later layers would meet other inputs than
        in inference.
        """
        movable = [layer for layer in self.layers if layer.left is None]
        for layer in movable:
            _write(layer, training.inputs.get(layer.name))
        with untouched(self.model) as calibrated:
            result = self.run(by_sample=True, state=calibrated)
        few = any(values_in_batch(result.inputs.get(layer.name)) < ENOUGH for layer in movable)
        exact: Exact = {}
        affordable = len(movable) * len(self.batches) <= CALLS
        if few and affordable and not training.observer.first_nonfinite:
            self.original.restore_buffers()
            self.forwards.expect((len(movable) + 1) * len(self.batches))
            result = self.after(calibrate, self.batches, passes="layerwise", by_sample=True)
            for layer in movable:
                exact[layer.name] = (layer.statistics.mean.numpy(), layer.statistics.var.numpy())
        self.original.restore_buffers()
        return result, exact

    def after(
        self, cure: Any, batches: list[Any], *, by_sample: bool = False, **settings: Any
    ) -> PassResult:
        """The batches in inference after `calibrate` or `adapt` on them; buffers stay changed."""
        self.original.restore_modes()  # layers that somebody holds in inference are told by it
        cure(self.model, batches, forward=self.feed.forward, synchronize=False,
             progress=False, **settings)  # fmt: skip
        with untouched(self.model) as cured:
            return self.run(by_sample=by_sample, batches=batches, state=cured)

    def losses_at(self, eps: float) -> np.ndarray:
        """Losses of the batches in inference with this eps in all layers."""
        with ExitStack() as restored:
            modules: list[Any] = [layer.module for layer in self.layers]
            for module in modules:
                restored.callback(setattr, module, "eps", module.eps)
                module.eps = eps
            self.forwards.expect(len(self.batches))
            return np.array(self.run().losses)

    def cures(self, batches: list[Any]) -> dict[str, np.ndarray]:
        """Losses on a second set of batches in inference: as they are, and after each cure."""
        tried = {}
        for cure in (calibrate, adapt):
            with suppress(ValueError):  # statistics or batches that are not finite
                tried[cure.__name__] = np.array(self.after(cure, batches).losses)
            self.original.restore_buffers()
        return tried

    def differentiable(self) -> Tensor | None:
        """A number that depends on the outputs: the loss, or a random mix of them."""
        answer = self.forward(self.batches[0])
        loss = loss_of(self.loss, answer, self.batches[0])
        if loss is not None:
            return loss if loss.requires_grad else None
        found = [t for t in tensors(answer) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(0)
        mixed = [
            (t * torch.randn(t.shape, generator=generator).to(t)).sum() / t.numel() for t in found
        ]
        return torch.stack([m.float() for m in mixed]).sum() if mixed else None


class Forwards:
    """How many forwards are done, of how many that are known to come; `show` is told of each."""

    def __init__(self, show: Callable[[int, int], object] = lambda done, total: None) -> None:
        self.done, self.total, self._show = 0, 0, show

    def expect(self, more: int) -> None:
        """So many more are to come."""
        self.total += more
        self._show(self.done, self.total)

    def advance(self) -> None:
        """One is done."""
        self.done += 1
        self._show(self.done, self.total)


def feeding(
    batches: Any, model: nn.Module, forward: Any = None, max_batches: int | None = None,
    forwards: Forwards | None = None,
) -> Batches:  # fmt: skip
    """Batches and how to call the model on them; it gets copies, which it may write into."""
    feed = checked(batches, forward, max_batches, None, again=False, model=model, owner="diagnose")

    def on_copy(model: nn.Module, batch: Any) -> Any:
        try:
            return feed.forward(model, cloned(batch))
        finally:  # a measurement may end it early
            if forwards is not None:
                forwards.advance()

    return Batches(feed.source, on_copy, feed.limit, feed.device, feed.owner)


def read(feed: Batches, argument: str) -> list[Any]:
    """Batches on the model's device: as many as were asked for, or enough to judge by.

    Raises ValueError where there is none.
    """
    batches: list[Any] = []
    samples = 0
    for batch in islice(iter(feed.source), feed.limit or SAMPLES):
        batches.append(moved(batch, feed.device))
        samples += samples_of(batch)
        if feed.limit is None and len(batches) >= BATCHES and samples >= SAMPLES:
            break
    if not batches:
        raise ValueError(f"diagnose: `{argument}` must hold at least one batch; got none.")
    return batches


def values_in_batch(seen: InputStatistics | None) -> float:
    """Independent values in a batch of this layer; infinity where that is not known."""
    worth = None if seen is None else seen.worth()
    if seen is None or worth is None or not seen.samples:
        return math.inf
    return float(np.median(seen.samples)) * sample_worth(*worth, seen.positions)


@torch.no_grad()
def _write(layer: NormLayer, seen: InputStatistics | None) -> None:
    """Put what was measured into the running statistics."""
    if seen is None:
        return
    mean, var = seen.mean_and_var()
    factor = seen.values / max(seen.values - 1, 1) if layer.unbiased else 1.0
    module: Any = layer.module
    module.running_mean.copy_(torch.from_numpy(mean))
    module.running_var.copy_(torch.from_numpy(var * factor))


def loss_of(loss: Any, answer: Any, batch: Any) -> Tensor | None:
    """The loss of one batch, None where there is none.

    Raises TypeError where `loss` gives no single number.
    """
    if loss is None:
        own_loss = answer.get("loss") if isinstance(answer, dict) else getattr(answer, "loss", None)
        return own_loss if isinstance(own_loss, Tensor) and own_loss.numel() == 1 else None
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


def _values(answer: Any) -> np.ndarray:
    """Up to `COMPARED` of each output's values, always the same ones."""
    parts = [some_values(t) for t in tensors(answer) if t.is_floating_point() and t.ndim]
    return np.concatenate(parts) if parts else np.zeros(0)


def some_values(tensor: Tensor) -> np.ndarray:
    """Up to `COMPARED` of its values, always the same ones, in float64."""
    flat = tensor.detach().flatten()
    step = len(flat) // COMPARED + 1 | 1  # odd, so that classes of even number take turns
    found: np.ndarray = flat[::step].to("cpu", torch.float64).numpy()
    return found
