"""What batches show of a model: its batch norms in training, in inference and after calibration.

Each batch is read once, and the model called on it three times: in inference; with every batch norm
normalizing as in training; and in inference again with the statistics that calibration would keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from steadynorm.doctor.evidence import LossByMode, Measured, ModelData, NormData
from steadynorm.doctor.evidence.gradients import gradients, saturations
from steadynorm.doctor.evidence.inputs import Reached, trains
from steadynorm.doctor.evidence.passes import Exact, Pass, Passes, read, samples_of
from steadynorm.models.calibration.batches import checked
from steadynorm.models.calibration.layers import Layer, batch_norms
from steadynorm.models.calibration.measuring import eagerly
from steadynorm.statistics import Ghost


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
    feed, *second = (
        checked(given, forward, max_batches, None, again=False, model=model, owner="diagnose")
        for given in (batches, against)
        if given is not None
    )
    held = read(feed, "batches")
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
        reference = passes.reference(read(second[0], "against")) if second else None
    return Measured(
        {
            layer.name: _layer(layer, order, inference, training, reference, saturated, exact)
            for order, layer in _in_order(layers, training)
        },
        ModelData(
            batches=len(held),
            samples=sum(samples_of(batch) for batch in held),
            loss=_modes(training, inference, calibrated),
            gap=_distance(inference, training),
            mended=_distance(inference, calibrated),
            gradients=depth,
            last_batch=_last_batch(batches),
            first_nonfinite=training.watch.first_nonfinite,
        ),
    )


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
) -> NormData:
    busy = training.watch.found[layer.name]
    calm = inference.watch.found.get(layer.name, busy)
    calm = calm if calm.whole is not None else busy  # NaN in running statistics spoils what follows
    other = None if reference is None else reference.watch.found.get(layer.name)
    seen = other is not None and other.whole is not None
    mean, var = exact.get(layer.name, (busy.mean, busy.var))
    worth = calm.worth() or (None, None)
    return NormData(
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


def _distance(inference: Pass, other: Pass) -> float | None:
    """Root mean square of the difference, over the other's standard deviation."""
    ours, theirs = np.concatenate(inference.outputs), np.concatenate(other.outputs)
    if not ours.size or ours.shape != theirs.shape or not np.isfinite([ours, theirs]).all():
        return None
    spread = float(np.std(theirs))
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / max(spread, 1e-12))


def _modes(training: Pass, inference: Pass, calibrated: Pass) -> LossByMode | None:
    if not inference.losses:
        return None
    return LossByMode(*(np.array(done.losses) for done in (training, inference, calibrated)))


def _last_batch(batches: Any) -> int | None:
    """How many samples the last batch of an epoch holds, where a DataLoader tells."""
    size, dataset = getattr(batches, "batch_size", None), getattr(batches, "dataset", None)
    if not isinstance(size, int) or getattr(batches, "drop_last", True):
        return None
    try:
        return (len(dataset) - 1) % size + 1 if dataset is not None and len(dataset) else None
    except TypeError:
        return None
