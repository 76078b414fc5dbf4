"""The conditions of an experiment, and its finished runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from steadynorm.evidence import estimates
from steadynorm.evidence.estimates import Estimate

Profile = Literal["quick", "full"]
Setting = Mapping[str, Any]
"""One value for each factor, and whatever else a run needs: strings, numbers, True, None."""
Result = Mapping[str, Any]
"""What a run measured: the same, and lists of them."""


def grid(**factors: Any) -> list[Setting]:
    """Every combination; the last factor varies fastest. A range or tuple holds the values of a
    factor, anything else is its only value.

    >>> grid(batch=(2, 1), samples=100)
    [{'batch': 2, 'samples': 100}, {'batch': 1, 'samples': 100}]
    """
    values = [value if isinstance(value, tuple | range) else (value,) for value in factors.values()]
    return [dict(zip(factors, row, strict=True)) for row in product(*values)]


@dataclass(frozen=True)
class FinishedRun:
    """A run and its result. `run["error"]` looks in the result, then in the setting."""

    setting: Setting
    seed: int
    result: Result

    def __getitem__(self, name: str) -> Any:
        return self.result[name] if name in self.result else self.setting[name]


class Runs(Sequence[FinishedRun]):
    """Finished runs, in the order of the experiment's cells.

    >>> runs = Runs(FinishedRun({"batch": 2}, seed, {"error": 3.0 + seed}) for seed in (0, 1))
    >>> runs.values("error", batch=2)
    [3.0, 4.0]
    """

    def __init__(self, runs: Iterable[FinishedRun]) -> None:
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[FinishedRun]:
        return iter(self._runs)

    def __getitem__(self, index: Any) -> Any:
        return self._runs[index]

    def where(self, **factors: Any) -> Runs:
        """Those whose setting has all these values."""
        return Runs(
            run
            for run in self._runs
            if all(name in run.setting and run.setting[name] == v for name, v in factors.items())
        )

    def values(self, measure: str, **factors: Any) -> list[Any]:
        """A measure of the runs with these values, ordered by seed, so that lists of two settings
        pair up. Raises ValueError unless there is exactly one run for each seed.
        """
        found = self.where(**factors)
        by_seed = {run.seed: run[measure] for run in found}
        if not by_seed or len(by_seed) < len(found):
            raise ValueError(
                f"values: `factors` must leave one run for each seed; "
                f"got {len(found)} runs of {len(by_seed)} seeds for {factors!r}."
            )
        return [by_seed[seed] for seed in sorted(by_seed)]

    def mean(self, measure: str, **factors: Any) -> Estimate:
        """The mean of a measure over the seeds."""
        return estimates.mean(self.values(measure, **factors))

    def difference(
        self, measure: str, factor: str, first: Any, second: Any, **factors: Any
    ) -> Estimate:
        """A measure where `factor` is `first` minus the same where it is `second`, by seed."""
        return estimates.difference(*self._both(measure, factor, first, second, factors))

    def ratio(self, measure: str, factor: str, first: Any, second: Any, **factors: Any) -> Estimate:
        """A measure where `factor` is `first` over the same where it is `second`, by seed."""
        return estimates.ratio(*self._both(measure, factor, first, second, factors))

    def _both(
        self, measure: str, factor: str, first: Any, second: Any, factors: Mapping[str, Any]
    ) -> list[list[Any]]:
        return [self.values(measure, **{factor: value}, **factors) for value in (first, second)]

    def derived(self, **measures: Callable[[FinishedRun], Any]) -> Runs:
        """The same runs with further measures, each computed from the run."""
        return Runs(
            FinishedRun(
                run.setting, run.seed, {**run.result, **{k: f(run) for k, f in measures.items()}}
            )
            for run in self._runs
        )

    def distinct(self, factor: str) -> list[Any]:
        """The values that a factor takes, in order of appearance."""
        return list(
            dict.fromkeys(run.setting[factor] for run in self._runs if factor in run.setting)
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return sorted({run.seed for run in self._runs})
