"""Run the attacks, print one table, and with `--write` put it into docs/promises.md."""

from __future__ import annotations

import argparse
import importlib
import logging
import pkgutil
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

from tests import attack

from steadynorm.evidence.workers import cores
from steadynorm.report.machine import processor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "promises.md"
BEGIN, END = "<!-- table of the standing attack -->", "<!-- end of the table -->"
SHOWN = 5  # broken trials of an attack that are described

Trial = tuple[str, Callable[[], object]]


class Result(NamedTuple):
    """How an attack ended; `broke` describes every trial that broke a promise."""

    title: str
    tried: int
    broke: list[str]
    seconds: float


def attacks() -> list[str]:
    """The names of the attacks: the modules of this folder, but for those with an underscore."""
    found = (module.name for module in pkgutil.iter_modules(attack.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def carry_out(name: str, seed: int, *, long: bool) -> Result:
    """One attack. What a trial raises is what it found; only an interruption goes through."""
    module = importlib.import_module(f"tests.attack.{name}")
    start, tried, broke = time.perf_counter(), 0, []
    trials: Iterator[Trial] = module.cases(random.Random(f"{seed} {name}"), long)
    for title, trial in trials:
        tried += 1
        try:
            trial()
        except Exception as error:  # noqa: BLE001
            first = (str(error).splitlines() or [""])[0]
            broke.append(f"{title}: {type(error).__name__}: {first}")
    return Result(module.TITLE, tried, broke, time.perf_counter() - start)


def table(results: list[Result], seed: int, *, long: bool) -> str:
    """As Markdown, which reads well in a terminal, too."""
    import torch

    rows = [("attack", "tried", "held", "broke")]
    rows += [
        (r.title, f"{r.tried:,}", f"{r.tried - len(r.broke):,}", f"{len(r.broke):,}")
        for r in results
    ]
    width = max(len(row[0]) for row in rows)
    lines = [
        f"| {row[0]:<{width}} | " + " | ".join(f"{v:>6}" for v in row[1:]) + " |" for row in rows
    ]
    lines.insert(1, f"|{'-' * (width + 2)}|" + "-------:|" * 3)
    form = "long" if long else "short"
    where = f"{platform.system()} {platform.machine()}, {processor()}, {cores()} cores"
    about = f"The {form} form, seed {seed}, {date.today()}, torch {torch.__version__}, {where}."
    return "\n".join([*lines, "", about])


def write(text: str) -> None:
    """Put the table into the page, in place of the last one."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="what the random trials start from")
    parser.add_argument("--long", action="store_true", help="minutes of trials, not seconds")
    parser.add_argument("--write", action="store_true", help="put the table into docs/promises.md")
    parser.add_argument("only", nargs="*", metavar="attack", help=", ".join(attacks()))
    chosen = parser.parse_args()
    if unknown := set(chosen.only) - set(attacks()):
        parser.error(f"no attack is named {', '.join(sorted(unknown))}")
    logging.disable()  # what is refused is said so a thousand times here
    results = []
    for name in chosen.only or attacks():
        result = carry_out(name, chosen.seed, long=chosen.long)
        results.append(result)
        for line in result.broke[:SHOWN]:
            print(f"{name}: {line}", file=sys.stderr)
        if len(result.broke) > SHOWN:
            print(f"{name}: and {len(result.broke) - SHOWN} more", file=sys.stderr)
        print(f"{name}: {result.seconds:.0f} s", file=sys.stderr, flush=True)
    text = table(results, chosen.seed, long=chosen.long)
    print(text)
    if chosen.write:
        write(text)
    return 1 if any(result.broke for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
