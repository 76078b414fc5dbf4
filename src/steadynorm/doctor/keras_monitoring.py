"""A training run in Keras, read from the moving statistics before and after each step."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from steadynorm.doctor.evidence.keras_model import keras_norms, probe_keras
from steadynorm.doctor.evidence.training import (
    WINDOW,
    ChannelReading,
    Reading,
    TrainingRun,
    trend,
)

if TYPE_CHECKING:
    from steadynorm.doctor.diagnosis import Report

MANY = 1 << 30  # values in a batch, where they are not counted: Keras keeps the biased variance
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


class KerasMonitor:
    """Records a run of `fit`. `steps`: training steps so far.

    Compiled training steps show no layer's input. But

        moving ← momentum·moving + (1 − momentum)·batch

    so the batch's mean and variance follow from the moving ones before and after: of a step of
    several batches (`steps_per_execution`), their weighted average.
    """

    def __init__(self, model: Any, every: int, writers: list[Any]) -> None:
        self.model, self.every, self.writers = model, every, writers
        self.steps = 0
        self.readings: list[Reading] = []
        self._by_channel: dict[str, deque[ChannelReading]] = {}
        self._moved: dict[str, int] = {}
        self._before: Statistics = {}
        self._iterations_before = 0

    def begin_step(self) -> None:
        """A training step begins."""
        if self.steps % self.every == 0:
            self._before, self._iterations_before = self._statistics(), self._iterations()

    def end_step(self) -> None:
        """A training step is over."""
        if self._before:
            after = self._statistics()
            # The last execution of an epoch holds what batches are left.
            batches = self._iterations() - self._iterations_before
            batches = batches or int(getattr(self.model, "steps_per_execution", None) or 1)
            for name, layer in keras_norms(self.model):
                self._read(name, layer, batches, *self._before[name], *after[name])
        self._before = {}
        self.steps += 1

    def report(self) -> Report:
        """What the doctor says of the model as it is now, and of the run so far."""
        from steadynorm.doctor.diagnosis import judge

        last = self._by_channel.items()
        trends = {name: found for name, r in last if (found := trend(r, self.steps))}
        seen = tuple(self._by_channel)
        run = TrainingRun(self.steps, self.every, seen, tuple(self.readings), trends)
        still = [name for name, moved in self._moved.items() if not moved]
        evidence = replace(probe_keras(self.model), run=run)
        if still:
            remark = f"In no step that was read did the statistics of {still[0]!r} move"
            more = f", nor those of {len(still) - 1} others" if len(still) > 1 else ""
            remark += f"{more}: frozen, or called with training=False."
            evidence = replace(evidence, remarks=(remark,))
        return judge(evidence)

    def _iterations(self) -> int:
        """Batches that the optimizer has taken; always 0 where its count says something else."""
        optimizer = getattr(self.model, "optimizer", None)
        if optimizer is None or getattr(optimizer, "gradient_accumulation_steps", None):
            return 0
        return int(optimizer.iterations.numpy())

    def _statistics(self) -> Statistics:
        sync = getattr(self.model, "jax_state_sync", None)
        if sync is not None:  # JAX's trainer keeps the state to itself
            sync()
        return {
            name: (
                np.array(layer.moving_mean.numpy(), np.float64),
                np.array(layer.moving_variance.numpy(), np.float64),
            )
            for name, layer in keras_norms(self.model)
        }

    def _read(
        self, name: str, layer: Any, batches: int, mean: np.ndarray, var: np.ndarray,
        new_mean: np.ndarray, new_var: np.ndarray,
    ) -> None:  # fmt: skip
        moved = bool((mean != new_mean).any() or (var != new_var).any())
        self._moved[name] = self._moved.get(name, 0) + moved
        momentum = float(layer.momentum) ** batches
        if not moved or momentum >= 1:
            return
        batch_mean, batch_var = (
            (new - momentum * old) / (1 - momentum)
            for old, new in ((mean, new_mean), (var, new_var))
        )
        found = ChannelReading(
            self.steps, MANY, batch_mean, np.maximum(batch_var, 0), mean, var,
            float(layer.epsilon), np.zeros(len(mean), bool),
        )  # fmt: skip
        self._by_channel.setdefault(name, deque(maxlen=WINDOW)).append(found)
        unknown = float("nan")
        reading = found.reading(name, unknown, unknown)._replace(dead=unknown)
        self.readings.append(reading)
        for write in self.writers:
            write(reading)
