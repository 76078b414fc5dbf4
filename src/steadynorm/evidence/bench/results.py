"""Measurements as tables, a chart page, CSV and JSON."""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steadynorm.evidence.bench.measure import Measurement
from steadynorm.evidence.bench.workloads import Workload
from steadynorm.files import json_text, replace_file
from steadynorm.report.page import Chart, Page, Section, Table

PICTURES = ("altair", "vl_convert")
"""What draws the page's pictures."""
MINE = ("ours", "given")  # the layer, and its kernels with outputs given


def rows(measurements: Iterable[Measurement], machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """One flat row per measurement, with all that is needed to judge it."""
    return [
        {
            "suite": m.workload.suite,
            "shape": m.workload.size,
            "layout": m.workload.layout,
            "dtype": m.workload.dtype,
            "case": m.workload.case,
            "mode": m.workload.mode,
            "contender": m.contender,
            "direction": m.direction,
            "milliseconds": round(m.milliseconds, 5),
            "copies": round(m.copies, 3),
            "copies_low": round(m.low, 3),
            "copies_high": round(m.high, 3),
            "of_limit": round(m.of_limit, 3),
            **machine,
        }
        for m in measurements
    ]


def _grouped(measurements: Iterable[Measurement]) -> list[list[Measurement]]:
    """One group for each suite, case, layout, type and mode, in order of appearance."""
    groups: dict[Workload, list[Measurement]] = defaultdict(list)
    for m in measurements:
        groups[m.workload._replace(shape=())].append(m)
    return list(groups.values())


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """A table for each suite, case, layout, type and mode; the shapes are its rows."""
    return [_table(group) for group in _grouped(measurements)]


def _table(group: Sequence[Measurement]) -> Table:
    load = group[0].workload
    shapes: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for m in group:
        shapes[m.workload.size][m.contender, m.direction] = m.copies
    names = list(dict.fromkeys(m.contender for m in group))
    peers = [name for name in names if name not in MINE] if "ours" in names else []
    shown = [(name, d) for name in names for d in _directions(name, load.training)]
    lines: list[list[str | float | None]] = []
    gains: dict[str, list[float]] = defaultdict(list)
    for shape, found in shapes.items():
        for peer in peers:
            gains[peer].append(found[peer, load.total] / found["ours", load.total])
        lines.append(
            [shape, *(found[key] for key in shown), *(_times(gains[p][-1]) for p in peers)]
        )
    if peers:
        for name, summary in (("geometric mean", statistics.geometric_mean), ("lowest", min)):
            lines.append([name, *[None] * len(shown), *(_times(summary(gains[p])) for p in peers)])
    return Table(
        load.title,
        ["shape", *(f"{name}, {direction}" for name, direction in shown),
         *(f"ours against {peer}" for peer in peers)],
        lines,
        note=f"Times in copies of the input; least memory traffic: {sum(load.limit):g} copies "
        f"({'forward + backward' if load.training else 'forward'}).",
        digits=2,
        emphasis=range(len(shapes), len(lines)),
    )  # fmt: skip


def _times(gain: float) -> str:
    return f"{gain:.2f}x"


def _directions(name: str, training: bool) -> tuple[str, ...]:
    if not training:
        return ("forward",)
    return ("forward", "backward") if name in MINE else ("both",)


def charts(measurements: Sequence[Measurement]) -> list[Chart]:
    """Every contender's time in copies, one dot per shape, with its quartiles."""
    from steadynorm.report.charts import intervals

    whole = [m for m in measurements if m.direction == m.workload.total]
    return [
        intervals(
            group[0].workload.title,
            [
                {
                    "shape": m.workload.size, "contender": m.contender, "copies": m.copies,
                    "low": m.low, "high": m.high,
                }
                for m in group
            ],
            value="copies", low="low", high="high", label="shape", series="contender",
            value_title="time, in copies of the input (logarithmic); dashed: the memory's limit",
            log=True, wide=True, reference=sum(group[0].workload.limit),
            description="Time of each contender per shape as a multiple of a copy of the input.",
        )
        for group in _grouped(whole)
    ]  # fmt: skip


def to_record(
    measurements: Sequence[Measurement], machine: Mapping[str, str], networks: Table | None
) -> dict[str, Any]:
    """Everything as plain dicts and lists."""
    record: dict[str, Any] = {
        "machine": dict(machine), "measurements": rows(measurements, machine)
    }  # fmt: skip
    if networks is not None:
        columns = list(networks.columns)
        record["networks"] = [dict(zip(columns, row, strict=True)) for row in networks.rows]
    return record


def write(
    folder: Path,
    measurements: Sequence[Measurement],
    machine: Mapping[str, str],
    networks: Table | None,
) -> list[Path]:
    """Write `bench.csv`, `bench.json`, and `bench.html` where its pictures can be drawn.

    Returns the paths.
    """
    record = to_record(measurements, machine, networks)
    flat = record["measurements"]
    written = []
    if flat:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
        written.append(replace_file(folder / "bench.csv", text.getvalue()))
    written.append(replace_file(folder / "bench.json", json_text(record)))
    if not all(find_spec(package) for package in PICTURES):
        return written
    sections = [
        Section("Time in copies", ["Lower is better."], [], charts(measurements)),
        Section("Figures", [], tables(measurements)),
    ]
    if networks is not None:
        sections.insert(0, Section("Whole networks", ["One training step."], [networks]))
    page = Page(
        "Speed of batch normalization",
        sections,
        lead="Ours and its peers in the same interleaved run, as multiples of a plain copy.",
        details=tuple(machine.items()),
    )
    written.append(page.write(folder / "bench.html"))
    return written
