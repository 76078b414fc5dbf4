"""What an experiment is: a claim, the conditions it is tested under, a measure, and the rule by
which runs over several seeds decide.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.runs import Profile, Result, Runs, Setting
from steadynorm.evidence.lab.verdict import Verdict
from steadynorm.evidence.training import Recipe, Tick
from steadynorm.report.page import Piece, Section


@dataclass(frozen=True)
class PlannedRun:
    """A setting and a seed, and roughly how many steps the run takes."""

    setting: Setting
    seed: int
    steps: int = 1

    def key(self, experiment: Experiment, data: str) -> str:
        """The name under which the run is stored: it changes with whatever changes the result."""
        named = [experiment.name, experiment.revision, data, self.setting, self.seed]
        return hashlib.sha256(canonical(named).encode()).hexdigest()[:16]


def one_cycle(setting: Setting) -> Recipe:
    """The recipe of tour and lab, at the setting's batch size."""
    return Recipe(setting["batch"], setting["samples"])


@dataclass(frozen=True)
class Experiment:
    """A declaration. To add one, write it in a file of its own in `experiments/`, as `EXPERIMENT`,
    and list the file in `experiments/__init__.py`. All functions stand at the top level of that
    file, since runs are sent to other processes.

    `factors`: name and meaning of what is varied. `rule`: when the claim counts as supported, in
    words and before any run. `settings`: the conditions by profile, each a dict with all that a run
    depends on, its length too. `run(setting, seed, digits, tick)`: one run, a function of its
    arguments alone, whose result holds plain numbers, strings and lists; a number that is not
    finite is stored as None. `verdict(runs)`, and the tables, charts and remarks of `shows(runs)`:
    from all finished runs. `recipe(setting)`: how a network is trained, by default in one cycle;
    `steps(setting)`: how many steps a run reports to `tick`, by default those of the setting, or
    else of the recipe. `weights`: how long a step takes in units of the shortest, by factor and
    value; 1 where a value is not named, and the product over the factors. `seeds`: how many, by
    profile. `timed`: the run takes times, so it has the machine to itself, and its results are no
    function of the seed. `revision`: to be raised when what a run computes changes, so that stored
    runs are not mixed up.
    """

    name: str
    title: str
    claim: str
    source: str
    factors: Mapping[str, str]
    measure: str
    rule: str
    settings: Mapping[Profile, Sequence[Setting]]
    run: Callable[[Setting, int, Digits, Tick], Result]
    verdict: Callable[[Runs], Verdict]
    shows: Callable[[Runs], Iterable[Piece]]
    recipe: Callable[[Setting], Recipe] = one_cycle
    steps: Callable[[Setting], int] | None = None
    weights: Mapping[str, Mapping[Any, int]] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=lambda: {"quick": 3, "full": 5})
    timed: bool = False
    revision: int = 1

    def planned(self, profile: Profile, seeds: int | None = None) -> list[PlannedRun]:
        """The runs of a profile: every setting with each of `seeds` seeds, by default its own."""
        count = self.seeds[profile] if seeds is None else seeds
        return [
            PlannedRun(setting, seed, self.length(setting) * self.weight(setting))
            for setting in self.settings[profile]
            for seed in range(count)
        ]

    def length(self, setting: Setting) -> int:
        """Steps that a run reports."""
        if self.steps is not None:
            return self.steps(setting)
        return int(setting["steps"]) if "steps" in setting else self.recipe(setting).steps

    def weight(self, setting: Setting) -> int:
        """How long a step takes, in units of the shortest."""
        return prod(by.get(setting[factor], 1) for factor, by in self.weights.items())

    def execute(self, setting: Setting, seed: int, digits: Digits, tick: Tick) -> Result:
        """One run, which reports weighted steps."""
        weight = self.weight(setting)
        return self.run(setting, seed, digits, lambda steps: tick(weight * steps))

    def figures(self, runs: Runs) -> Section:
        """What the report shows besides its declaration and verdict."""
        return Section.of(self.title, *self.shows(runs))


def canonical(value: Any) -> str:
    """JSON that is the same text for the same value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
