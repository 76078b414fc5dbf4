"""The command `steadynorm tour`. Heavy imports stay inside, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steadynorm._extras import require
from steadynorm.command import DataDir, GroupBars, Json, errors_in_one_line, print_json, say
from steadynorm.files import check_writable

NEEDED = {"torch": ("torch",), "keras": ("torch", "keras"), "jax": ("torch", "jax", "flax")}


def tour(
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path(
        "tour"
    ),
    seed: Annotated[int, typer.Option(min=0, help="First of the seeds.")] = 0,
    short: Annotated[bool, typer.Option("--short", help="Under half a minute.")] = False,
    data_dir: DataDir = None,
    framework: Annotated[
        str, typer.Option(help="torch for the whole tour; keras or jax for one part in that.")
    ] = "torch",
    json: Json = False,
) -> None:
    """Train small networks on real handwritten digits and see what normalizes them."""
    with errors_in_one_line("tour"):
        if framework not in NEEDED:
            raise ValueError(f"--framework must be torch, keras or jax; got {framework}")
        require("altair", "vl_convert", *NEEDED[framework], *(() if data_dir else ("sklearn",)))
        from steadynorm.evidence.digits import load
        from steadynorm.evidence.tour.demo import TourOptions
        from steadynorm.evidence.tour.demos import DEMOS, frameworks
        from steadynorm.evidence.tour.visit import run
        from steadynorm.report.terminal import to_rich

        seeds = (seed,) if short else (seed, seed + 1, seed + 2)
        options = TourOptions(None if data_dir is None else str(data_dir), seeds, short)
        check_writable(out / "report.html")
        load(options.data_dir)  # broken files are reported before any bar is drawn
        with GroupBars() as bars:
            visited = run(
                DEMOS if framework == "torch" else (frameworks.demo(framework),), options,
                begin=lambda demo, steps: bars.begin(demo.name, steps, title=demo.title),
                progress=bars.reached,
            )  # fmt: skip
        page, record = visited.write(out)
        if json:
            print_json(visited.record())
            return
        say(f"Digits: {visited.data}\n")
        for _, shown in visited.results:
            for table in shown.tables:
                Console().print(to_rich(table))
            say(f"{shown.sentence}\n")
        say(f"Charts: {page}\nFigures: {record}")
