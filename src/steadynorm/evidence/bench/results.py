"""Measurements as tables, a chart page, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steadynorm.evidence.bench.measure import Measurement, geometric_mean
from steadynorm.evidence.bench.workloads import Workload
from steadynorm.files import replace_file
from steadynorm.report.page import Chart, Page, Section, Table

Key = tuple[str, str, str, str, bool]
MINE = ("ours", "given")  # the layer, and its kernels with outputs given


def rows(measurements: Iterable[Measurement], machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """One flat row per measurement, with all that is needed to judge it."""
    return [
        {
            "suite": m.workload.suite,
            "shape": "x".join(map(str, m.workload.shape)),
            "layout": m.workload.layout,
            "dtype": m.workload.dtype,
            "case": m.workload.case,
            "mode": "training" if m.workload.training else "inference",
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


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """A table for each suite, case, layout, type and mode; the shapes are its rows."""
    grouped: dict[Key, dict[tuple[int, ...], dict[tuple[str, str], Measurement]]] = {}
    for m in measurements:
        load = m.workload
        key = (load.suite, load.case, load.layout, load.dtype, load.training)
        shape = grouped.setdefault(key, {}).setdefault(load.shape, {})
        shape[m.contender, m.direction] = m
    return [_table(key, shapes) for key, shapes in grouped.items()]


def _table(
    key: Key, shapes: Mapping[tuple[int, ...], Mapping[tuple[str, str], Measurement]]
) -> Table:
    suite, case, layout, dtype, training = key
    total = "both" if training else "forward"
    first = next(iter(shapes.values()))
    names = list(dict.fromkeys(name for name, _ in first))
    peers = [name for name in names if name not in MINE]
    columns = ["shape"]
    columns += [f"{name}, {d}" for name in names for d in _directions(name, training)]
    columns += [f"ours against {peer}" for peer in peers]
    lines: list[list[str | float | None]] = []
    gains: dict[str, list[float]] = defaultdict(list)
    for shape, found in shapes.items():
        line: list[str | float | None] = ["x".join(map(str, shape))]
        for name in names:
            line += [found[name, d].copies for d in _directions(name, training)]
        for peer in peers:
            gain = found[peer, total].copies / found["ours", total].copies
            gains[peer].append(gain)
            line.append(f"{gain:.2f}x")
        lines.append(line)
    blank: list[str | float | None] = [None] * (len(columns) - 1 - len(peers))
    lines.append(["geometric mean", *blank, *(f"{geometric_mean(gains[p]):.2f}x" for p in peers)])
    lines.append(["lowest", *blank, *(f"{min(gains[p]):.2f}x" for p in peers)])
    limit = sum(Workload(suite, (1, 1), layout, dtype, case, training).limit)
    return Table(
        f"{case}, {'training' if training else 'inference'}, {suite}, {layout}, {dtype}",
        columns,
        lines,
        note=f"Times in copies of the input; least memory traffic: {limit:g} copies "
        f"({'forward + backward' if training else 'forward'}).",
        emphasis=(len(lines) - 2,),
    )


def _directions(name: str, training: bool) -> tuple[str, ...]:
    if not training:
        return ("forward",)
    return ("forward", "backward") if name in MINE else ("both",)


def charts(measurements: Sequence[Measurement]) -> list[Chart]:
    """Every contender's time in copies, one dot per shape, with its quartiles."""
    from steadynorm.report.charts import intervals

    grouped: dict[tuple[str, str, str, str, bool], list[dict[str, Any]]] = defaultdict(list)
    limits: dict[Any, float] = {}
    for m in measurements:
        load = m.workload
        if m.direction != ("both" if load.training else "forward"):
            continue
        key = (load.suite, load.case, load.layout, load.dtype, load.training)
        limits[key] = sum(load.limit)
        grouped[key].append(
            {
                "shape": "x".join(map(str, load.shape)),
                "contender": m.contender,
                "copies": m.copies,
                "low": m.low,
                "high": m.high,
            }
        )
    return [
        intervals(
            f"{key[1]}, {'training' if key[4] else 'inference'}, {key[0]}, {key[2]}, {key[3]}",
            points,
            value="copies",
            low="low",
            high="high",
            label="shape",
            series="contender",
            value_title="time, in copies of the input (logarithmic); dashed: the memory's limit",
            log=True,
            wide=True,
            reference=limits[key],
            description="Time of each contender per shape as a multiple of a copy of the input.",
        )
        for key, points in grouped.items()
    ]


def write(
    folder: Path,
    measurements: Sequence[Measurement],
    machine: Mapping[str, str],
    networks: Table | None,
) -> list[Path]:
    """`bench.csv`, `bench.json` and, where altair is installed, `bench.html`."""
    flat = rows(measurements, machine)
    written = []
    if flat:
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
        written.append(replace_file(folder / "bench.csv", text.getvalue()))
    record = {"machine": dict(machine), "measurements": flat}
    if networks is not None:
        columns = list(networks.columns)
        record["networks"] = [dict(zip(columns, row, strict=True)) for row in networks.rows]
    written.append(replace_file(folder / "bench.json", json.dumps(record, indent=1)))
    shown = tables(measurements)
    sections = [Section("Time in copies", ["Lower is better."], [], charts(measurements))]
    sections.append(Section("Figures", [], shown))
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
