"""What the commands share: errors in one line, plain output, progress bars."""

from __future__ import annotations

import codecs
import io
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import progress as bars
from rich.console import Console

from steadynorm._extras import lacking
from steadynorm.files import escaped, json_text

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder with MNIST's IDX files, instead of scikit-learn's digits."),
]

verbose = False
"""Whether `--verbose` was given."""


def escape_what_stdout_cannot_write() -> None:
    r"""On a terminal that cannot show 日, `\u65e5` stands in its place; else an error ends it all.

    As in JSON, also below 256, where Python's "backslashreplace" writes `\xe9`.
    """
    codecs.register_error("steadynorm", _as_json_escapes)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="steadynorm")


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)  # stdout only writes
    return "".join(map(escaped, error.object[error.start : error.end])), error.end


@contextmanager
def errors_in_one_line(command: str, interrupted: str = "nothing was written.") -> Iterator[None]:
    """Turns an error into one line without control characters, exit code 2.

    With `--verbose` the traceback comes before it. Ctrl-C ends with 130. A package that is missing
    passes through: the group of all commands says which extra brings it.
    """
    try:
        yield
    except Exception as error:  # a model, its data and its loss may raise anything
        if lacking(error):
            raise
        if verbose:
            traceback.print_exc()
        told = str(error)
        if not isinstance(error, ValueError | TypeError | RuntimeError | OSError):
            told = f"{type(error).__name__}: {told}".removesuffix(": ")  # KeyError says a key alone
        line = " ".join("".join(c if c.isprintable() else " " for c in told).split())
        typer.echo(f"steadynorm {command}: {line}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"steadynorm {command}: interrupted; {interrupted}", err=True)
        raise typer.Exit(130) from None


def show(result: Any, *, json: bool) -> None:
    """Print a result as its table, or as its JSON."""
    if json:
        echo_json(result.to_json())
    else:
        typer.echo(result)


def print_json(record: object) -> None:
    """Print a record as JSON, and nothing else."""
    echo_json(json_text(record))


def echo_json(text: str) -> None:
    """Print JSON; where stdout is not UTF-8, which JSON has to be, in ASCII."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if codecs.lookup(encoding).name != "utf-8":
        text = "".join(c if c.isascii() else escaped(c) for c in text)
    typer.echo(text, nl=False)


def say(text: str, *, stderr: bool = False) -> None:
    """Print `text` as it is, without markup, colours or wrapping."""
    Console(stderr=stderr).print(text, markup=False, highlight=False, soft_wrap=True)


class GroupBars(bars.Progress):
    """A progress bar for each group of jobs, on the terminal that errors go to, if it is one.
    `auto_refresh`: by a thread, or only when something is reported.
    """

    def __init__(self, *, auto_refresh: bool = True) -> None:
        console = Console(stderr=True)
        super().__init__(
            bars.TextColumn("{task.description}"), bars.BarColumn(),
            bars.TextColumn("{task.percentage:>3.0f} %"), bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(), console=console, transient=True,
            auto_refresh=auto_refresh, disable=not console.is_terminal,
        )  # fmt: skip
        self.groups: dict[str, bars.TaskID] = {}

    def begin(self, group: str, steps: int, done: int = 0, title: str = "") -> None:
        """Add a group of so many steps."""
        self.groups[group] = self.add_task(title or group, total=steps, completed=done)

    def reached(self, group: str, steps: int) -> None:
        """Steps done in a group so far."""
        self.update(self.groups[group], completed=steps)

    def step(self, group: str) -> None:
        """One more step of a group."""
        self.update(self.groups[group], advance=1, refresh=True)
