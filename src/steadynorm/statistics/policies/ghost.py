"""`Ghost`: groups of samples, each normalized on its own."""

from __future__ import annotations

from dataclasses import dataclass

from steadynorm.statistics.moments import Moments
from steadynorm.statistics.normalizer import Normalizer, of_batch
from steadynorm.statistics.policies.base import Context, Policy, check_number
from steadynorm.statistics.running import RunningStatistics


@dataclass(frozen=True)
class Ghost(Policy):
    """Every group of `size` consecutive samples is normalized on its own (Hoffer et al. 2017).

    In training only. A last group of fewer than 2 samples joins the one before it. The running
    statistics are updated by each group in order, each counting as one batch.

    >>> Ghost(size=32).lengths(70)
    (32, 32, 6)
    >>> Ghost(size=32).lengths(65)
    (32, 33)
    """

    size: int = 32

    needs_running = False
    batch_alone = True
    counts_batches = False

    def __post_init__(self) -> None:
        check_number("Ghost", "size", self.size, low=1, whole=True)

    def lengths(self, samples: int) -> tuple[int, ...]:
        """How many samples each group of a batch holds."""
        full, rest = samples // self.size, samples % self.size  # Dynamo follows no divmod
        groups = [self.size] * full
        if rest >= 2 or (rest and not groups):
            groups.append(rest)
        elif rest:
            groups[-1] += rest
        return tuple(groups)

    def pieces(self, before: int, samples: int, total: int) -> tuple[int, tuple[int, ...]]:
        """Which groups of a batch of `total` samples hold the `samples` after the first `before`.

        Returns the first such group, and how many of the samples it and the next ones hold.

        >>> Ghost(size=4).pieces(before=6, samples=5, total=12)
        (1, (2, 3))
        """
        first, start = 0, 0
        held: list[int] = []
        for group, length in enumerate(self.lengths(total)):
            end = start + length
            common = min(end, before + samples) - max(start, before)
            if common > 0:
                first = first if held else group
                held.append(common)
            start = end
        return first, tuple(held)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        return of_batch(batch)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        for group in range(batch.mean.shape[0]):
            row = Moments(*(part[group] for part in batch))
            some = row.count > 0
            before, batches = running, None
            if running.batches is not None:
                # In the statistics' type, for 1 / (t + 1) of an integer array would be float32.
                before = running._replace(batches=running.batches + 0 * row.count)
                batches = running.batches + some[0]
            after = super().update(row, before, context)
            running = RunningStatistics(
                context.xp.where(some, after.mean, running.mean),
                context.xp.where(some, after.var, running.var),
                batches,
            )
        return running
