"""Runs experiments: what is stored already is not repeated, what finishes is stored at once.

A lab that was killed and is run again ends with the same results files, byte for byte: a run
depends on its setting, its seed and the data alone, always has one thread, and the files keep no
date. Timed experiments are the exception; their results have names of their own (see `Store`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from steadynorm.lab import jobs
from steadynorm.lab.data import load
from steadynorm.lab.experiment import Cell, Experiment, Profile, Result
from steadynorm.lab.store import Store
from steadynorm.lab.training import Tick

Begin = Callable[[Experiment, int, int], None]
"""Told of an experiment, the steps it takes in all, and those that were done before."""


def execute(
    experiment: Experiment, cell: Cell, data_dir: str | None, *, tick: Tick | None = None
) -> Result:
    """One run, as a worker does it."""
    return experiment.run(cell.setting, cell.seed, load(data_dir), tick or _nothing)


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
    store = Store(out, str(load(data_dir)))
    wanted = {experiment.name: experiment.cells(profile, seeds) for experiment in experiments}
    by_name = {experiment.name: experiment for experiment in experiments}
    missing: dict[str, int] = {}
    before: dict[str, int] = {}
    planned: list[jobs.Job] = []
    for name, experiment in by_name.items():
        todo = [cell for cell in wanted[name] if not store.has(experiment, cell)]
        missing[name] = len(todo)
        total = sum(cell.steps for cell in wanted[name])
        before[name] = total - sum(cell.steps for cell in todo)
        if begin is not None:
            begin(experiment, total, before[name])
        planned += [
            jobs.Job(
                name, (cell,), cell.steps, execute, (experiment, cell, data_dir), experiment.timed
            )
            for cell in todo
        ]

    def tell(group: str, steps: int) -> None:
        if progress is not None:
            progress(group, before[group] + steps)

    paths = {
        name: store.finish(by_name[name], profile, wanted[name])
        for name, count in missing.items()
        if not count
    }
    for job, result in jobs.run(planned, workers=workers, progress=tell):
        (cell,) = job.key
        store.put(by_name[job.group], cell, result)
        missing[job.group] -= 1
        if not missing[job.group]:
            paths[job.group] = store.finish(by_name[job.group], profile, wanted[job.group])
    return [paths[name] for name in by_name]
