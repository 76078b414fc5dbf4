"""What the commands tour, lab and bench share: needed packages, one-line errors, progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import typer
from rich import progress as bars
from rich.console import Console

# module: (package, the extra that brings it)
EXTRAS = {
    "torch": ("torch", "torch"),
    "numba": ("numba", "torch"),
    "altair": ("altair", "lab"),
    "vl_convert": ("vl-convert-python", "lab"),
    "sklearn": ("scikit-learn", "lab"),
    "keras": ("keras", "keras"),
    "jax": ("jax", "jax"),
    "flax": ("flax", "jax"),
}


def need(*modules: str) -> None:
    """Raise ValueError naming the packages that are missing and the extras that bring them."""
    missing = [EXTRAS[module] for module in modules if find_spec(module) is None]
    if missing:
        packages = ", ".join(package for package, _ in missing)
        extras = ",".join(dict.fromkeys(extra for _, extra in missing))
        raise ValueError(f'needs {packages}: pip install "steadynorm[{extras}]"')


@contextmanager
def one_line_errors(command: str, interrupted: str) -> Iterator[None]:
    """End what the user can correct with one line and exit code 2, Ctrl-C with 130."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError) as error:
        say(f"{command}: {error}", stderr=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say(f"{command}: interrupted; {interrupted}", stderr=True)
        raise typer.Exit(130) from None


def say(text: str, *, stderr: bool = False) -> None:
    """Print `text` as it is, without markup, colours or wrapping."""
    Console(stderr=stderr).print(text, markup=False, highlight=False, soft_wrap=True)


class GroupBars(bars.Progress):
    """A progress bar for each group of jobs. `stderr`: where they are drawn. `auto_refresh`: by a
    thread, or only when something is reported.
    """

    def __init__(self, *, stderr: bool = False, auto_refresh: bool = True) -> None:
        super().__init__(
            bars.TextColumn("{task.description}"), bars.BarColumn(),
            bars.TextColumn("{task.percentage:>3.0f} %"), bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(), console=Console(stderr=stderr), transient=True,
            auto_refresh=auto_refresh,
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
