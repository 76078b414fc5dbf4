"""The commands `steadynorm lab ...`. Heavy imports stay inside: `--help` answers at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from steadynorm._extras import require
from steadynorm.command import DataDir, GroupBars, Json, errors_in_one_line, print_json, say

lab = typer.Typer(
    help="Small experiments on real digits: what is claimed for batch normalization, tested.",
    no_args_is_help=True,
)
NAMED = ("lab", "finished runs are kept, run it again to go on.")
Out = Annotated[Path, typer.Option(help="Folder for finished runs, results and report.")]


class ProfileOption(str, Enum):
    """How thorough."""

    quick = "quick"
    full = "full"


@lab.command("list")
def list_experiments(json: Json = False) -> None:
    """Name the experiments and the claims they test."""
    from rich.table import Table
    from rich.text import Text

    with errors_in_one_line(*NAMED):
        require("torch", "altair")
        from steadynorm.evidence.lab.experiments import every

        columns = ("name", "claim", "source")
        rows = [[getattr(experiment, column) for column in columns] for experiment in every()]
        if json:
            print_json([dict(zip(columns, row, strict=True)) for row in rows])
            return
        table = Table(*columns)
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)


@lab.command()
def run(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All experiments.")] = False,
    profile: Annotated[ProfileOption, typer.Option(help="How thorough.")] = ProfileOption.quick,
    data_dir: DataDir = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many, by default what an experiment declares.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, by default one for each core.")
    ] = None,
    out: Out = Path("lab"),
    json: Json = False,
) -> None:
    """Run experiments and write their results and the report.

    What has finished before is not repeated: run it again after an interruption. Under `torchrun`
    every training is data-parallel.
    """
    with errors_in_one_line(*NAMED):
        require("torch", "altair", "vl_convert", *(() if data_dir else ("sklearn",)))
        from steadynorm.evidence import data_parallel
        from steadynorm.evidence.lab import runner
        from steadynorm.evidence.lab.experiments import every, get

        if bool(names) is everything:
            raise ValueError("name the experiments, or say --all; `steadynorm lab list` names them")
        chosen = every() if everything else [get(name) for name in dict.fromkeys(names or ())]
        folder = None if data_dir is None else str(data_dir)
        kind: Literal["quick", "full"] = "full" if profile is ProfileOption.full else "quick"
        if not data_parallel.launched():
            with GroupBars() as bars:
                paths = runner.run(
                    chosen, profile=kind, seeds=seeds, data_dir=folder, out=out, workers=workers,
                    begin=bars.begin, progress=bars.reached,
                )  # fmt: skip
            _show(paths, out, json)
            return
        timed = [experiment.name for experiment in chosen if experiment.timed]
        if everything and timed:
            say(f"left out under torchrun, since timed: {', '.join(timed)}", stderr=True)
            chosen = [experiment for experiment in chosen if not experiment.timed]
        paths = runner.run_together(
            chosen, profile=kind, seeds=seeds, data_dir=folder, out=out,
            progress=lambda experiment, run: say(
                f"{experiment.name} {run.setting} {run.seed}", stderr=True
            ),
        )  # fmt: skip
        if paths:
            _show(paths, out, json)


@lab.command()
def report(out: Out = Path("lab"), json: Json = False) -> None:
    """Write report.html and report.md from the saved results."""
    with errors_in_one_line(*NAMED):
        require("torch", "altair", "vl_convert")
        from steadynorm.evidence.lab.report import write

        page, table = write(out)
        if json:
            print_json({"report": str(page), "table": str(table)})
            return
        say(f"{page}\n{table}")


def _show(paths: list[Path], out: Path, json: bool) -> None:
    from steadynorm.evidence.lab.report import write
    from steadynorm.evidence.lab.store import read

    heads = [read(path)[0] for path in paths]
    page, table = write(out)
    if json:
        files = {"report": str(page), "table": str(table)}
        results = [head | {"file": str(p)} for head, p in zip(heads, paths, strict=True)]
        print_json({"experiments": results, **files})
        return
    for head in heads:
        verdict = head["verdict"]
        say(f"{head['title']}: {verdict['outcome']}. {verdict['sentence']}\n")
    say(f"Report: {page}\nTable: {table}")
