"""Steady against Batch at small batches on real digits, and a sweep of its prior and horizon.

    python benchmarks/steady_sweep.py claim                       scikit-learn's digits
    python benchmarks/steady_sweep.py sweep --data-dir FOLDER     MNIST's IDX files

The tour's fully connected network and recipe. Prints Markdown tables: error of inference on the
test digits in per cent, mean over seeds with Student's 95 % interval.
"""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer

from steadynorm.evidence import workers as processes
from steadynorm.evidence.digits import load
from steadynorm.evidence.estimates import mean
from steadynorm.evidence.networks import renorm_for
from steadynorm.evidence.training import Recipe, TrainingSetup, execute
from steadynorm.report.machine import processor
from steadynorm.statistics import Batch, Policy, Running, Steady

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DataDir = Annotated[Optional[Path], typer.Option(help="MNIST's IDX files.")]  # noqa: UP045
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds, from 0.")]
Samples = Annotated[int, typer.Option(min=64, help="Digits seen in a run.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]


def measure(
    setups: dict[str, TrainingSetup], data_dir: Path | None, seeds: int, workers: int
) -> dict[str, str]:
    """Error of every setup over the seeds, where it can train."""
    folder = None if data_dir is None else str(data_dir)
    planned = [
        processes.Job("sweep", (name, seed), setup.recipe.steps, execute, (setup, folder, seed))
        for name, setup in setups.items()
        for seed in range(seeds)
    ]
    runs = {job.key: run for job, run in processes.run(planned, workers=workers)}
    found: dict[str, str] = {}
    for name in setups:
        mine = [runs[name, seed] for seed in range(seeds)]
        stopped = [run.stopped for run in mine if run.stopped]
        found[name] = "cannot train" if stopped else mean(r.error for r in mine).plus_minus
    return found


def heading(command: str, data_dir: Path | None, seeds: int, samples: int) -> None:
    """What was measured, where and when."""
    today = datetime.now(timezone.utc).date()
    print(f"`{command}`: {load(None if data_dir is None else str(data_dir))}; {samples:,} digits")
    print(f"seen in a run, {seeds} seeds; {today}, {processor()}, torch {torch.__version__},")
    print(f"Python {platform.python_version()}.\n")


@app.command()
def claim(
    data_dir: DataDir = None,
    seeds: Seeds = 5,
    samples: Samples = 6_000,
    workers: Workers = 2,
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes.")] = [1, 2, 4, 8, 64],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="Policies, by the table's names.")] = [],  # noqa: B006
) -> None:
    """Every policy at several batch sizes."""
    setups = {}
    for size in batch:
        recipe = Recipe(size, samples)
        # 640 samples in batches: what Steady's horizon is in the momentum of the others.
        momentum = size / (size + 576)
        arms: tuple[tuple[str, Policy | None, float], ...] = (
            ("none", None, 0.1),
            ("Batch", Batch(), 0.1),
            ("Batch, horizon in samples", Batch(), momentum),
            ("Renorm", renorm_for(recipe.steps), 0.1),
            ("Renorm, horizon in samples", renorm_for(recipe.steps), momentum),
            ("Running", Running(), 0.1),
            ("Running, horizon in samples", Running(), momentum),
            ("Steady", Steady(), 0.1),
        )
        setups |= {
            f"{name}|{size}": TrainingSetup("fully connected", policy, recipe, momentum=own)
            for name, policy, own in arms
            if not only or name in only
        }
    found = measure(setups, data_dir, seeds, workers)
    heading("claim", data_dir, seeds, samples)
    print("| policy | " + " | ".join(f"batch {size}" for size in batch) + " |")
    print("|---" * (len(batch) + 1) + "|")
    for name in dict.fromkeys(key.partition("|")[0] for key in setups):
        cells = [found[f"{name}|{size}"] for size in batch]
        print(f"| {name} | " + " | ".join(cells) + " |")


@app.command()
def sweep(
    data_dir: DataDir = None,
    seeds: Seeds = 5,
    samples: Samples = 6_000,
    workers: Workers = 2,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 2,
    prior: Annotated[list[float], typer.Option(min=0, help="Priors.")] = [0.5, 1, 2, 4, 8],  # noqa: B006
    horizon: Annotated[list[int], typer.Option(min=0, help="Horizons in samples.")] = [  # noqa: B006
        160,
        320,
        640,
        1280,
        2560,
    ],
) -> None:
    """Steady at one batch size for every prior and horizon."""
    recipe = Recipe(batch, samples)
    setups = {
        f"{p}|{h}": TrainingSetup("fully connected", Steady(p, h), recipe)
        for p, h in product(prior, horizon)
    }
    found = measure(setups, data_dir, seeds, workers)
    heading(f"sweep --batch {batch}", data_dir, seeds, samples)
    print("| prior | " + " | ".join(f"horizon {h}" for h in horizon) + " |")
    print("|---" * (len(horizon) + 1) + "|")
    for p in prior:
        print(f"| {p:g} | " + " | ".join(found[f"{p}|{h}"] for h in horizon) + " |")


if __name__ == "__main__":
    app()
