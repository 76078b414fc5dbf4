"""The commands `steadynorm lab ...`. Heavy imports stay inside: `--help` answers at once."""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Optional

import typer
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from steadynorm.evidence.lab.experiment import Experiment
    from steadynorm.evidence.lab.jobs import Progress
    from steadynorm.evidence.lab.runner import Begin

lab = typer.Typer(
    help="Small experiments on real digits: what is claimed for batch normalization, tested.",
    no_args_is_help=True,
)
_errors = Console(stderr=True)
Out = Annotated[Path, typer.Option(help="Folder for finished runs, results and report.")]


class Profile(str, Enum):
    """How thorough."""

    quick = "quick"
    full = "full"


@lab.command("list")
def list_experiments() -> None:
    """Name the experiments and the claims they test."""
    from rich.table import Table
    from rich.text import Text

    with _said():
        _need({"altair": "altair"})
        from steadynorm.evidence.lab.experiments import every

        table = Table("name", "claim", "source")
        for experiment in every():
            row = (experiment.name, experiment.claim, experiment.source)
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)


@lab.command()
def run(
    names: Annotated[Optional[list[str]], typer.Argument(metavar="NAME...")] = None,  # noqa: UP045
    everything: Annotated[bool, typer.Option("--all", help="All experiments.")] = False,
    profile: Annotated[Profile, typer.Option(help="How thorough.")] = Profile.quick,
    data_dir: Annotated[
        Optional[Path],  # noqa: UP045  typer reads it at run time
        typer.Option(help="Folder with MNIST's IDX files, instead of scikit-learn's digits."),
    ] = None,
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="How many, by default what an experiment declares."),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Processes, by default one for each core."),
    ] = None,
    out: Out = Path("lab"),
) -> None:
    """Run experiments and write their results and the report.

    What has finished before is not repeated: run it again after an interruption. Under `torchrun`
    every training is data-parallel.
    """
    with _said():
        needed = {"altair": "altair", "vl_convert": "vl-convert-python"}
        _need(needed if data_dir else needed | {"sklearn": "scikit-learn"})
        from steadynorm.evidence.lab import replicas, runner
        from steadynorm.evidence.lab.experiments import every, get

        if bool(names) is everything:
            raise ValueError("name the experiments, or say --all; `steadynorm lab list` names them")
        chosen = every() if everything else [get(name) for name in dict.fromkeys(names or ())]
        folder = None if data_dir is None else str(data_dir)
        kind: Literal["quick", "full"] = "full" if profile is Profile.full else "quick"
        if not replicas.launched():
            with _bars() as (begin, progress):
                paths = runner.run(
                    chosen, profile=kind, seeds=seeds, data_dir=folder, out=out, workers=workers,
                    begin=begin, progress=progress,
                )  # fmt: skip
            _tell(paths, out)
            return
        timed = [experiment.name for experiment in chosen if experiment.timed]
        if everything and timed:
            _errors.print(f"left out under torchrun, since timed: {', '.join(timed)}")
            chosen = [experiment for experiment in chosen if not experiment.timed]
        paths = runner.run_together(
            chosen, profile=kind, seeds=seeds, data_dir=folder, out=out,
            progress=lambda experiment, cell: print(experiment.name, dict(cell.setting), cell.seed),  # noqa: T201
        )  # fmt: skip
        if paths:
            _tell(paths, out)


@lab.command()
def report(out: Out = Path("lab")) -> None:
    """Write report.html and report.md from the saved results."""
    with _said():
        _need({"altair": "altair", "vl_convert": "vl-convert-python"})
        from steadynorm.evidence.lab.report import write

        for path in write(out):
            _plain(str(path))


def _tell(paths: list[Path], out: Path) -> None:
    from steadynorm.evidence.lab.report import write
    from steadynorm.evidence.lab.store import read

    for path in paths:
        head, _ = read(path)
        verdict = head["verdict"]
        _plain(f"{head['title']}: {verdict['outcome']}. {verdict['sentence']}\n")
    page, table = write(out)
    _plain(f"Report: {page}\nTable: {table}")


def _plain(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[tuple[Begin, Progress]]:
    from rich import progress as rich

    bars = rich.Progress(
        rich.TextColumn("{task.description}"), rich.BarColumn(),
        rich.TextColumn("{task.percentage:>3.0f} %"), rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    )  # fmt: skip
    with bars:
        tasks = {}

        def begin(experiment: Experiment, steps: int, done: int) -> None:
            tasks[experiment.name] = bars.add_task(experiment.name, total=steps, completed=done)

        def progress(group: str, steps: int) -> None:
            bars.update(tasks[group], completed=steps)

        yield begin, progress


def _need(packages: dict[str, str]) -> None:
    missing = [package for module, package in packages.items() if find_spec(module) is None]
    if missing:
        raise ValueError(f'needs {", ".join(missing)}: pip install "steadynorm[lab]"')


@contextmanager
def _said() -> Iterator[None]:
    """What the user can mend is said in a line; an interruption keeps what has finished."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
        _errors.print(f"steadynorm lab: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _errors.print(
            "steadynorm lab: interrupted; finished runs are kept, run it again to go on.",
            highlight=False,
        )
        raise typer.Exit(130) from None
