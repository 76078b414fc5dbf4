"""The report in the terminal: what is wrong first, and a line of code to copy."""

from __future__ import annotations

from collections.abc import Iterator
from io import StringIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from steadynorm.doctor.finding import Severity
from steadynorm.doctor.report import groups
from steadynorm.doctor.report.groups import Reported, printable

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
NAMED = 6  # layers named in full before "and 12 more"
WIDTH = 100


def to_rich(report: Reported) -> RenderableType:
    """The report as rich prints it. All of it is text, never markup. What is longer than the
    console is wide is wrapped; `show` leaves lines of code whole.
    """
    return Group(*_parts(report))


def show(report: Reported, console: Console) -> None:
    """Print the report, each line of code on a line of its own, however long, to be copied."""
    for part in _parts(report):
        console.print(part, soft_wrap=isinstance(part, Code))


def to_text(report: Reported) -> str:
    """The same without colours, 100 characters wide."""
    stream = StringIO()
    show(report, Console(file=stream, width=WIDTH, color_system=None, highlight=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


class Code(Text):
    """A line to copy."""


class Indented:
    """Wrapped text, two columns in; rich's own padding fills lines up with spaces."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.text.wrap(console, max(options.max_width - 2, 10)):
            line.rstrip()
            yield Text.assemble("  ", line)


def _parts(report: Reported) -> Iterator[RenderableType]:
    found = groups.grouped(report.findings)
    style = STYLES[found[0].first.severity] if found else "bold green"
    if not report.evidence.layers:
        style = "bold yellow"
    yield Text.assemble(
        (printable(report.evidence.target), "bold"), ": ", (groups.verdict(report), style)
    )
    yield Text(groups.looked_at(report), "dim")
    for group in found:
        yield Text()
        yield from _group(group)
    remarks = [*map(printable, report.evidence.remarks), *groups.unasked(report)]
    if found:
        remarks.append(f"Why: steadynorm doctor --explain {found[0].first.code}")
    if remarks:
        yield Text()
        yield from (Text(remark, "dim") for remark in remarks)


def _group(group: groups.Group) -> Iterator[RenderableType]:
    finding = group.first
    title = Text.assemble(
        (str(finding.severity), STYLES[finding.severity]),
        f" {finding.code} ",
        (group.title, "bold"),
    )
    if group.because:
        title.append(f"  follows from {', '.join(group.because)}", "dim")
    yield title
    body: list[Text] = []
    if group.layers:
        places = Text(", ".join(map(printable, group.layers[:NAMED])), "cyan")
        if len(group.layers) > NAMED:
            places.append(f" and {len(group.layers) - NAMED} more", "default")
        body.append(places)
    body.append(Text(printable(finding.message)))
    figures = groups.facts(finding)
    if figures:
        body.append(Text(printable(" · ".join(f"{k} {v}" for k, v in figures)), "dim"))
    if finding.cure:
        body.append(Text.assemble(("cure  ", "bold green"), printable(finding.cure)))
    yield from map(Indented, body)
    yield from (Code(f"        {printable(line)}", "green") for line in finding.line.splitlines())
