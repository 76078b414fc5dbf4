"""What batches of data show of a model: plain numbers, made by `measure`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, eq=False)
class Padding:
    """Padded positions in a layer's input, in the first calls.

    `share`: of all positions. `mean`, `var`: of the values at the others; `counted_mean`,
    `counted_var`: of all values. `known`: the batch held a mask that says so; else the positions
    were found by their equal values.
    """

    share: float
    mean: np.ndarray
    var: np.ndarray
    counted_mean: np.ndarray
    counted_var: np.ndarray
    known: bool


@dataclass(frozen=True)
class Saturation:
    """What follows a layer: "sigmoid" or "tanh", and the share of its outputs where its slope is
    below a twentieth of the largest. `idle`: the share of channels where that holds for nearly all.
    """

    function: str
    share: float
    idle: float


@dataclass(frozen=True, eq=False)
class LayerData:
    """What batches show of the input of one layer. Arrays are float64 of shape (num_features,).

    `order`: its place in the order of first calls. `trains`: it normalized with batches, in the
    pass that does as training does. `samples`: that are normalized together, the median over calls;
    of a ghost, where batches are divided into these. `positions`: values per channel and sample.
    `values`: per channel, in all calls. `calls`: in all batches.

    `mean`, `var`: of all values, with the layers before normalizing each batch as in training, or,
    where batches know less than 8 independent values, as inference will once all are calibrated:
    what the running statistics should be. `var_of_means`: how far the means of single batches
    scatter, as in training.
    `inference_mean`, `inference_var`: in inference, where errors of layers before have their part.
    `reference_mean`, `reference_var`: the same for a second set of data, where one is given.

    `worth_of_mean`, `worth_of_var`: how many independent values a sample counts for, by how far the
    samples' own means, and their own mean squares about `mean`, scatter: var/Var(m), 2·var²/Var(q);
    harmonic means over channels. `effective`: the first for a whole batch, from the scatter of
    batches' means, where there are enough batches. All in inference; None where not known.

    `single`: the shape of an input with one value per channel, which training refuses.
    `nonfinite`: calls whose values were not all finite; they are left out of everything else.
    `masked`: it is given a mask.
    """

    order: int
    trains: bool
    samples: int
    positions: int
    values: int
    calls: int
    mean: np.ndarray
    var: np.ndarray
    var_of_means: np.ndarray
    inference_mean: np.ndarray
    inference_var: np.ndarray
    worth_of_mean: float | None
    worth_of_var: float | None
    effective: float | None = None
    reference_mean: np.ndarray | None = None
    reference_var: np.ndarray | None = None
    single: tuple[int, ...] | None = None
    nonfinite: int = 0
    masked: bool = False
    padding: Padding | None = None
    saturation: Saturation | None = None

    @property
    def worth(self) -> float | None:
        """How many independent values a sample counts for, to know mean and variance by.

        At least 1, whatever their distribution, and at most one for each position.
        """
        if self.worth_of_mean is None or self.worth_of_var is None:
            return None
        return sample_worth(self.worth_of_mean, self.worth_of_var, self.positions)


def sample_worth(of_mean: float, of_var: float, positions: int) -> float:
    """How many independent values a sample counts for; see `LayerData.worth`."""
    return min(max(1.0, min(of_mean, of_var)), positions)


@dataclass(frozen=True)
class Gradient:
    """The gradient that reaches a weight, times the weight, as norms: |∂L/∂W|·|W|.

    It does not change where the weight is scaled and a batch norm follows, so layers compare.
    """

    layer: str
    size: float


@dataclass(frozen=True, eq=False)
class Modes:
    """One number per batch: with each batch normalized as in training, in inference, and in
    inference after calibration on these batches.
    """

    training: np.ndarray
    inference: np.ndarray
    calibrated: np.ndarray


@dataclass(frozen=True, eq=False)
class ModelData:
    """What batches show of the model as a whole.

    `batches`, `samples`: read. `loss`: where one was given, or the model returns one.
    `gap`: how far the outputs in inference lie from those normalized as in training, root mean
    square over their standard deviation; `mended`: how far from those after calibration.
    `gradients`: by weight, in the order of the forward; empty where the model gives none.
    `last_batch`: samples in the last batch of an epoch, where the loader tells.
    `first_nonfinite`: the layer that NaN or infinity reaches first, None where all is finite.
    """

    batches: int = 0
    samples: int = 0
    loss: Modes | None = None
    gap: float | None = None
    mended: float | None = None
    gradients: tuple[Gradient, ...] = ()
    last_batch: int | None = None
    first_nonfinite: str | None = None


class Measured(NamedTuple):
    """What `measure` returns: by layer's name as in `Evidence`, and for the model."""

    layers: Mapping[str, LayerData]
    model: ModelData
