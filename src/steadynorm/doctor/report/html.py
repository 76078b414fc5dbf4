"""The report as a page: what is wrong first, then charts and figures of every layer."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Literal

import numpy as np

from steadynorm import __version__
from steadynorm.doctor.evidence.records import LossByMode
from steadynorm.doctor.finding import Severity
from steadynorm.doctor.report import groups
from steadynorm.doctor.report.groups import Reported, named, printable, printable_lines
from steadynorm.doctor.report.run import run_sections
from steadynorm.doctor.rules import find_rule
from steadynorm.report.page import Card, Chart, Page, Section, Table

LEVELS: dict[Severity, Literal["error", "warning", "info"]] = {
    Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "info"
}  # fmt: skip
NAMED = 8  # layers named on a card before "and 12 more"


def page(report: Reported) -> Page:
    """The report as a page; without charts where altair or vl-convert-python is missing."""
    evidence = report.evidence
    remarks = [*map(printable, evidence.remarks), *groups.unasked(report)]
    draw = all(find_spec(module) is not None for module in ("altair", "vl_convert"))
    if not draw:
        remarks.append('Charts need altair and vl-convert-python: pip install "steadynorm[lab]".')
    sections = [
        what_is_wrong(report),
        *(run_sections(evidence.run, draw=draw) if evidence.run is not None else []),
        *_layers(report, draw),
        *([Section("What was not looked at", remarks)] if remarks else []),
    ]
    return Page(
        f"The doctor on {printable(evidence.target)}",
        sections,
        lead=f"{groups.verdict(report).capitalize()}: {groups.looked_at(report)}.",
        details=[
            ("target", printable(evidence.target)),
            ("date", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
            ("rules", ", ".join(report.codes)),
            ("version", f"steadynorm {__version__}"),
        ],
    )


def what_is_wrong(report: Reported) -> Section:
    """A card for each defect, worst first, or one that says that all is well."""
    cards = [_card(group) for group in groups.grouped(report.findings)]
    if cards:
        return Section("What is wrong", cards=cards, filtered="findings")
    if not report.evidence.layers:
        text = "This target has no batch norm that the doctor knows."
        return Section("What is wrong", cards=[Card("No batch norm found", "info", "Empty",
                                                    text=[text])])  # fmt: skip
    text = f"{groups.looked_at(report).capitalize()}."
    return Section("What is wrong", cards=[Card("Nothing found", "good", "Sound", text=[text])])


def _card(group: groups.Group) -> Card:
    finding = group.first
    rule = find_rule(finding.code)
    layers = [printable(layer) for layer in group.layers]
    places = layers[:NAMED]
    if len(layers) > NAMED:
        places.append(f"and {len(layers) - NAMED} more")
    table = None
    text = [printable(finding.message)]
    if len(group.findings) > 1:
        text = [f"{printable(finding.layer) or 'The model'}: {text[0]}"]
        rows = [(printable(f.layer) or "(the model)", printable(f.message)) for f in group.findings]
        table = Table(f"All {len(rows)} places", ("layer", "what is wrong"), rows)
    safety = {
        True: "The cure is safe: it leaves what the network computes as it was, or brings it to "
        "what its training meant.",
        False: "The cure is a decision: it changes what the network computes or how it trains.",
        None: "There is no automatic cure.",
    }[finding.safe]
    return Card(
        group.title.capitalize(),
        LEVELS[finding.severity],
        groups.NOUNS[finding.severity][0].capitalize(),
        code=finding.code,
        places=places or ["the whole model"],
        place_name=("Layer" if len(layers) == 1 else "Layers") if layers else "",
        remark=f"Follows from {' and '.join(group.because)}: cure that first."
        if group.because
        else "",
        text=text,
        facts=[(name, printable(value)) for name, value in groups.facts(finding)],
        advice=printable(finding.cure),
        line=printable_lines(finding.line),
        more=[("Why, and when it is said", [rule.why, rule.threshold, safety, rule.source])],
        table=table,
    )


def _layers(report: Reported, draw: bool) -> list[Section]:
    evidence = report.evidence
    if not evidence.layers:
        return []
    charts: list[Chart] = []
    if draw:
        from steadynorm.doctor.report.charts import layer_charts

        charts = layer_charts(evidence, report.findings)
    title = "Running statistics against the data" if evidence.data else "What the layers keep"
    modes = None if evidence.data is None else evidence.data.loss
    losses = [] if modes is None else [_losses(modes)]
    return [
        *([Section(title, tables=losses, charts=charts)] if losses or charts else []),
        Section("Layer by layer", tables=[_table(report)]),
    ]


def _losses(modes: LossByMode) -> Table:
    rows = [
        ("each batch, as training does", float(np.mean(modes.training))),
        ("the running statistics, as inference does", float(np.mean(modes.inference))),
        ("running statistics calibrated on these batches", float(np.mean(modes.calibrated))),
    ]
    return Table("Loss by what normalizes", ("statistics of", "mean loss"), rows, digits=4)


def _table(report: Reported) -> Table:
    codes: dict[str, set[str]] = {}
    for finding in report.findings:
        codes.setdefault(finding.layer, set()).add(finding.code)
    rows = [
        (
            named(layer),
            ", ".join(sorted(codes.get(layer.name, ()))),
            layer.kind,
            layer.usage.policy if layer.usage else None,
            layer.state.num_features,
            layer.state.num_batches_tracked,
            _range(layer.state.running_mean),
            _range(layer.state.running_var),
            _range(layer.state.weight),
            _range(layer.state.bias),
        )
        for layer in report.evidence.layers
    ]
    return Table(
        "What each layer keeps",
        ("layer", "findings", "kind", "policy", "channels", "batches", "running mean",
         "running variance", "weight", "bias"),
        rows,
        note="Statistics, weight and bias from the smallest to the largest channel.",
    )  # fmt: skip


def _range(array: np.ndarray | None) -> str | None:
    if array is None or not array.size:
        return None
    if not np.all(np.isfinite(array)):
        bad = int(np.sum(~np.isfinite(array)))
        return f"{bad} not finite"
    low, high = float(array.min()), float(array.max())
    text = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    return text.replace("-", "−")
