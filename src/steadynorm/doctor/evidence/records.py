"""The records of evidence. Arrays are float64, one value per channel, unless said otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from steadynorm.doctor.evidence.training import ENOUGH, TrainingRun, Trend
from steadynorm.statistics import CONVENTIONS

HALF = ("float16", "bfloat16")
PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class NormState:
    """The parameters, statistics and settings of one batch norm.

    `framework`: "torch", "keras" or "flax", whose conventions momentum and the variance follow.
    `eps`, `momentum`: None where a checkpoint does not say; `momentum` also where the layer
    averages over all batches. `weight`, `bias`, `running_mean`, `running_var`: None where the
    layer has none. `dtypes`: the stored type of each, such as {"running_mean": "float32"}.
    `num_batches_tracked`: None where it is not counted. `weight_square`: sum of the squared weights
    that make each channel, of the layer stored before; read where most variances are above 10.
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
    weight_square: np.ndarray | None = None

    @property
    def known_eps(self) -> float:
        """eps; the framework's default where a checkpoint does not say."""
        return CONVENTIONS[self.framework].eps if self.eps is None else self.eps

    def arrays(self) -> dict[str, np.ndarray]:
        """The existing ones of weight, bias, running_mean and running_var, by name."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: array for name, array in found.items() if array is not None}


@dataclass(frozen=True)
class Neighbour:
    """A layer before or after a batch norm in the graph of calls.

    `trained`: whether any of its parameters requires a gradient; None if it has none.
    `probability`: of a dropout. `activated`: a batch norm that applies an activation itself.
    """

    name: str
    kind: str
    trained: bool | None = None
    probability: float | None = None
    activated: bool = False


@dataclass(frozen=True, eq=False)
class NormUsage:
    """How a model uses a batch norm.

    `training`: its own mode. `policy`: the statistics it trains with, such as "Batch" or "Steady".
    `moves`: whether a training forward would update its statistics. `trained`: whether weight and
    bias, where they exist, require a gradient. `decay`: weight decay of each, where an optimizer is
    known and has it. `left_out`: an optimizer of the model is known and holds neither.
    `synchronized`: pools moments over replicas. `ours`: a layer of this package.

    From the graph of calls, None where it is not known: `calls` in one forward, on how many
    different `inputs`; `before` and `after`, the layers that produce its input and take its output,
    directly or through operators that only rearrange; `redundant_bias`, the name of the bias that
    it cancels; `host_peak`, the largest weight of each output channel of the one layer before it,
    and `host_bias`, its bias; `channel_axis`, where the channels of the layer that made its input
    lie in it.

    From running the model, None without batches: `recomputed`, inside activation checkpointing;
    `samples` in its batch, the smallest if called several times.
    """

    training: bool
    policy: str
    moves: bool
    trained: Mapping[str, bool]
    track_running_stats: bool = True
    synchronized: bool = False
    ours: bool = False
    decay: Mapping[str, float] = field(default_factory=dict)
    left_out: bool = False
    calls: int | None = None
    inputs: int | None = None
    before: tuple[Neighbour, ...] | None = None
    after: tuple[Neighbour, ...] | None = None
    redundant_bias: str | None = None
    host_peak: np.ndarray | None = None
    host_bias: np.ndarray | None = None
    channel_axis: int | None = None
    recomputed: bool | None = None
    samples: int | None = None


@dataclass(frozen=True, eq=False)
class Padding:
    """Padded positions in a layer's input, in the first calls.

    `share`: of all positions. `mean`, `var`: of the values at valid positions; `counted_mean`,
    `counted_var`: of all values. `by_mask`: a mask in the batch says so; otherwise the positions
    were found by their equal values.
    """

    share: float
    mean: np.ndarray
    var: np.ndarray
    counted_mean: np.ndarray
    counted_var: np.ndarray
    by_mask: bool


@dataclass(frozen=True)
class Saturation:
    """The activation after a layer, "sigmoid" or "tanh", and the share of its outputs where its
    slope is below a twentieth of the largest. `idle`: the share of channels where nearly all are.
    """

    function: str
    share: float
    idle: float


@dataclass(frozen=True)
class Chance:
    """What drawing at random does to a layer's input.

    `std_ratio`: its standard deviation with all of the model in training mode, over the one with
    dropout and all else in inference, batches normalized as in training both times; geometric mean
    over channels. `noise`: share of its variance that differs from one inference pass to the next,
    on the same batch.
    """

    std_ratio: float
    noise: float


@dataclass(frozen=True, eq=False)
class NormData:
    """What the batches show of the input of one layer.

    `order`: rank by first call. `trains`: it normalized with batches in the training pass.
    `samples`: normalized together, the median over calls; for `Ghost` the size of a group.
    `positions`: values per channel and sample. `values`: per channel, in all calls. `calls`: in all
    batches.

    `mean`, `var`: of all values, with the layers before normalizing each batch as in training; or,
    where batches hold less than 8 independent values, as inference will be once all layers are
    calibrated. Either way: what the running statistics should be. `var_of_means`: variance of the
    means of single batches in training.
    `inference_mean`, `inference_var`: in inference, with the errors of the layers before.
    `reference_mean`, `reference_var`: the same for a second set of data, where one is given.

    `worth_of_mean`, `worth_of_var`: how many independent values a sample counts for, from the
    scatter of the samples' own means m and mean squares q about `mean`: var/Var(m), 2·var²/Var(q);
    harmonic means over channels. `effective`: the first for a whole batch, from the scatter of the
    batches' means, where there are enough batches. `independent_channels`: how many independent
    channels the samples' means scatter like, all of which tell of the same samples. None where not
    known.

    `single`: the shape of an input with one value per channel, which training refuses.
    `nonfinite`: calls whose values were not all finite; they are excluded from everything else.
    `masked`: it is given a mask. `calls_divergence`: of a layer called several times in a forward,
    the largest divergence of one call's inputs from all of them.
    `reference_noise`, `reference_limit`: the divergence between the two sets that their samples
    give if dealt out at random, in the mean and at most.

    `axis_shares`: of an input with more than two axes, by axis from the second on, the share of the
    variance that lies between the means along that axis.
    `chance`: what dropout and its kin do here, None where nothing is drawn at random.
    `with_gradient`: whether its calls take part in a gradient while the model trains.
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
    independent_channels: float | None = None
    reference_mean: np.ndarray | None = None
    reference_var: np.ndarray | None = None
    single: tuple[int, ...] | None = None
    nonfinite: int = 0
    masked: bool = False
    calls_divergence: float | None = None
    reference_noise: float = 0.0
    reference_limit: float = 0.0
    padding: Padding | None = None
    saturation: Saturation | None = None
    axis_shares: tuple[float, ...] = ()
    chance: Chance | None = None
    with_gradient: bool | None = None

    @property
    def worth(self) -> float | None:
        """How many independent values a sample counts for, for mean and variance alike.

        At least 1, whatever the distribution, and at most one for each position.
        """
        if self.worth_of_mean is None or self.worth_of_var is None:
            return None
        return sample_worth(self.worth_of_mean, self.worth_of_var, self.positions)


def sample_worth(of_mean: float, of_var: float, positions: int) -> float:
    """How many independent values a sample counts for; see `NormData.worth`."""
    return min(max(1.0, min(of_mean, of_var)), positions)


@dataclass(frozen=True, eq=False)
class NormEvidence:
    """One batch norm: `name` in the model, `kind` its class; None where nothing is known."""

    name: str
    kind: str
    state: NormState
    usage: NormUsage | None = None
    data: NormData | None = None

    @property
    def by_batch(self) -> bool:
        """Whether training normalizes by the batch alone, or a part of it; by default, too."""
        return self.usage is None or self.usage.policy in ("Batch", "Ghost")


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model as a whole.

    `wrapper`: "DistributedDataParallel", "DataParallel" or "". `replicas`: how many processes or
    devices share a batch. `optimizer`: its class, "" where none is known. `exporting`: the model is
    about to be shipped. `averaged`: how many models its weights are the average of, where buffers
    were left out (torch's `AveragedModel`); 0 for others.
    """

    kind: str
    training: bool
    parameters: int
    trained_parameters: int
    wrapper: str = ""
    replicas: int = 1
    optimizer: str = ""
    exporting: bool = False
    averaged: int = 0


@dataclass(frozen=True)
class WeightGradient:
    """Norm of the gradient of a weight times the norm of the weight: |∂L/∂W|·|W|.

    It does not depend on the scale of a weight that a batch norm follows, so layers compare.
    `of_input`: the same of the input x of that layer, |∂L/∂x|·|x|, all ways to the loss together;
    None where no gradient reaches it, as in the first layer.
    """

    layer: str
    size: float
    of_input: float | None = None


@dataclass(frozen=True)
class ClassScatter:
    """How far the numbers of each class scatter between batches of so many `samples`, as a
    variance, over how far they do where samples are mixed; and the `limit` that one mixed set of
    batches in 5,000 exceeds.
    """

    samples: int
    ratio: float
    limit: float


@dataclass(frozen=True, eq=False)
class LossByMode:
    """One number per batch: with each batch normalized as in training, in inference, and in
    inference after calibration on these batches.
    """

    training: np.ndarray
    inference: np.ndarray
    calibrated: np.ndarray


@dataclass(frozen=True, eq=False)
class ModelData:
    """What the batches show of the model as a whole.

    `batches`, `samples`: how many were read. `loss`: where one was given, or the model returns one.
    `gap`: distance of the outputs in inference from those normalized as in training, root mean
    square over their standard deviation; `mended`: from those after calibration.
    `gradients`: by weight, in the order of the forward; empty where the model gives none.
    `last_batch`: samples in the last batch of an epoch, where the loader tells.
    `first_nonfinite`: the layer that NaN or infinity reaches first, None where all is finite.
    `outputs_finite`: in inference. `cures`: losses on a second set of data, by batch, with the
    statistics that there are ("none"), and after "calibrate" and "adapt" on that set.
    `targets`: "classes" or "values" where batches hold what the outputs are to be, else "".
    `class_scatter`: of batches that hold one class for each sample.
    `loss_at_other_eps`: of inference, by batch, with another framework's default eps in all layers;
    where that would matter.
    """

    batches: int = 0
    samples: int = 0
    loss: LossByMode | None = None
    gap: float | None = None
    mended: float | None = None
    gradients: tuple[WeightGradient, ...] = ()
    last_batch: int | None = None
    first_nonfinite: str | None = None
    outputs_finite: bool = True
    cures: Mapping[str, np.ndarray] = field(default_factory=dict)
    targets: str = ""
    class_scatter: ClassScatter | None = None
    loss_at_other_eps: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of a target. `remarks`: what could not be examined, and why.

    `layers` are in the model's order. `model` is None for a checkpoint alone, `data` where no
    batches were given, `run` where no training was monitored.
    """

    target: str
    layers: tuple[NormEvidence, ...]
    model: ModelFacts | None = None
    data: ModelData | None = None
    remarks: tuple[str, ...] = ()
    run: TrainingRun | None = None

    def layer(self, name: str | None) -> NormEvidence | None:
        """The layer of a name; None where there is none."""
        return next((layer for layer in self.layers if layer.name == name), None)

    def trends(self) -> list[tuple[NormEvidence, Trend]]:
        """The layers whose trend has enough readings to judge by, in the model's order."""
        trends = {} if self.run is None else self.run.trends
        found = [(layer, trends[layer.name]) for layer in self.layers if layer.name in trends]
        return [(layer, trend) for layer, trend in found if trend.readings >= ENOUGH]
