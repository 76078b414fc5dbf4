"""Runs experiments: what is stored already is not repeated, what finishes is stored at once.

A lab that was killed and is run again ends with the same results files, byte for byte: a run
depends on its setting, its seed and the data alone, always has one thread, and the files keep no
date. Timed experiments are the exception; their results have names of their own (see `Store`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from steadynorm.evidence.lab import jobs
from steadynorm.evidence.lab.data import load
from steadynorm.evidence.lab.experiment import Cell, Experiment, Profile, Result
from steadynorm.evidence.lab.replicas import joined
from steadynorm.evidence.lab.store import Store
from steadynorm.evidence.lab.training import Tick

Begin = Callable[[Experiment, int, int], None]
"""Told of an experiment, the steps it takes in all, and those that were done before."""


def execute(
    experiment: Experiment, cell: Cell, data_dir: str | None, *, tick: Tick | None = None
) -> Result:
    """One run, as a worker does it. What goes wrong in it is a RuntimeError that names it."""
    try:
        return experiment.run(cell.setting, cell.seed, load(data_dir), tick or _nothing)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"{experiment.name}: {dict(cell.setting)}, seed {cell.seed}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _nothing(steps: int) -> None:
    pass


def run(
    experiments: Sequence[Experiment],
    *,
    profile: Profile = "quick",
    seeds: int | None = None,
    data_dir: str | None = None,
    out: str | Path = "lab",
    workers: int | None = None,
    begin: Begin | None = None,
    progress: jobs.Progress | None = None,
) -> list[Path]:
    """Run the experiments, spread over the cores, the timed ones last and alone.

    `seeds`: how many, by default what each declares for the profile. `out` holds the finished runs
    and the results; see `Store`. Returns the results files in the order of `experiments`, each
    written as soon as its last run is there.

    Raises what `load` and `jobs.run` raise.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"run: `seeds` must be at least 1; got {seeds!r}.")
    plan = _Plan(experiments, profile, seeds, Store(out, str(load(data_dir))))
    if begin is not None:
        for experiment in experiments:
            begin(experiment, plan.steps(experiment.name), plan.before(experiment.name))
    for name in plan.names:
        plan.finish(name)
    todo = [(plan.experiments[name], cell) for name in plan.names for cell in plan.missing[name]]
    planned = [
        jobs.Job(e.name, (cell,), cell.steps, execute, (e, cell, data_dir), e.timed)
        for e, cell in todo
    ]
    before = {name: plan.before(name) for name in plan.names}

    def tell(group: str, steps: int) -> None:
        if progress is not None:
            progress(group, before[group] + steps)

    for job, result in jobs.run(planned, workers=workers, progress=tell):
        plan.put(job.group, job.key[0], result)
    return [plan.paths[name] for name in plan.names]


def run_together(
    experiments: Sequence[Experiment],
    *,
    profile: Profile = "quick",
    seeds: int | None = None,
    data_dir: str | None = None,
    out: str | Path = "lab",
    progress: Callable[[Experiment, Cell], None] | None = None,
) -> list[Path]:
    """The same in the processes that `torchrun` started: one run after the other, each trained
    data-parallel by all of them. The first process keeps the store and is told of each run.

    Raises ValueError for a timed experiment, which needs the machine to itself.
    """
    timed = [experiment.name for experiment in experiments if experiment.timed]
    if timed:
        raise ValueError(
            f"run_together: `experiments` must not be timed; got {', '.join(timed)}. "
            f"Run those without torchrun."
        )
    with joined() as replicas:
        leads = replicas.rank == 0
        store = Store(out, str(load(data_dir)), processes=replicas.count)
        # What is stored is for the first process to say: another may see another disk.
        told: list[list[tuple[str, Cell]] | None] = [None]
        plan = _Plan(experiments, profile, seeds, store) if leads else None
        if plan is not None:
            for name in plan.names:
                plan.finish(name)
            told = [[(name, cell) for name in plan.names for cell in plan.missing[name]]]
        dist.broadcast_object_list(told, src=0)
        by_name = {experiment.name: experiment for experiment in experiments}
        for name, cell in told[0] or ():
            if progress is not None and leads:
                progress(by_name[name], cell)
            result = execute(by_name[name], cell, data_dir)
            if plan is not None:
                plan.put(name, cell, result)
        return [] if plan is None else [plan.paths[name] for name in plan.names]


class _Plan:
    """Which runs are wanted and which are missing."""

    def __init__(
        self, experiments: Sequence[Experiment], profile: Profile, seeds: int | None, store: Store
    ) -> None:
        self.store = store
        self.profile = profile
        self.experiments = {experiment.name: experiment for experiment in experiments}
        self.names = list(self.experiments)
        self.wanted = {e.name: e.cells(profile, seeds) for e in experiments}
        self.missing = {
            e.name: [cell for cell in self.wanted[e.name] if not store.has(e, cell)]
            for e in experiments
        }
        self.paths: dict[str, Path] = {}

    def steps(self, name: str) -> int:
        return sum(cell.steps for cell in self.wanted[name])

    def before(self, name: str) -> int:
        return self.steps(name) - sum(cell.steps for cell in self.missing[name])

    def put(self, name: str, cell: Cell, result: Result) -> None:
        self.store.put(self.experiments[name], cell, result)
        self.missing[name] = [other for other in self.missing[name] if other != cell]
        self.finish(name)

    def finish(self, name: str) -> None:
        """Write the results if nothing is missing."""
        if not self.missing[name]:
            experiment = self.experiments[name]
            self.paths[name] = self.store.finish(experiment, self.profile, self.wanted[name])
