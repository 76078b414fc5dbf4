"""What batches show of a model: its batch norms in training, in inference and after calibration.

Each batch is read once, and the model called on it three times: in inference; with every batch norm
normalizing as in training; and in inference again with the statistics that calibration would keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.calibration.batches import Batches, checked, moved
from steadynorm.calibration.functions import calibrate
from steadynorm.calibration.layers import Layer, batch_norms
from steadynorm.calibration.measuring import eagerly
from steadynorm.doctor.apart import ENOUGH
from steadynorm.doctor.observed import LayerData, Measured, ModelData, Modes, sample_worth
from steadynorm.doctor.slopes import gradients, saturations
from steadynorm.doctor.watching import Reached, Watch, trains, watching
from steadynorm.statistics import Ghost
from steadynorm.surgery.graph import set_training, tensors

BATCHES = 32  # read so many: their means' scatter is then known to about a quarter
SAMPLES = 256  # and at least so many samples, if it takes no more than 256 batches
CALLS = 4096  # of the model, at most, to measure layer by layer
SOME = 4096  # values of a batch's outputs that are compared


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Any = None,
    forward: Any = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
) -> Measured:
    """Evidence of batches; the caller puts back modes, buffers and random state.

    Args:
        batches: as `calibrate` takes them; of the size that the model was trained with.
        loss: called with the outputs and the targets: a batch's second element, or the batch itself
            where it is no pair. None takes the loss that the model returns, if it does.
        forward: calls the model, as in `calibrate`.
        against: a second set of data, to compare with.
        max_batches: read so many; by default 32, or more until they hold 256 samples.
    """
    feed = checked(batches, forward, max_batches, None, again=False, model=model, owner="diagnose")
    held = _read(feed, feed.source)
    if not held:
        raise ValueError("diagnose: `batches` must hold at least one batch; got none.")
    layers = [
        layer._replace(name="" if layer.module is model else layer.name)
        for layer in batch_norms(model, "diagnose")
    ]
    with eagerly():
        passes = Passes(model, feed, held, layers, loss)
        inference = passes.run(training=False)
        training = passes.run(training=True)
        calibrated, exact = passes.calibrated(inference, training)
        saturated = saturations(layers, passes.one)
        passes.rewind()
        depth = gradients(model, layers, passes.differentiable)
        passes.rewind()
        reference = None if against is None else passes.reference(against)
    return Measured(
        {
            layer.name: _layer(layer, order, inference, training, reference, saturated, exact)
            for order, layer in _in_order(layers, training)
        },
        ModelData(
            batches=len(held),
            samples=sum(_samples(batch) for batch in held),
            loss=_modes(training, inference, calibrated),
            gap=_distance(inference, training),
            mended=_distance(inference, calibrated),
            gradients=depth,
            last_batch=_last_batch(batches),
            first_nonfinite=training.watch.first_nonfinite,
        ),
    )


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
            watch.known, watch.samples = _masks(batch), _samples(batch)
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

    def reference(self, against: Iterable[Any]) -> Pass:
        """The batches of the second set, in inference."""
        with watching(self.layers, training=False) as watch:
            return self._over(_read(self.feed, against), watch)

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


def _read(feed: Batches, source: Iterable[Any]) -> list[Any]:
    """Batches on the model's device: as many as were asked for, or enough to judge by."""
    held: list[Any] = []
    samples = 0
    for batch in islice(iter(source), feed.limit or SAMPLES):
        held.append(moved(batch, feed.device))
        samples += _samples(batch)
        if feed.limit is None and len(held) >= BATCHES and samples >= SAMPLES:
            break
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


def _in_order(layers: Sequence[Layer], training: Pass) -> list[tuple[int, Layer]]:
    """The layers that were reached, in the order of their first calls."""
    by_name = {layer.name: layer for layer in layers}
    names = [name for name, part in training.watch.found.items() if part.whole is not None]
    return list(enumerate(by_name[name] for name in names))


def _layer(
    layer: Layer,
    order: int,
    inference: Pass,
    training: Pass,
    reference: Pass | None,
    saturated: dict[str, Any],
    exact: Exact,
) -> LayerData:
    busy = training.watch.found[layer.name]
    calm = inference.watch.found.get(layer.name, busy)
    calm = calm if calm.whole is not None else busy  # NaN in running statistics spoils what follows
    other = None if reference is None else reference.watch.found.get(layer.name)
    seen = other is not None and other.whole is not None
    mean, var = exact.get(layer.name, (busy.mean, busy.var))
    worth = calm.worth() or (None, None)
    return LayerData(
        order=order,
        trains=trains(layer),
        samples=_together(layer, busy),
        positions=calm.positions,
        values=busy.values,
        calls=len(busy.batch_means),
        mean=mean,
        var=var,
        var_of_means=busy.var_of_means(),
        inference_mean=calm.mean,
        inference_var=calm.var,
        worth_of_mean=worth[0],
        worth_of_var=worth[1],
        effective=calm.effective(),
        reference_mean=other.mean if seen and other else None,
        reference_var=other.var if seen and other else None,
        single=busy.single,
        nonfinite=busy.nonfinite,
        masked=calm.masked,
        padding=calm.padded.result(),
        saturation=saturated.get(layer.name),
    )


def _together(layer: Layer, reached: Reached) -> int:
    samples = int(np.median(reached.samples))
    policy = getattr(layer.module, "statistics", None)
    return min(samples, policy.size) if isinstance(policy, Ghost) else samples


def _samples(batch: Any) -> int:
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


def _distance(inference: Pass, other: Pass) -> float | None:
    """Root mean square of the difference, over the other's standard deviation."""
    ours, theirs = np.concatenate(inference.outputs), np.concatenate(other.outputs)
    if not ours.size or ours.shape != theirs.shape or not np.isfinite([ours, theirs]).all():
        return None
    spread = float(np.std(theirs))
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / max(spread, 1e-12))


def _modes(training: Pass, inference: Pass, calibrated: Pass) -> Modes | None:
    if not inference.losses:
        return None
    return Modes(*(np.array(done.losses) for done in (training, inference, calibrated)))


def _masks(batch: Any) -> list[Tensor]:
    """The masks in a batch of keyword arguments, by their names."""
    if not isinstance(batch, Mapping):
        return []
    return [v for k, v in batch.items() if str(k).endswith("mask") and isinstance(v, Tensor)]


def _last_batch(batches: Any) -> int | None:
    """How many samples the last batch of an epoch holds, where a DataLoader tells."""
    size, dataset = getattr(batches, "batch_size", None), getattr(batches, "dataset", None)
    if not isinstance(size, int) or getattr(batches, "drop_last", True):
        return None
    try:
        return (len(dataset) - 1) % size + 1 if dataset is not None and len(dataset) else None
    except TypeError:
        return None
