"""Population statistics of a model's layers, measured pass by pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steadynorm.kernels.reference.torch_arrays import valid_samples
from steadynorm.models.batches import Batches
from steadynorm.models.layers import NormLayer
from steadynorm.models.observe import float64_device, moments_of, observing
from steadynorm.models.progress import Progress
from steadynorm.models.replicas import LayerMoments, PassResult, ReplicaGroup
from steadynorm.models.report import CalibrationReport, LayerReport, left, moved
from steadynorm.models.untouched import Original
from steadynorm.statistics import Moments, RunningStatistics, update_average


class Mixture(NamedTuple):
    """How measured statistics become running statistics.

    `prior`: how many samples the statistics from before count for; None leaves them out.
    """

    prior: float | None

    def weight(self, samples: int) -> float:
        """The share of the measured statistics, n/(prior + n)."""
        return 1.0 if self.prior is None or samples == 0 else samples / (self.prior + samples)

    def mixed(
        self, before: RunningStatistics, measured: LayerMoments, *, unbiased: bool
    ) -> RunningStatistics:
        """The statistics to keep; `before` has no say, NaN or not, where it is left out."""
        if not self.prior:
            before = RunningStatistics(before.mean.new_zeros(()), before.var.new_zeros(()), None)
        weight = self.weight(measured.samples)
        return update_average(before, measured.moments, weight, unbiased=unbiased, xp=torch)


class MeasuringPass:
    """One pass over the batches: each layer is measured and normalized by the batch it meets.

    The model is in inference mode: before each call the batch's statistics are written to the
    layer's running ones, which then normalize it. So whatever the layer is (ours, torch's, a
    subclass with an activation, a synchronized one), nothing of training happens: no counter moves,
    no replica is waited for, and one value per channel is no error.

    `sources`: by name, the running statistics that a batch is mixed with, and that normalize a
    batch without a value.
    """

    def __init__(self, sources: Mapping[str, RunningStatistics], mixture: Mixture) -> None:
        self.sources = sources
        self.mixture = mixture
        self.found: dict[str, LayerMoments] = {}  # in the order of each layer's first call

    def observe(self, layer: NormLayer, x: Tensor, mask: Tensor | None) -> None:
        """Measures one call's input, and lets the layer normalize with what was measured."""
        module: Any = layer.module
        where = float64_device(module.running_mean)
        source = self.sources[layer.name]
        before = RunningStatistics(source.mean.to(where), source.var.to(where), None)
        samples = x.shape[0] if mask is None else int(valid_samples(mask))
        part = LayerMoments(moments_of(x, mask), int(samples > 0), samples)
        # As in training, the biased variance normalizes; a mixture does as it will in inference.
        unbiased = layer.unbiased and self.mixture.prior is not None
        now = self.mixture.mixed(before, part, unbiased=unbiased)
        some = part.moments.count > 0
        for name, value, old in (
            ("running_mean", now.mean, before.mean),
            ("running_var", now.var, before.var),
        ):
            _write(getattr(module, name), torch.where(some, value, old), layer.name)
        if getattr(module, "nonfinite", None) == "skip":
            part = _without_nonfinite(part)
        so_far = self.found.get(layer.name)
        self.found[layer.name] = part if so_far is None else so_far.joined(part)


def _without_nonfinite(part: LayerMoments) -> LayerMoments:
    """Drops the batch if a value is NaN or infinite, which is what `nonfinite="skip"` asks."""
    finite = part.moments.mean.isfinite().all() & part.moments.var.isfinite().all()
    if finite:
        return part
    return LayerMoments(Moments(*(torch.zeros_like(v) for v in part.moments)), 0, 0)


def _write(buffer: Tensor, value: Tensor, layer: str) -> None:
    """Writes statistics into a buffer. Raises ValueError where half precision cannot hold them."""
    written = value.to(buffer.dtype)
    if buffer.dtype is torch.float16 and (written.isinf() & value.isfinite()).any():
        raise ValueError(
            f"the running statistics of {layer!r} are float16, which cannot hold those of the "
            f"data, up to {float(value.abs().max()):.3g}. sn.convert makes layers that keep them "
            f"in float32."
        )
    buffer.copy_(written)


@dataclass
class Population:
    """One call: the layers to move, what is known of each, and what they will keep."""

    owner: str
    model: nn.Module
    feed: Batches
    layers: Sequence[NormLayer]
    mixture: Mixture
    replicas: ReplicaGroup
    before: dict[str, RunningStatistics] = field(default_factory=dict)
    measured: dict[str, LayerMoments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.movable = {layer.name: layer for layer in self.layers if layer.left is None}

    def start(self) -> None:
        """Learn the statistics from before: the first replica's, where they differ."""
        self.before = self.replicas.first(
            {name: layer.statistics for name, layer in self.movable.items()}
        )
        for name, running in self.before.items():
            if self.mixture.prior and not (running.mean.isfinite() & running.var.isfinite()).all():
                raise ValueError(
                    f"{self.owner}: running statistics must be finite to be mixed; those of "
                    f"{name!r} are not. Use calibrate, which leaves them out."
                )

    def once(self, original: Original, bar: Progress) -> tuple[int, int]:
        """Measure all layers in one pass."""
        self.measured, seen = self._pass(original, list(self.movable.values()), bar)
        return seen, 1

    def layerwise(self, original: Original, bar: Progress) -> tuple[int, int]:
        """Measure one layer a pass: the first that is reached without its final statistics."""
        open_layers = dict(self.movable)
        seen = rounds = 0
        while open_layers:
            found, seen = self._pass(original, list(open_layers.values()), bar)
            rounds += 1
            bar.expect(rounds + max(len(found) - 1, 0))
            first = next(iter(found), None)
            if first is None:
                break
            self.measured[first] = found[first]
            self._store(first)
            del open_layers[first]
            if len(found) == 1:
                break
        return seen, rounds

    def _pass(
        self, original: Original, layers: Sequence[NormLayer], bar: Progress
    ) -> tuple[dict[str, LayerMoments], int]:
        original.restore_random()

        def measure() -> PassResult:
            count = 0
            run = MeasuringPass(self.before, self.mixture)
            with observing(layers, run.observe):
                for _ in self.feed.run(self.model):
                    count += 1
                    bar.step()
            return PassResult(count, {name: part.cpu() for name, part in run.found.items()})

        given = self.replicas.pooled(measure)
        if given.batches == 0:
            raise ValueError(f"{self.owner}: `batches` must hold at least one batch; got none.")
        found = {name: part for name, part in given.found.items() if int(part.moments.count) > 0}
        for name, part in found.items():
            if not (part.moments.mean.isfinite() & part.moments.var.isfinite()).all():
                raise ValueError(
                    f"{self.owner}: the input of {name!r} must be finite; got NaN or infinity in "
                    f"some batch. Leave such batches out, or give our layers nonfinite='skip'."
                )
        return found, given.batches

    def _final(self, name: str) -> RunningStatistics:
        unbiased = self.movable[name].unbiased
        return self.mixture.mixed(self.before[name], self.measured[name], unbiased=unbiased)

    @torch.no_grad()
    def _store(self, name: str) -> None:
        module: Any = self.movable[name].module
        now = self._final(name)
        _write(module.running_mean, now.mean, name)
        _write(module.running_var, now.var, name)

    def write(self) -> None:
        """Copy the final statistics into the layers' buffers."""
        for name, part in self.measured.items():
            self._store(name)
            tracked = self.movable[name].module.num_batches_tracked
            if isinstance(tracked, torch.Tensor):
                tracked.clamp_(min=part.calls)

    def report(self, seen: int, rounds: int) -> CalibrationReport:
        """What happened to every layer."""
        status = "calibrated" if self.mixture.prior is None else "adapted"

        def row(layer: NormLayer) -> LayerReport:
            part = self.measured.get(layer.name)
            if part is None:
                return left(layer, layer.left or "no value reached it")
            now = Mixture(None).mixed(self.before[layer.name], part, unbiased=layer.unbiased)
            return moved(layer, status, self.before[layer.name], part, now)

        return CalibrationReport(tuple(map(row, self.layers)), seen, rounds, self.mixture.prior)
