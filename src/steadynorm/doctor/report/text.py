"""The report in the terminal: what is wrong first, and a line of code to copy."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from steadynorm.doctor.finding import Severity
from steadynorm.doctor.report import groups
from steadynorm.doctor.report.groups import Reported, printable

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
NAMED = 6  # layers named in full before "and 12 more"
WIDTH = 100


def to_rich(report: Reported) -> RenderableType:
    """The report as rich prints it. All of it is text, never markup."""
    found = groups.grouped(report.findings)
    style = STYLES[found[0].first.severity] if found else "bold green"
    if not report.evidence.layers:
        style = "bold yellow"
    head = Text.assemble(
        (printable(report.evidence.target), "bold"), ": ", (groups.verdict(report), style)
    )
    parts: list[RenderableType] = [head, Text(groups.looked_at(report), "dim")]
    for group in found:
        parts += [Text(), *_group(group)]
    remarks = [*map(printable, report.evidence.remarks), *groups.unasked(report)]
    if found:
        remarks.append(f"Why: steadynorm doctor --explain {found[0].first.code}")
    if remarks:
        parts += [Text(), *(Text(remark, "dim") for remark in remarks)]
    return Group(*parts)


def _group(group: groups.Group) -> list[RenderableType]:
    finding = group.first
    title = Text.assemble(
        (str(finding.severity), STYLES[finding.severity]),
        f" {finding.code} ",
        (group.title, "bold"),
    )
    if group.because:
        title.append(f"  follows from {', '.join(group.because)}", "dim")
    body: list[RenderableType] = []
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
    # Each on a line of its own, however long, so that it can be copied whole.
    lines = [
        Text(printable(line), "green", no_wrap=True, overflow="ignore")
        for line in finding.line.splitlines()
    ]
    return [
        title,
        Padding(Group(*body), (0, 0, 0, 2)),
        *(Padding(line, (0, 0, 0, 8), expand=False) for line in lines),
    ]


def to_text(report: Reported) -> str:
    """The same without colours, 100 characters wide."""
    stream = StringIO()
    console = Console(file=stream, width=WIDTH, no_color=True, highlight=False, soft_wrap=False)
    console.print(to_rich(report))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
