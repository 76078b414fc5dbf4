"""The command `steadynorm tour`. Heavy imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console


def tour(
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path(
        "tour"
    ),
    seed: Annotated[int, typer.Option(min=0, help="First of the seeds.")] = 0,
    short: Annotated[bool, typer.Option("--short", help="Under half a minute.")] = False,
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045  typer reads it at run time
        typer.Option(help="Folder with MNIST's IDX files, instead of scikit-learn's digits."),
    ] = None,
    framework: Annotated[
        str, typer.Option(help="torch for the whole tour; keras or jax for a stop in that.")
    ] = "torch",
) -> None:
    """Train small networks on real handwritten digits and see what normalizes them."""
    errors = Console(stderr=True)
    needed = {"altair": "altair", "vl_convert": "vl-convert-python"}
    if framework not in ("torch", "keras", "jax"):
        errors.print(
            f"steadynorm tour: --framework must be torch, keras or jax; got {framework}",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(2)
    extra = {"torch": "lab", "keras": "lab,keras", "jax": "lab,jax"}[framework]
    needed |= {"torch": {}, "keras": {"keras": "keras"}, "jax": {"jax": "jax", "flax": "flax"}}[
        framework
    ]
    if data_dir is None:
        needed["sklearn"] = "scikit-learn"
    missing = [package for module, package in needed.items() if find_spec(module) is None]
    if missing:
        errors.print(
            f'steadynorm tour needs {", ".join(missing)}: pip install "steadynorm[{extra}]"',
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        raise typer.Exit(2)
    try:
        _visit(out, seed, short, data_dir, framework)
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
        errors.print(f"steadynorm tour: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("steadynorm tour: interrupted; nothing was written.", highlight=False)
        raise typer.Exit(130) from None


def _visit(out: Path, seed: int, short: bool, data_dir: Path | None, framework: str) -> None:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from steadynorm.evidence.lab.data import load
    from steadynorm.evidence.tour.stop import Setting, Stop
    from steadynorm.evidence.tour.stops import STOPS
    from steadynorm.evidence.tour.stops.frameworks import InFramework
    from steadynorm.evidence.tour.tour import run
    from steadynorm.report.terminal import to_rich

    console = Console()
    seeds = (seed,) if short else (seed, seed + 1, seed + 2)
    setting = Setting(None if data_dir is None else str(data_dir), seeds, short)
    load(setting.data_dir)  # what is wrong with the files is said before anything is drawn
    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
    with bars:
        tasks = {}

        def begin(stop: Stop, steps: int) -> None:
            tasks[stop.name] = bars.add_task(stop.title, total=steps)

        def progress(group: str, steps: int) -> None:
            bars.update(tasks[group], completed=steps)

        stops = STOPS if framework == "torch" else (InFramework(framework),)
        visited = run(stops, setting, begin=begin, progress=progress)
    console.print(f"Digits: {visited.data}\n", markup=False, highlight=False)
    for _, result in visited.results:
        for table in result.tables:
            console.print(to_rich(table))
        console.print(f"{result.sentence}\n", markup=False, highlight=False)
    page, record = visited.write(out)
    console.print(f"Charts: {page}\nFigures: {record}", markup=False, highlight=False)
