"""The inputs of a model's batch norms, observed by hooks while batches pass through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.evidence.moments import joined, mean_and_var, wide_moments
from steadynorm.doctor.evidence.padding import CALLS, PaddingHint, PaddingStatistics
from steadynorm.models.layers import NormLayer
from steadynorm.models.observe import observing
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.statistics import Moments, pool

FEW = 8  # samples, from which axes are told apart
SEVERAL = 8  # batches, from which the scatter of their means is known to about a half
CHANNELS = 64  # of which correlations are kept


class Scatter:
    """Scatter of single samples' means m and mean squares, about a pivot near the mean."""

    def __init__(self, pivot: Tensor) -> None:
        self.pivot = pivot
        self.count = 0
        self.sums = torch.zeros(5, len(pivot), dtype=torch.float64)
        self.channels = slice(None, None, -(-len(pivot) // CHANNELS))
        kept = len(pivot[self.channels])
        self.products = torch.zeros(kept, kept, dtype=torch.float64)

    def add(self, rows: Moments) -> None:
        """Take in samples: their means and variances, a row each."""
        away = rows.mean - self.pivot
        square = rows.var + away * away
        self.count += len(away)
        terms = (away, square, away * away, square * square, away * square)
        self.sums += torch.stack([term.sum(0) for term in terms])
        part = away[:, self.channels]
        self.products += part.T @ part

    def variances(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Var(m) and Var(q), with q = square - 2δ·away + δ², the mean square about `mean`."""
        away, square, away2, square2, both = (self.sums / self.count).numpy()
        shift = mean - self.pivot.numpy()
        of_means = np.maximum(away2 - away**2, 0)
        covariance = both - away * square
        of_squares = square2 - square**2 + 4 * shift**2 * of_means - 4 * shift * covariance
        return of_means, np.maximum(of_squares, 0)

    def independent_channels(self, var: np.ndarray) -> float:
        """How many independent channels the samples' means m scatter like: (tr A)²/‖A‖², with A the
        covariance of m/√var (Satterthwaite 1946). Of `CHANNELS` of them at most; at least 1.
        """
        away = (self.sums[0, self.channels] / self.count).numpy()
        std = np.sqrt(var[self.channels])
        varying = std > 0
        covariance = (self.products / self.count).numpy() - np.outer(away, away)
        scaled = covariance[np.ix_(varying, varying)] / np.outer(std[varying], std[varying])
        return max(1.0, float(np.trace(scaled) ** 2 / max(np.sum(scaled**2), 1e-30)))


class InputStatistics:
    """Moments of what reached one layer: of everything, of batches, of calls, of samples."""

    def __init__(self) -> None:
        self.whole: Moments | None = None
        self.by_call: dict[int, Moments] = {}  # the first call in every forward, the second, …
        self.groups: list[Moments] = []  # of a few samples each
        self.scatter: Scatter | None = None
        self.batch_means: list[np.ndarray] = []
        self.samples: list[int] = []
        self.positions = 1
        self.single: tuple[int, ...] | None = None
        self.nonfinite = 0
        self.masked = False
        self.axis_shares: tuple[float, ...] = ()
        self.padding = PaddingStatistics()

    def add(
        self, x: Tensor, mask: Tensor | None, call: int, *, by_sample: bool, parts: int = 0
    ) -> Moments | None:
        """Take in one call's input; its moments, or None if they are not finite.

        `call`: its number in the forward. `parts`: how many groups of samples to keep.
        """
        rows = _by_sample(x, mask) if by_sample else wide_moments(x, mask)
        if not len(rows.count):
            return None
        part = pool(rows, xp=torch)
        if not (part.mean.isfinite() & part.var.isfinite()).all():
            self.nonfinite += 1
            return None
        self.whole = joined(self.whole, part)
        self.by_call[call] = joined(self.by_call.get(call), part)
        self.batch_means.append(part.mean.numpy())
        self.samples.append(x.shape[0])
        self.positions = max(self.positions, x.numel() // max(x.shape[0] * x.shape[1], 1))
        self.masked |= mask is not None
        if by_sample:
            self.scatter = self.scatter or Scatter(part.mean)
            self.scatter.add(rows)
        if parts:
            split = zip(*(row.tensor_split(min(parts, len(row))) for row in rows), strict=True)
            self.groups += [pool(Moments(*group), xp=torch) for group in split]
        return part

    @property
    def values(self) -> int:
        """Per channel."""
        return 0 if self.whole is None else int(self.whole.count)

    def mean_and_var(self) -> tuple[np.ndarray, np.ndarray]:
        """Of all values; there must be some."""
        assert self.whole is not None
        return mean_and_var(self.whole)

    def var_of_means(self) -> np.ndarray:
        """Variance of the batches' means, unbiased; 0 where there is one batch."""
        if len(self.batch_means) < 2:
            return np.zeros_like(self.batch_means[0])
        return np.asarray(np.var(self.batch_means, axis=0, ddof=1))

    def worth(self) -> tuple[float, float] | None:
        """How many independent values a sample counts for, for the mean and for the variance; None
        where samples were not told apart.
        """
        if self.scatter is None:
            return None
        mean, var = self.mean_and_var()
        means, squares = self.scatter.variances(mean)
        return _ratio(var, means), _ratio(2 * var**2, squares)

    def independent_channels(self) -> float | None:
        """How many independent channels the samples' means scatter like; None where samples were
        not told apart.
        """
        if self.scatter is None:
            return None
        return self.scatter.independent_channels(self.mean_and_var()[1])

    def effective(self) -> float | None:
        """How many independent values a batch counts for; None where batches are too few, or
        nothing varies.
        """
        usual = int(np.median(self.samples)) if self.samples else 0
        means = [m for m, n in zip(self.batch_means, self.samples, strict=True) if n == usual]
        var = self.mean_and_var()[1]
        if len(means) < SEVERAL or not var.any():
            return None
        return _ratio(var, np.var(means, axis=0, ddof=1))


def _by_sample(x: Tensor, mask: Tensor | None) -> Moments:
    """A row for each sample."""
    if x.ndim > 2:
        return wide_moments(x, mask, groups=(1,) * x.shape[0])
    mean = (x if mask is None else x[mask]).to("cpu", torch.float64)
    return Moments(torch.ones(len(mean), 1).double(), mean, 0 * mean, 0 * mean)


def _axis_shares(x: Tensor) -> tuple[float, ...]:
    """Of the variance, the share between the means along each axis from the second on."""
    shares = []
    for axis in range(1, x.ndim):
        moments = wide_moments(x[:FEW].movedim(axis, 1), None)
        between, within = float(moments.mean.var(correction=0)), float(moments.var.mean())
        shares.append(between / max(between + within, 1e-30))
    return tuple(shares)


def _ratio(var: np.ndarray, of_means: np.ndarray) -> float:
    """`var` over `of_means`, harmonic mean over the channels that vary."""
    varying = var > 0
    if not varying.any():
        return 1.0
    share = float(np.mean(of_means[varying] / var[varying]))
    return 1 / max(share, 1e-12)


class InputObserver:
    """Records every call of every layer in one pass over batches, in the order of first calls.

    `training`: the layers that train normalize with the batch they meet. All else is in inference,
    dropout included, so that a difference from inference is due to the batch norms alone.
    `by_sample`: samples are told apart, and padding is searched for. `parts`: groups of samples to
    keep for each call.
    """

    def __init__(self, *, training: bool, by_sample: bool, parts: int) -> None:
        self.training, self.by_sample, self.parts = training, by_sample, parts
        self.found: dict[str, InputStatistics] = {}
        self.first_nonfinite: str | None = None
        self._calls: dict[str, int] = {}  # in this forward
        self._samples = 0  # in the batch
        self._batches = 0
        self._padding = PaddingHint(())

    def begin(self, batch: Any, samples: int) -> None:
        """A forward on this batch follows."""
        self._calls, self._samples = {}, samples
        self._batches += 1
        if self.by_sample and self._batches <= CALLS:
            self._padding = PaddingHint.of(batch)

    def called(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model is called: its arguments may hold masks that the batch does not name."""
        if self.by_sample and self._batches <= CALLS:
            self._padding = self._padding.with_arguments(model.forward, args, kwargs)

    def record(self, layer: NormLayer, x: Tensor, mask: Tensor | None) -> None:
        """Take in one call, and see that it can be answered."""
        if not x.numel():
            return  # the layer itself says best what is wrong
        x = x.detach()
        call = self._calls.setdefault(layer.name, 0)
        self._calls[layer.name] += 1
        seen = self.found.setdefault(layer.name, InputStatistics())
        regrouped = self._with_positions(x) if mask is None else x
        part = seen.add(regrouped, mask, call, by_sample=self.by_sample, parts=self.parts)
        if part is None and self.first_nonfinite is None and not bool(x.isfinite().all()):
            self.first_nonfinite = layer.name
        if part is not None and self.by_sample and mask is None and regrouped.ndim > 2:
            seen.padding.add(regrouped, part, self._padding)
            seen.axis_shares = seen.axis_shares or (_axis_shares(x) if x.ndim > 2 else ())
        if self.training and trains(layer):
            _let_train(layer.module, part, x, seen)

    def _with_positions(self, x: Tensor) -> Tensor:
        """Positions that a model has moved into the batch axis, (N·L, C), as (N, C, L) again."""
        count = self._samples
        if x.ndim > 2 or count < 1 or len(x) <= count or len(x) % count:
            return x
        regrouped: Tensor = x.unflatten(0, (count, -1))
        return regrouped.transpose(1, 2)


def _let_train(module: Any, part: Moments | None, x: Tensor, seen: InputStatistics) -> None:
    """Let one call train, by other means where the layer itself would refuse."""
    module.training = True
    running = isinstance(module, SteadyNorm) and module.statistics.needs_running
    if x.numel() == x.shape[1] and not running:  # `Batch` and torch raise for one value
        seen.single = tuple(x.shape)
        module.training = False
    elif isinstance(module, nn.SyncBatchNorm):  # refuses the CPU, waits for other replicas
        module.training = False
        mean, var = module.running_mean, module.running_var
        if part is not None and mean is not None and var is not None:
            mean.copy_(part.mean)
            var.copy_(part.var)


def trains(layer: NormLayer) -> bool:
    """Whether `model.train()` would have it normalize with batches."""
    return layer.left is None or layer.left == "keeps no running statistics"


@contextmanager
def observed(
    layers: Sequence[NormLayer], *, training: bool = False, by_sample: bool = False, parts: int = 0
) -> Iterator[InputObserver]:
    """Observes all calls of the layers while it lasts."""
    observer = InputObserver(training=training, by_sample=by_sample, parts=parts)
    with ExitStack() as restored, observing(layers, observer.record):
        for module in (layer.module for layer in layers if training):
            if isinstance(module, SteadyNorm):
                # One process looks at its own batches: it must not wait for others.
                restored.callback(setattr, module, "synchronize", module.synchronize)
                module.synchronize = False
        yield observer
