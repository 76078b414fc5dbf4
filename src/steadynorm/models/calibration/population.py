"""Population statistics of a model's layers, measured pass by pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steadynorm.models.calibration.batches import Batches
from steadynorm.models.calibration.layers import Layer
from steadynorm.models.calibration.measuring import Measured, Mixture, measuring
from steadynorm.models.calibration.progress import Progress
from steadynorm.models.calibration.replicas import Replicas, Yield
from steadynorm.models.calibration.report import CalibrationReport, LayerReport, left, moved
from steadynorm.models.untouched import Original
from steadynorm.statistics import RunningStatistics


class Population:
    """One call: the layers to move, what is known of each, and what they will keep."""

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        feed: Batches,
        layers: Sequence[Layer],
        mixture: Mixture,
        replicas: Replicas,
    ) -> None:
        self.owner = owner
        self.model = model
        self.feed = feed
        self.layers = layers
        self.mixture = mixture
        self.replicas = replicas
        self.movable = {layer.name: layer for layer in layers if layer.left is None}
        self.before: dict[str, RunningStatistics] = {}
        self.measured: dict[str, Measured] = {}

    def start(self) -> None:
        """Learn the statistics from before: the first replica's, where they differ."""
        self.before = self.replicas.first(
            {name: layer.kept for name, layer in self.movable.items()}
        )
        for name, kept in self.before.items():
            if self.mixture.prior and not (kept.mean.isfinite() & kept.var.isfinite()).all():
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
            self._store(open_layers.pop(first), self._final(first))
            if len(found) == 1:
                break
        return seen, rounds

    def _pass(
        self, original: Original, layers: Sequence[Layer], bar: Progress
    ) -> tuple[dict[str, Measured], int]:
        original.restore_random()

        def measure() -> Yield:
            count = 0
            with measuring(layers, self.before, self.mixture) as run:
                for _ in self.feed.run(self.model):
                    count += 1
                    bar.step()
            return Yield(count, {name: part.cpu() for name, part in run.found.items()})

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
        return self.mixture.kept(self.before[name], self.measured[name], unbiased=unbiased)

    @staticmethod
    @torch.no_grad()
    def _store(layer: Layer, now: RunningStatistics) -> None:
        module: Any = layer.module
        module.running_mean.copy_(now.mean.to(module.running_mean.dtype))
        module.running_var.copy_(now.var.to(module.running_var.dtype))

    def write(self) -> None:
        """Copy the final statistics into the layers' buffers."""
        for name, part in self.measured.items():
            layer = self.movable[name]
            self._store(layer, self._final(name))
            tracked = layer.module.num_batches_tracked
            if isinstance(tracked, torch.Tensor):
                tracked.clamp_(min=part.calls)

    def report(self, seen: int, rounds: int) -> CalibrationReport:
        """What happened to every layer."""
        status = "calibrated" if self.mixture.prior is None else "adapted"

        def row(layer: Layer) -> LayerReport:
            part = self.measured.get(layer.name)
            if part is None:
                return left(layer, layer.left or "no value reached it")
            now = Mixture(None).kept(self.before[layer.name], part, unbiased=layer.unbiased)
            return moved(layer, status, self.before[layer.name], part, now)

        return CalibrationReport(tuple(map(row, self.layers)), seen, rounds, self.mixture.prior)
