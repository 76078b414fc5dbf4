"""What the saved results say, as a page and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.experiments import NAMES, get
from steadynorm.evidence.lab.runs import Runs
from steadynorm.evidence.lab.store import read
from steadynorm.files import replace_file
from steadynorm.report.page import Page, Section, Table

HOLDS = {"yes": "seen", "no": "not seen", "open": "open"}


class SavedResults(NamedTuple):
    """A results file. `experiment` is None where this version of the lab has no such one."""

    head: Mapping[str, Any]
    runs: Runs
    experiment: Experiment | None

    @property
    def name(self) -> str:
        """The experiment's name."""
        return str(self.head["experiment"])

    def figures(self) -> Section:
        """Its tables and charts; none where the experiment has changed since."""
        current = self.experiment
        if current is None or current.revision != self.head["revision"]:
            return Section(
                self.name, ["Saved by another version of the lab: its figures are in the file."]
            )
        return current.figures(self.runs)


def saved(folder: str | Path) -> list[SavedResults]:
    """All results in `folder`, in the lab's order. Raises FileNotFoundError without any."""
    order = [name.replace("_", "-") for name in NAMES]
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        head, runs = read(path)
        name = head["experiment"]
        found.append(SavedResults(head, runs, get(name) if name in order else None))
    if not found:
        raise FileNotFoundError(
            f"report: {folder} must hold results; found none. "
            f"`steadynorm lab run --all` makes them."
        )
    return sorted(found, key=lambda one: (*order, one.name).index(one.name))


def page(results: Sequence[SavedResults]) -> Page:
    """All results on one page, the verdicts first."""
    data = sorted({one.head["data"] for one in results})
    profiles = sorted({one.head["profile"] for one in results})
    made = sorted({text for one in results for text in one.head["made_with"]})
    rows = [
        (title, outcome, main, seeds) for title, _, outcome, main, seeds in map(_verdict, results)
    ]
    verdicts = Table("Verdicts", ("experiment", "verdict", "main figure", "seeds"), rows)
    return Page(
        "The lab: what is claimed for batch normalization, tested",
        [Section("In short", tables=[verdicts]), *(section(one) for one in results)],
        lead=f"Small networks trained on real handwritten digits ({'; '.join(data)}). Each verdict "
        "follows from a rule that was written down before, by 95 % intervals over seeds.",
        details=[("profile", ", ".join(profiles)), ("made with", "; ".join(made))],
    )


def section(one: SavedResults) -> Section:
    """One experiment: claim, verdict, what it follows from, and what there is to see."""
    head, shown = one.head, one.figures()
    return Section.of(
        head["title"],
        f"Claim: {head['claim']} ({head['source']})",
        f"Verdict: {head['verdict']['outcome']}. {head['verdict']['sentence']}",
        f"Rule: {head['rule']}",
        f"Measured: {head['measure']}",
        findings(one), *shown.text, *shown.tables, *shown.charts,
    )  # fmt: skip


def findings(one: SavedResults) -> Table:
    """What the rule asks for, and what was found."""
    rows = [
        (
            found["words"], _number(found["value"]),
            "–" if found["seeds"] < 2 else f"{_number(found['low'])} to {_number(found['high'])}",
            found["expected"], HOLDS[found["holds"]], found["seeds"],
        )
        for found in one.head["verdict"]["findings"]
    ]  # fmt: skip
    columns = ("finding", "estimate", "95 % interval", "asked for", "answer", "seeds")
    return Table("What the verdict follows from", columns, rows)


def markdown(results: Sequence[SavedResults]) -> str:
    """The verdicts as a Markdown table."""
    rows = [
        (title, claim, f"**{outcome}**", main, seeds)
        for title, claim, outcome, main, seeds in map(_verdict, results)
    ]
    columns = ("experiment", "claim", "verdict", "main figure", "seeds")
    return Table("Verdicts", columns, rows).markdown() + "\n"


def write(folder: str | Path) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into `folder` from its `results`; returns their paths."""
    folder = Path(folder)
    results = saved(folder / "results")
    return (
        page(results).write(folder / "report.html"),
        replace_file(folder / "report.md", markdown(results)),
    )


def _verdict(one: SavedResults) -> tuple[str, str, str, str, int]:
    """Title, claim, outcome, main figure and seeds."""
    head, verdict = one.head, one.head["verdict"]
    found = verdict["findings"][0]
    span = f" ({_number(found['low'])} to {_number(found['high'])})" if found["seeds"] > 1 else ""
    main = f"{found['words']}: {_number(found['value'])}{span}"
    return head["title"], head["claim"], verdict["outcome"], main, verdict["seeds"]


def _number(value: float | None) -> str:
    """Three significant digits, without an exponent where one can do without.

    >>> [_number(value) for value in (1234.5, 999.7, 0.01234, 1.2e-7, None)]
    ['1,234', '1,000', '0.0123', '1.2e-07', '–']
    """
    if value is None:
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 999.5:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.2g}"
