"""What batches show of a model: its batch norms in training, in inference and after calibration.

Each batch is read once. The model is called on it three times: in inference; with every batch norm
normalizing as in training; and in inference with the statistics that calibration would keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from steadynorm.doctor.evidence.chance import by_chance, first_batches
from steadynorm.doctor.evidence.divergence import divergence
from steadynorm.doctor.evidence.gradients import gradients, saturations
from steadynorm.doctor.evidence.inputs import InputStatistics, trains
from steadynorm.doctor.evidence.moments import mean_and_var
from steadynorm.doctor.evidence.passes import (
    Exact,
    Forwards,
    Passes,
    PassResult,
    feeding,
    read,
    samples_of,
)
from steadynorm.doctor.evidence.records import LossByMode, ModelData, NormData
from steadynorm.doctor.evidence.resampling import class_scatter, resample
from steadynorm.models.graph import tensors
from steadynorm.models.layers import NormLayer, batch_norms
from steadynorm.models.observe import eagerly
from steadynorm.models.untouched import Original
from steadynorm.statistics import CONVENTIONS, Ghost

TORCH_EPS, KERAS_EPS = (CONVENTIONS[framework].eps for framework in ("torch", "keras"))
NARROW = KERAS_EPS / 0.1025  # √((NARROW + KERAS_EPS)/NARROW) = 1.05
GROUPS = 64  # of samples in each of two sets, to resample


def measure(
    model: nn.Module,
    original: Original,
    batches: Iterable[Any],
    *,
    loss: Any = None,
    forward: Any = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
    forwards: Forwards,
) -> tuple[dict[str, NormData], ModelData]:
    """What the batches show of each layer, by name as in `Evidence`, and of the model.

    The caller restores the model. Arguments as for `diagnose`; by default 32 batches are read, or
    more until they hold 256 samples.
    """
    feeds = [
        feeding(b, model, forward, max_batches, forwards)
        for b in (batches, against)
        if b is not None
    ]
    read_batches = read(feeds[0], "batches")
    # In inference, in training and calibrated; saturation, what is random, and the gradient.
    forwards.expect(3 * len(read_batches) + len(first_batches(read_batches)) + 3)
    layers = [
        layer._replace(name="" if layer.module is model else layer.name)
        for layer in batch_norms(model, "diagnose")
    ]
    reference: PassResult | None = None
    resampled: Mapping[str, Mapping[str, Any]] = {}
    cures: dict[str, np.ndarray] = {}
    with eagerly():
        passes = Passes(model, original, feeds[0], read_batches, layers, loss, forwards)
        two = len(feeds) > 1
        inference = passes.run(by_sample=two, groups=GROUPS * two)
        training = passes.run(training=True)
        calibrated, exact = passes.calibrated(training)
        saturated = saturations(layers, lambda: passes.forward(read_batches[0]))
        original.restore_buffers()
        chance, with_gradient = by_chance(passes)
        depth = gradients(model, layers, passes.differentiable)
        original.restore_buffers()
        other = _other_eps(layers, training) if inference.losses else None
        swapped = None if other is None else passes.losses_at(other)
        if two:
            second = read(feeds[1], "against")
            forwards.expect(5 * len(second))  # as it is, and two cures, applied and tried
            reference = passes.run(by_sample=True, groups=GROUPS, batches=second)
            resampled = resample(inference.inputs, reference.inputs)
            if reference.losses:
                cures = {"none": np.array(reference.losses), **passes.cures(second)}
    by_name = {layer.name: layer for layer in layers}
    found = {}
    for order, (name, seen) in enumerate(training.inputs.items()):
        data = _norm_data(
            by_name[name], order, seen, inference.inputs.get(name, seen),
            calibrated.inputs.get(name, seen), exact,
        )  # fmt: skip
        references: dict[str, Any] = {**resampled.get(name, {})}
        if reference is not None and name in reference.inputs:
            mean, var = reference.inputs[name].mean_and_var()
            references |= {"reference_mean": mean, "reference_var": var}
        found[name] = replace(
            data, saturation=saturated.get(name), chance=chance.get(name),
            with_gradient=with_gradient.get(name), **references,
        )  # fmt: skip
    return found, ModelData(
        batches=len(read_batches),
        samples=sum(samples_of(batch) for batch in read_batches),
        loss=LossByMode(*(np.array(seen.losses) for seen in (training, inference, calibrated)))
        if inference.losses
        else None,
        gap=_distance(inference, training),
        mended=_distance(inference, calibrated),
        gradients=depth,
        last_batch=_last_batch(batches),
        outputs_finite=all(bool(np.isfinite(o).all()) for o in inference.outputs),
        cures=cures,
        targets=_targets(read_batches[0]),
        class_scatter=class_scatter([c for c in map(_classes, read_batches) if c is not None]),
        loss_at_other_eps=swapped,
        first_nonfinite=training.observer.first_nonfinite,
    )


def _norm_data(
    layer: NormLayer, order: int, training: InputStatistics, inference: InputStatistics,
    calibrated: InputStatistics, exact: Exact,
) -> NormData:  # fmt: skip
    """What the passes say of one layer. Samples are compared once statistics fit: wrong ones make
    a few extreme channels or samples decide.
    """
    mean, var = exact.get(layer.name) or training.mean_and_var()
    inference_mean, inference_var = inference.mean_and_var()
    worth = calibrated.worth() or (None, None)
    return NormData(
        order=order,
        trains=trains(layer),
        samples=_normalized_together(layer, training),
        positions=calibrated.positions,
        values=training.values,
        calls=len(training.batch_means),
        mean=mean,
        var=var,
        var_of_means=training.var_of_means(),
        inference_mean=inference_mean,
        inference_var=inference_var,
        worth_of_mean=worth[0],
        worth_of_var=worth[1],
        effective=calibrated.effective(),
        independent_channels=calibrated.independent_channels(),
        single=training.single,
        nonfinite=training.nonfinite,
        masked=calibrated.masked,
        padding=calibrated.padding.result(),
        axis_shares=calibrated.axis_shares,
        calls_divergence=_calls_divergence(calibrated),
    )


def _other_eps(layers: Sequence[NormLayer], training: PassResult) -> float | None:
    """Keras's eps, where all layers have torch's and it would scale a tenth of the channels of any
    layer anew, by 5 % or more, with the statistics of the data.
    """
    if not all(math.isclose(getattr(layer.module, "eps", 0.0), TORCH_EPS) for layer in layers):
        return None
    variances = (seen.mean_and_var()[1] for seen in training.inputs.values())
    return KERAS_EPS if any(np.mean(var < NARROW) >= 0.1 for var in variances) else None


def _targets(batch: Any) -> str:
    """What a batch says of the outputs that are wanted; see `ModelData`."""
    wanted = _wanted(batch)
    if wanted is None:
        return ""
    if wanted.is_floating_point() and wanted.shape == next(tensors(batch)).shape:
        return ""  # a second view
    return "values" if wanted.is_floating_point() else "classes"


def _classes(batch: Any) -> np.ndarray | None:
    """The class of each sample, where a batch holds one."""
    wanted = _wanted(batch)
    if wanted is None or wanted.is_floating_point() or wanted.shape != (samples_of(batch),):
        return None
    return np.asarray(wanted.cpu().numpy())


def _wanted(batch: Any) -> Tensor | None:
    """The tensor of targets in a batch, None where there is none."""
    wanted: Any = None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        wanted = batch[1]
    elif isinstance(batch, Mapping):
        wanted = next((batch[name] for name in ("labels", "label") if name in batch), None)
    return wanted if isinstance(wanted, Tensor) else None


def _calls_divergence(seen: InputStatistics) -> float | None:
    """How far the inputs of the calls in a forward lie from all of them together, at most."""
    if len(seen.by_call) < 2:
        return None
    mixed = seen.mean_and_var()
    return max(divergence(*mixed, *mean_and_var(call)).mean_kl for call in seen.by_call.values())


def _normalized_together(layer: NormLayer, seen: InputStatistics) -> int:
    samples = int(np.median(seen.samples))
    policy = getattr(layer.module, "statistics", None)
    return min(samples, policy.size) if isinstance(policy, Ghost) else samples


def _distance(inference: PassResult, other: PassResult) -> float | None:
    """Root mean square of the difference, over the other's standard deviation."""
    ours, theirs = np.concatenate(inference.outputs), np.concatenate(other.outputs)
    if not ours.size or ours.shape != theirs.shape or not np.isfinite([ours, theirs]).all():
        return None
    return float(np.sqrt(np.mean((ours - theirs) ** 2)) / max(np.std(theirs), 1e-12))


def _last_batch(batches: Any) -> int | None:
    """How many samples the last batch of an epoch holds, where a DataLoader tells."""
    size, sampler = getattr(batches, "batch_size", None), getattr(batches, "sampler", None)
    if not isinstance(size, int) or getattr(batches, "drop_last", True):
        return None
    try:
        samples = len(sampler)  # type: ignore[arg-type]  # of an epoch: not all of the dataset
    except TypeError:
        return None
    return (samples - 1) % size + 1 if samples else None
