"""What reaches the batch norms of a model in one pass over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.padding import Padded
from steadynorm.kernels.dispatch import stages_for
from steadynorm.models.calibration.layers import Layer
from steadynorm.nn import checks
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.statistics import Moments, merge, pool

SEVERAL = 8  # batches, before their means' scatter is believed: it is then known to about a half


class Scatter:
    """How far single samples' own means m and mean squares scatter, about a pivot near the mean."""

    def __init__(self, pivot: Tensor) -> None:
        self.pivot = pivot
        self.count = 0
        self.sums = torch.zeros(5, len(pivot), dtype=torch.float64)

    def add(self, rows: Moments) -> None:
        """Take in samples: their means and variances, a row each."""
        away = rows.mean - self.pivot
        square = rows.var + away * away
        self.count += len(away)
        terms = (away, square, away * away, square * square, away * square)
        self.sums += torch.stack([term.sum(0) for term in terms])

    def variances(self, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Var(m) and Var(q), with q = square - 2δ·away + δ², the mean square about `mean`."""
        away, square, away2, square2, both = (self.sums / self.count).numpy()
        shift = mean - self.pivot.numpy()
        of_means = np.maximum(away2 - away**2, 0)
        covariance = both - away * square
        of_squares = square2 - square**2 + 4 * shift**2 * of_means - 4 * shift * covariance
        return of_means, np.maximum(of_squares, 0)


class Reached:
    """What has reached one layer: moments of everything, of single batches, of single samples."""

    def __init__(self) -> None:
        self.whole: Moments | None = None
        self.scatter: Scatter | None = None
        self.batch_means: list[np.ndarray] = []
        self.samples: list[int] = []
        self.positions = 1
        self.single: tuple[int, ...] | None = None
        self.nonfinite = 0
        self.masked = False
        self.padded = Padded()

    def add(self, x: Tensor, mask: Tensor | None, *, by_sample: bool) -> Moments | None:
        """Take in one call's input; its moments, or None if it holds no finite ones."""
        rows = _moments(x, mask, by_sample=by_sample)
        if not len(rows.count):
            return None
        part = pool(rows, xp=torch)
        if not (part.mean.isfinite() & part.var.isfinite()).all():
            self.nonfinite += 1
            return None
        self.whole = part if self.whole is None else merge(self.whole, part)
        self.batch_means.append(part.mean.numpy())
        self.samples.append(x.shape[0])
        self.positions = max(self.positions, x.numel() // max(x.shape[0] * x.shape[1], 1))
        self.masked |= mask is not None
        if by_sample:
            self.scatter = self.scatter or Scatter(part.mean)
            self.scatter.add(rows)
        return part

    @property
    def mean(self) -> np.ndarray:
        """Of all values."""
        assert self.whole is not None
        return np.asarray((self.whole.mean + self.whole.mean_low).numpy())

    @property
    def var(self) -> np.ndarray:
        """Of all values, biased."""
        assert self.whole is not None
        return np.asarray(self.whole.var.numpy())

    @property
    def values(self) -> int:
        """Per channel."""
        return 0 if self.whole is None else int(self.whole.count)

    def var_of_means(self) -> np.ndarray:
        """Variance of the batches' means, unbiased; 0 where there is one batch."""
        if len(self.batch_means) < 2:
            return np.zeros_like(self.var)
        return np.asarray(np.var(self.batch_means, axis=0, ddof=1))

    def worth(self) -> tuple[float, float] | None:
        """How many independent values a sample counts for, to know the mean and the variance by;
        None where samples were not told apart.
        """
        if self.scatter is None:
            return None
        means, squares = self.scatter.variances(self.mean)
        return _ratio(self.var, means), _ratio(2 * self.var**2, squares)

    def effective(self) -> float | None:
        """How many independent values a batch counts for; None where batches are too few."""
        usual = int(np.median(self.samples)) if self.samples else 0
        means = [m for m, n in zip(self.batch_means, self.samples, strict=True) if n == usual]
        if len(means) < SEVERAL:
            return None
        return _ratio(self.var, np.var(means, axis=0, ddof=1))


def _ratio(var: np.ndarray, of_means: np.ndarray) -> float:
    """`var` over `of_means`, harmonic mean over the channels that vary."""
    some = var > 0
    if not some.any():
        return 1.0
    share = float(np.mean(of_means[some] / var[some]))
    return 1 / max(share, 1e-12)


def _moments(x: Tensor, mask: Tensor | None, *, by_sample: bool) -> Moments:
    """Moments in float64 on the CPU, a row for each sample or one for all; empty rows left out."""
    x = x.detach()
    if by_sample and x.ndim == 2:
        kept = x if mask is None else x[mask]
        mean = kept.to("cpu", torch.float64)
        return Moments(torch.ones(len(mean), 1).double(), mean, 0 * mean, 0 * mean)
    groups = (1,) * x.shape[0] if by_sample else None
    count, mean, var, low = stages_for(x).moments(x, mask=mask, groups=groups)
    counts = torch.as_tensor(count).to("cpu", torch.float64).reshape(-1, 1)
    rows = [part.to("cpu", torch.float64).reshape(-1, x.shape[1]) for part in (mean, var, low)]
    some = (counts > 0).flatten()
    mean, var, low = (row[some] for row in rows)
    return Moments(counts[some], mean + low, var, torch.zeros_like(mean))


class Watch:
    """One pass: every call of every layer is taken in, in the order of first calls.

    `training`: the layers that train do so, each normalizing with the batch it meets; all else is
    in inference, dropout included, so that what differs from inference is the batch norms' doing.
    """

    def __init__(self, layers: Sequence[Layer], training: bool) -> None:
        self.layers = layers
        self.training = training
        self.found: dict[str, Reached] = {}
        self.first_nonfinite: str | None = None
        self.known: list[Tensor] = []  # masks that the batch holds
        self.samples = 0  # in the batch

    def meet(self, layer: Layer, args: Any, kwargs: Any) -> None:
        """Take in one call, and see that it can be answered."""
        module: Any = layer.module
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        size = getattr(module, "num_features", None) or len(module.running_mean)
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != size or not x.numel():
            return  # the layer itself says best what is wrong
        mask = kwargs.get("mask") if isinstance(module, SteadyNorm) else None
        if mask is not None:
            mask = checks.expanded_mask(mask, x, type(module).__name__)
        reached = self.found.setdefault(layer.name, Reached())
        rows = self._by_sample(x) if mask is None else x
        part = reached.add(rows, mask, by_sample=not self.training)
        if part is None and self.first_nonfinite is None and not bool(x.isfinite().all()):
            self.first_nonfinite = layer.name
        if part is not None and not self.training and mask is None and x.ndim > 2:
            reached.padded.add(x, part, self.known)
        if self.training and trains(layer):
            self._prepare(module, part, x, reached)

    def _by_sample(self, x: Tensor) -> Tensor:
        """Positions that a model has moved into the batch axis, (N·L, C), as (N, C, L) again."""
        count = self.samples
        if x.ndim > 2 or count < 1 or len(x) <= count or len(x) % count:
            return x
        regrouped: Tensor = x.detach().unflatten(0, (count, -1))
        return regrouped.transpose(1, 2)

    def _prepare(self, module: Any, part: Moments | None, x: Tensor, reached: Reached) -> None:
        """Let one call train, by other means where the layer itself would refuse."""
        one = x.numel() == x.shape[1]
        kept: Any = module
        if one and refuses_one(module):
            reached.single = tuple(x.shape)
            module.training = False
        elif isinstance(module, nn.SyncBatchNorm):  # refuses the CPU, waits for other replicas
            module.training = False
            if part is not None:
                kept.running_mean.copy_(part.mean)
                kept.running_var.copy_(part.var)
        else:
            module.training = True


def trains(layer: Layer) -> bool:
    """Whether `model.train()` would have it normalize with batches."""
    return layer.left is None or layer.left == "keeps no running statistics"


def refuses_one(module: nn.Module) -> bool:
    """Whether it raises in training for one value per channel, as `Batch` and torch do."""
    return not (isinstance(module, SteadyNorm) and module.statistics.needs_running)


@contextmanager
def watching(layers: Sequence[Layer], *, training: bool) -> Iterator[Watch]:
    """Hooks on the layers while it lasts; they stand last, so that they see what the layer sees."""
    watch = Watch(layers, training)
    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(_hook(watch, layer), with_kwargs=True)
            hooks.callback(handle.remove)
            if training and isinstance(layer.module, SteadyNorm):
                # One process looks at its own batches: it must not wait for others.
                hooks.callback(setattr, layer.module, "synchronize", layer.module.synchronize)
                layer.module.synchronize = False
        yield watch


def _hook(watch: Watch, layer: Layer) -> Callable[[Any, Any, Any], None]:
    def hook(_: Any, args: Any, kwargs: Any) -> None:
        watch.meet(layer, args, kwargs)

    return hook
