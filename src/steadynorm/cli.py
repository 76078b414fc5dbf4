"""The command line: `steadynorm COMMAND`.

Every tool keeps its command in `steadynorm/<tool>/_cli.py`, a module that imports typer and rich
at the top and everything else inside the command, and is named here by one line.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steadynorm import __version__, command
from steadynorm._extras import lacking
from steadynorm.doctor._cli import doctor
from steadynorm.evidence.bench._cli import bench, warmup
from steadynorm.evidence.lab._cli import lab
from steadynorm.evidence.tour._cli import tour
from steadynorm.models._cli import calibrate, convert, convert_weights, fold

VERBOSE = "--verbose"


class Commands(TyperGroup):
    """A command whose optional package is missing ends with one line and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--verbose` may stand anywhere."""
        others = [argument for argument in args if argument != VERBOSE]
        return super().parse_args(ctx, [VERBOSE, *others] if VERBOSE in args else others)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            cure = lacking(error)
            if cure is None:
                raise
            typer.echo(f"steadynorm {ctx.invoked_subcommand}: {cure}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="steadynorm",
    cls=Commands,
    help="Batch normalization that stays steady.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option(VERBOSE, help="Where something fails, show the traceback too.")
    ] = False,
) -> None:
    """Batch normalization that stays steady."""
    command.verbose = verbose
    command.escape_what_stdout_cannot_write()


app.command()(tour)
app.command()(doctor)
app.command()(convert)
app.command()(fold)
app.command()(calibrate)
app.command()(convert_weights)
app.add_typer(lab, name="lab")
app.command()(bench)
app.command()(warmup)

if __name__ == "__main__":
    app()
