"""What an experiment is: a claim, the factors that are varied, a measure, and the rule by which
runs over several seeds decide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steadynorm.evidence.lab.data import Digits
from steadynorm.evidence.lab.estimates import Estimate
from steadynorm.evidence.lab.training import Tick
from steadynorm.report.page import Chart, Table

Profile = Literal["quick", "full"]
Setting = Mapping[str, Any]
"""One value for each factor, and whatever else a run needs: strings, numbers, True, None."""
Result = Mapping[str, Any]
"""What a run measured: the same, and lists of them."""
Outcome = Literal["supported", "not supported here", "mixed", "undecided"]


@dataclass(frozen=True)
class Cell:
    """One run that is wanted: a setting and a seed, and about how many steps it takes."""

    setting: Setting
    seed: int
    steps: int = 1

    def key(self, experiment: Experiment, data: str) -> str:
        """The name under which the run is stored: another for whatever changes its result."""
        named = [experiment.name, experiment.revision, data, self.setting, self.seed]
        return hashlib.sha256(canonical(named).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A finished run. `run["error"]` looks in the result, then in the setting."""

    setting: Setting
    seed: int
    result: Result

    def __getitem__(self, name: str) -> Any:
        return self.result[name] if name in self.result else self.setting[name]


class Runs(Sequence[Run]):
    """Finished runs, in the order of the experiment's cells.

    >>> runs = Runs([Run({"batch": 2}, seed, {"error": 3.0 + seed}) for seed in (0, 1)])
    >>> runs.values("error", batch=2)
    [3.0, 4.0]
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
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
        """A measure of the runs with these values, one for each seed, by seed: lists of two
        settings pair up. Raises ValueError where a seed comes twice or nothing is found.
        """
        found = self.where(**factors)
        by_seed = {run.seed: run[measure] for run in found}
        if not by_seed or len(by_seed) < len(found):
            raise ValueError(
                f"values: `factors` must leave one run for each seed; "
                f"got {len(found)} runs of {len(by_seed)} seeds for {factors!r}."
            )
        return [by_seed[seed] for seed in sorted(by_seed)]

    def distinct(self, factor: str) -> list[Any]:
        """The values that a factor takes, in order of appearance."""
        return list(
            dict.fromkeys(run.setting[factor] for run in self._runs if factor in run.setting)
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return sorted({run.seed for run in self._runs})


@dataclass(frozen=True)
class Finding:
    """One thing that the rule asks for, and whether it was seen. `expected`: "above 2". `holds` is
    "yes" where the whole interval lies there, "no" where none of it does, and "open" otherwise.
    """

    words: str
    estimate: Estimate
    expected: str
    holds: Literal["yes", "no", "open"]


def expect(
    words: str, estimate: Estimate, *, above: float | None = None, below: float | None = None
) -> Finding:
    """A finding: the estimate is to lie above a bound, below one, or between two.

    A single seed decides nothing.

    >>> expect("times fewer steps", Estimate(3.0, 2.5, 3.5, 5), above=2).holds
    'yes'
    >>> expect("times fewer steps", Estimate(3.0, 1.5, 4.5, 5), above=2).holds
    'open'
    """
    low = float("-inf") if above is None else above
    high = float("inf") if below is None else below
    bounds = [f"{side} {bound:g}" for side, bound in (("above", above), ("below", below))
              if bound is not None]  # fmt: skip
    if not bounds:
        raise ValueError("expect: `above` or `below` must be given; got neither.")
    if estimate.seeds < 2:
        holds: Literal["yes", "no", "open"] = "open"
    elif low < estimate.low and estimate.high < high:
        holds = "yes"
    elif estimate.high <= low or high <= estimate.low:
        holds = "no"
    else:
        holds = "open"
    return Finding(words, estimate, " and ".join(bounds), holds)


@dataclass(frozen=True)
class Verdict:
    """What the runs say about the claim. The first of the findings is the main one."""

    outcome: Outcome
    sentence: str
    findings: Sequence[Finding]

    @property
    def seeds(self) -> int:
        """The fewest seeds behind a finding."""
        return min(finding.estimate.seeds for finding in self.findings)

    def record(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "outcome": self.outcome,
            "sentence": self.sentence,
            "seeds": self.seeds,
            "findings": [
                {
                    "words": finding.words,
                    "expected": finding.expected,
                    "holds": finding.holds,
                    **finding.estimate._asdict(),
                }
                for finding in self.findings
            ],
        }


def judge(sentence: str, findings: Sequence[Finding]) -> Verdict:
    """The verdict by the one rule of the lab: all findings seen is "supported", none of them "not
    supported here", some seen and some not "mixed"; with one left open it is "undecided", unless
    another one already failed.
    """
    holds = {finding.holds for finding in findings}
    if not holds:
        raise ValueError("judge: `findings` must hold at least one finding; got none.")
    if holds == {"yes"}:
        outcome: Outcome = "supported"
    elif "no" not in holds:
        outcome = "undecided"
    elif "yes" in holds:
        outcome = "mixed"
    else:
        outcome = "not supported here"
    return Verdict(outcome, sentence, list(findings))


@dataclass(frozen=True)
class Shown:
    """What the report shows of an experiment besides its declaration and verdict."""

    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    text: Sequence[str] = ()


def _one(setting: Setting) -> int:
    return 1


@dataclass(frozen=True)
class Experiment:
    """A declaration. To add one: write it in a file of its own in `experiments/`, as `EXPERIMENT`,
    and name it in `experiments/__init__.py`. All functions stand at the top level of that file,
    since runs are sent to other processes.

    `factors`: name and meaning of what is varied. `rule`: in words, and before any run, when the
    claim counts as supported. `settings(profile)`: the settings to run, each a dict that holds all
    that a run depends on, its length too. `run(setting, seed, digits, tick)`: one run, the same for
    the same arguments, with plain numbers, strings and lists as result; a number that is not finite
    is stored as None. `verdict(runs)` and `show(runs)`: from all finished runs. `steps(setting)`:
    about how many steps a run takes. `seeds`: how many of them, by profile. `timed`: it takes
    times, so each run has the machine to itself, and its results are no function of the seed.
    `revision`: raised when what a run computes changes, so that stored runs are not mixed up.
    """

    name: str
    title: str
    claim: str
    source: str
    factors: Mapping[str, str]
    measure: str
    rule: str
    settings: Callable[[Profile], Sequence[Setting]]
    run: Callable[[Setting, int, Digits, Tick], Result]
    verdict: Callable[[Runs], Verdict]
    show: Callable[[Runs], Shown]
    steps: Callable[[Setting], int] = _one
    seeds: Mapping[str, int] = field(default_factory=lambda: {"quick": 3, "full": 5})
    timed: bool = False
    revision: int = 1

    def cells(self, profile: Profile, seeds: int | None = None) -> list[Cell]:
        """The runs of a profile: every setting with each of `seeds` seeds, by default its own."""
        count = self.seeds[profile] if seeds is None else seeds
        return [
            Cell(setting, seed, self.steps(setting))
            for setting in self.settings(profile)
            for seed in range(count)
        ]


def canonical(value: Any) -> str:
    """JSON that is the same text for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
