"""What is drawn at random before a layer: dropout and its kin, in training and in inference.

Nothing is assumed of how it is written: the layers' inputs are compared between modes, and between
two passes that draw other numbers.
"""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steadynorm.doctor.evidence.graph import inside_checkpointing
from steadynorm.doctor.evidence.inputs import InputStatistics, observed
from steadynorm.doctor.evidence.passes import Passes, samples_of, some_values
from steadynorm.doctor.evidence.records import Chance
from steadynorm.models.layers import NormLayer
from steadynorm.models.observe import observing
from steadynorm.models.untouched import seed

SAMPLES = 32  # in the batches that are looked at
EPS = 1e-5


def by_chance(passes: Passes) -> tuple[dict[str, Chance], dict[str, bool]]:
    """By layer, what chance does to it, where anything is drawn at random; and whether its calls
    take part in a gradient while the model trains.
    """
    batches = first_batches(passes.batches)
    passes.original.restore_random()
    before = _random_state()
    noise = _noise(passes, batches[0])
    gradients: dict[str, bool] = {}
    in_training = _statistics(passes, batches, gradients)
    if not noise and _random_state() == before:
        return {}, gradients
    passes.forwards.expect(len(batches))
    in_inference = _statistics(passes, batches, None)
    found = {
        name: Chance(_std_ratio(seen, in_inference[name]), noise.get(name, 0.0))
        for name, seen in in_training.items()
        if name in in_inference
    }
    return found, gradients


def first_batches(batches: list[Any]) -> list[Any]:
    """So many that they hold `SAMPLES` samples."""
    samples = np.cumsum([samples_of(batch) for batch in batches])
    return batches[: int(np.searchsorted(samples, SAMPLES)) + 1]


def _statistics(
    passes: Passes, batches: list[Any], gradients: dict[str, bool] | None
) -> dict[str, InputStatistics]:
    """The layers' inputs with every batch norm normalizing as in training; where `gradients` is
    given, with all else in training mode too and gradients enabled, which it notes by layer.
    """
    training = gradients is not None

    def note(layer: NormLayer, *_: Any) -> None:
        if gradients is not None and not inside_checkpointing():
            earlier = gradients.get(layer.name, False)
            gradients[layer.name] = earlier or torch.is_grad_enabled()

    call = passes.in_training_mode if training else passes.forward
    with observed(passes.layers, training=True) as observer, observing(passes.layers, note):
        passes.original.restore_random()
        for batch in batches:
            observer.begin(batch, samples_of(batch))
            with torch.set_grad_enabled(training):
                call(batch)
            passes.original.restore_buffers()
    return {name: seen for name, seen in observer.found.items() if seen.whole is not None}


def _std_ratio(training: InputStatistics, inference: InputStatistics) -> float:
    variances = (seen.mean_and_var()[1] + EPS for seen in (training, inference))
    return float(np.exp(0.5 * np.mean(np.log(np.divide(*variances)))))


def _noise(passes: Passes, batch: Any) -> dict[str, float]:
    """Share of each layer's input that differs between two inference passes on the same batch; none
    where inference draws nothing at random.
    """
    before = _random_state()
    first = _inputs(passes, batch)
    if _random_state() == before:
        return {}
    seed(1)
    passes.forwards.expect(1)
    second = _inputs(passes, batch)
    return {
        name: float(np.mean((a - second[name]) ** 2) / max(np.var(a) + np.var(second[name]), 1e-12))
        for name, a in first.items()
        if name in second and a.shape == second[name].shape
    }


def _inputs(passes: Passes, batch: Any) -> dict[str, np.ndarray]:
    """Some of the values that reach each layer in inference."""
    found: dict[str, np.ndarray] = {}

    def keep(layer: NormLayer, x: Tensor, _: Tensor | None) -> None:
        found.setdefault(layer.name, some_values(x))

    with observing(passes.layers, keep):
        passes.forward(batch)
    passes.original.restore_buffers()
    return found


def _random_state() -> bytes:
    torchs = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torchs += torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        torchs.append(torch.mps.get_rng_state())
    numpys: Any = np.random.get_state()  # noqa: NPY002  the one that models draw from
    return pickle.dumps((random.getstate(), numpys, [t.numpy().tobytes() for t in torchs]))
