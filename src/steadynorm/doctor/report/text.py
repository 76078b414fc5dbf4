"""The report in the terminal: what is wrong first, and a line of code to copy.

Written once, as lines of styled parts; rich colours them where it is installed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from steadynorm.doctor.finding import Severity
from steadynorm.doctor.report import groups
from steadynorm.doctor.report.groups import Reported, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
NAMED = 6  # layers named in full before "and 12 more"
WIDTH = 100
INDENT = 2


class Line(NamedTuple):
    """Parts of text, each with its style ("" for none). Code is never wrapped."""

    parts: tuple[tuple[str, str], ...] = ()
    indented: bool = False
    code: bool = False

    @property
    def text(self) -> str:
        """Without styles."""
        return "".join(text for text, _ in self.parts)


def to_text(report: Reported) -> str:
    """The report without colours, 100 characters wide."""
    shown = []
    for line in _lines(report):
        if line.code or not line.text:
            shown.append(line.text)
        else:
            margin = " " * INDENT * line.indented
            shown += textwrap.wrap(
                line.text, WIDTH, initial_indent=margin, subsequent_indent=margin,
                break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(line.rstrip() for line in shown)


def to_rich(report: Reported) -> RenderableType:
    """The report as rich prints it. All of it is text, never markup. What is longer than the
    console is wide is wrapped; `show` leaves lines of code whole.
    """
    from rich.console import Group

    return Group(*(_rich(line) for line in _lines(report)))


def show(report: Reported, console: Console) -> None:
    """Print the report, each line of code on a line of its own, however long, to be copied."""
    for line in _lines(report):
        console.print(_rich(line), soft_wrap=line.code)


def _rich(line: Line) -> RenderableType:
    from rich.console import ConsoleOptions, RenderResult
    from rich.text import Text

    text = Text.assemble(*line.parts)

    class Indented:
        """Wrapped text, indented; rich's own padding fills lines up with spaces."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for wrapped in text.wrap(console, max(options.max_width - INDENT, 10)):
                wrapped.rstrip()
                yield Text.assemble(" " * INDENT, wrapped)

    return Indented() if line.indented else text


def _lines(report: Reported) -> Iterator[Line]:
    found = groups.grouped(report.findings)
    style = STYLES[found[0].first.severity] if found else "bold green"
    if not report.evidence.layers:
        style = "bold yellow"
    target = printable(report.evidence.target)
    yield Line(((target, "bold"), (": ", ""), (groups.verdict(report), style)))
    yield Line(((groups.looked_at(report), "dim"),))
    for group in found:
        yield Line()
        yield from _group(group)
    remarks = [*map(printable, report.evidence.remarks), *groups.unasked(report)]
    if found:
        remarks.append(f"Why: steadynorm doctor --explain {found[0].first.code}")
    if remarks:
        yield Line()
        yield from (Line(((remark, "dim"),)) for remark in remarks)


def _group(group: groups.Group) -> Iterator[Line]:
    finding = group.first
    severity = (str(finding.severity), STYLES[finding.severity])
    follows = f"  follows from {', '.join(group.because)}" if group.because else ""
    yield Line((severity, (f" {finding.code} ", ""), (group.title, "bold"), (follows, "dim")))
    if group.layers:
        others = len(group.layers) - NAMED
        named = (", ".join(map(printable, group.layers[:NAMED])), "cyan")
        yield Line((named, (f" and {others} more" if others > 0 else "", "")), indented=True)
    yield Line(((printable(finding.message), ""),), indented=True)
    figures = " · ".join(f"{name} {value}" for name, value in groups.facts(finding))
    if figures:
        yield Line(((printable(figures), "dim"),), indented=True)
    if finding.cure:
        cure = ("cure  ", "bold green")
        yield Line((cure, (printable(finding.cure), "")), indented=True)
    for line in finding.line.splitlines():
        yield Line(((f"        {printable(line)}", "green"),), code=True)
