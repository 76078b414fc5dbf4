"""What there is to judge: plain numbers and words, gathered once by `probe.py`.

No framework is imported here, so that rules can judge a checkpoint of any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from steadynorm.doctor.observed import LayerData, ModelData
from steadynorm.doctor.run import Run
from steadynorm.statistics import CONVENTIONS

HALF = ("float16", "bfloat16")


@dataclass(frozen=True, eq=False)
class State:
    """What a batch norm keeps. Arrays are float64 of shape (num_features,).

    `framework`: "torch", "keras" or "flax", whose conventions momentum and the variance follow.
    `eps`, `momentum`: None where a checkpoint does not say; `momentum` also where the layer
    averages over all batches. `weight`, `bias`, `running_mean`, `running_var`: None where the
    layer has none. `dtypes`: the type each is kept in, such as {"running_mean": "float32"}.
    `num_batches_tracked`: None where it is not counted.
    """

    num_features: int
    framework: str
    eps: float | None
    momentum: float | None
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    dtypes: Mapping[str, str] = field(default_factory=dict)
    num_batches_tracked: int | None = None

    @property
    def known_eps(self) -> float:
        """eps, or where a checkpoint does not say its framework's default."""
        return CONVENTIONS[self.framework].eps if self.eps is None else self.eps

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of weight, bias, running_mean and running_var that there are, by name."""
        names = ("weight", "bias", "running_mean", "running_var")
        held = {name: getattr(self, name) for name in names}
        return {name: array for name, array in held.items() if array is not None}


@dataclass(frozen=True)
class Neighbour:
    """A layer before or after a batch norm, by the graph of calls.

    `trained`: whether any of its parameters requires a gradient; None if it has none.
    `probability`: of a dropout. `activated`: a batch norm that applies an activation itself.
    """

    name: str
    kind: str
    trained: bool | None = None
    probability: float | None = None
    activated: bool = False


@dataclass(frozen=True, eq=False)
class Place:
    """How a batch norm stands in its model.

    `training`: its own mode. `policy`: the statistics it trains with, such as "Batch" or "Steady".
    `moves`: whether a training forward would update its statistics. `trained`: of weight and bias,
    those there are, whether each requires a gradient. `decay`: weight decay of each, where an
    optimizer is known and has it. `synchronized`: pools moments over replicas. `ours`: a layer of
    this package.

    By the graph of calls, None where it is not known: `calls` in one forward, on how many different
    `inputs`; `before` and `after`, the layers that hand it its input and take its output, straight
    or behind operators that only rearrange; `redundant_bias`, the name of the bias that it cancels;
    `host_peak`, the largest weight that makes each of its channels in the one layer before it.

    By running it, None without batches: `recomputed`, inside activation checkpointing; `samples` in
    its batch, the smallest if called several times.
    """

    training: bool
    policy: str
    moves: bool
    trained: Mapping[str, bool]
    track_running_stats: bool = True
    synchronized: bool = False
    ours: bool = False
    decay: Mapping[str, float] = field(default_factory=dict)
    calls: int | None = None
    inputs: int | None = None
    before: tuple[Neighbour, ...] | None = None
    after: tuple[Neighbour, ...] | None = None
    redundant_bias: str | None = None
    host_peak: np.ndarray | None = None
    recomputed: bool | None = None
    samples: int | None = None


@dataclass(frozen=True, eq=False)
class Layer:
    """One batch norm: `name` in the model, `kind` its class; None where nothing is known."""

    name: str
    kind: str
    state: State
    place: Place | None = None
    data: LayerData | None = None


@dataclass(frozen=True)
class Model:
    """What holds for a model as a whole.

    `wrapper`: "DistributedDataParallel", "DataParallel" or "". `replicas`: how many processes or
    devices share a batch. `optimizer`: its class, "" where none is known. `exporting`: the model is
    about to be shipped.
    """

    kind: str
    training: bool
    parameters: int
    trained_parameters: int
    wrapper: str = ""
    replicas: int = 1
    optimizer: str = ""
    exporting: bool = False


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of a target. `remarks`: what could not be looked at, and why.

    `layers` are in the model's order. `model` is None for a checkpoint alone, `data` where no
    batches were given, `run` where no training was watched.
    """

    target: str
    layers: tuple[Layer, ...]
    model: Model | None = None
    data: ModelData | None = None
    remarks: tuple[str, ...] = ()
    run: Run | None = None
