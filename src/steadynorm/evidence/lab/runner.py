"""Runs experiments: what is stored is not repeated, what finishes is stored at once.

A lab that was killed and is run again ends with the same results files, byte for byte: a run
depends on its setting, its seed and the data alone, always has one thread, and the files keep no
date. Timed experiments are the exception; their results have names of their own (see `Store`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from steadynorm.evidence import workers as processes
from steadynorm.evidence.data_parallel import joined
from steadynorm.evidence.digits import load
from steadynorm.evidence.lab.experiment import Experiment, PlannedRun
from steadynorm.evidence.lab.runs import Profile, Result
from steadynorm.evidence.lab.store import Store
from steadynorm.evidence.training import Tick


def execute(
    experiment: Experiment, run: PlannedRun, data_dir: str | None, *, tick: Tick | None = None
) -> Result:
    """One run, as a worker does it. What goes wrong in it is a RuntimeError that names it."""
    try:
        return experiment.execute(
            run.setting, run.seed, load(data_dir), tick or (lambda steps: None)
        )
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"{experiment.name}: {dict(run.setting)}, seed {run.seed}: "
            f"{type(error).__name__}: {error}"
        ) from error


def run(
    experiments: Sequence[Experiment],
    *,
    profile: Profile = "quick",
    seeds: int | None = None,
    data_dir: str | None = None,
    out: str | Path = "lab",
    workers: int | None = None,
    begin: Callable[[str, int, int], None] | None = None,
    progress: processes.Progress | None = None,
) -> list[Path]:
    """Run the experiments, spread over the cores, the timed ones last and alone.

    `seeds`: how many, by default what each declares for the profile. `out` holds the finished runs
    and the results; see `Store`. `begin` is called with each experiment's name, its steps and those
    done before, `progress` with its name and the steps done so far. Returns the results files
    in the order of `experiments`, each written as soon as its last run is there.

    Raises what `load` and `workers.run` raise.
    """
    if seeds is not None and seeds < 1:
        raise ValueError(f"run: `seeds` must be at least 1; got {seeds!r}.")
    plan = _Plan(experiments, profile, seeds, _store(out, data_dir))
    before = {}
    for name, planned in plan.planned.items():
        total, missing = (sum(one.steps for one in some) for some in (planned, plan.missing[name]))
        before[name] = total - missing
        if begin is not None:
            begin(name, total, before[name])
    jobs = [
        processes.Job(name, (one,), one.steps, execute, (e, one, data_dir), e.timed)
        for name, e in plan.experiments.items()
        for one in plan.missing[name]
    ]

    def report(group: str, steps: int) -> None:
        if progress is not None:
            progress(group, before[group] + steps)

    for job, result in processes.run(jobs, workers=workers, progress=report):
        plan.put(job.group, job.key[0], result)
    return list(plan.paths.values())


def run_together(
    experiments: Sequence[Experiment],
    *,
    profile: Profile = "quick",
    seeds: int | None = None,
    data_dir: str | None = None,
    out: str | Path = "lab",
    progress: Callable[[Experiment, PlannedRun], None] | None = None,
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
    with joined() as group:
        # Only the first process reads the store: another may see another disk.
        plan = None
        missing: list[list[tuple[str, PlannedRun]] | None] = [None]
        if group.rank == 0:
            store = _store(out, data_dir, processes=group.count)
            plan = _Plan(experiments, profile, seeds, store)
            missing = [[(name, one) for name, some in plan.missing.items() for one in some]]
        dist.broadcast_object_list(missing, src=0)
        by_name = {experiment.name: experiment for experiment in experiments}
        for name, planned in missing[0] or ():
            if progress is not None and plan is not None:
                progress(by_name[name], planned)
            result = execute(by_name[name], planned, data_dir)
            if plan is not None:
                plan.put(name, planned, result)
        return [] if plan is None else list(plan.paths.values())


def _store(out: str | Path, data_dir: str | None, *, processes: int = 1) -> Store:
    digits = load(data_dir)
    checksum = "" if data_dir is None else digits.checksum()  # scikit-learn's are always the same
    return Store(out, str(digits), checksum=checksum, processes=processes)


class _Plan:
    """Which runs are wanted and which are missing; writes the results of what is complete."""

    def __init__(
        self, experiments: Sequence[Experiment], profile: Profile, seeds: int | None, store: Store
    ) -> None:
        self.store = store
        self.profile = profile
        self.experiments = {experiment.name: experiment for experiment in experiments}
        self.planned = {e.name: e.planned(profile, seeds) for e in experiments}
        self.missing = {
            e.name: [one for one in self.planned[e.name] if not store.has(e, one)]
            for e in experiments
        }
        self.paths = {e.name: store.results(e) for e in experiments}
        for name in self.experiments:
            self._finish(name)

    def put(self, name: str, run: PlannedRun, result: Result) -> None:
        self.store.put(self.experiments[name], run, result)
        self.missing[name].remove(run)
        self._finish(name)

    def _finish(self, name: str) -> None:
        if not self.missing[name]:
            self.store.finish(self.experiments[name], self.profile, self.planned[name])
