"""Write the tables and the picture of docs/speed.md from what `steadynorm bench` measured.

    steadynorm bench --suites resnet50 --cases bn,bn+add+relu --contenders ours,given,eager,compile
    python benchmarks/speed_page.py bench/bench.json

Tables of other runs (several files may be named) follow one another in the page.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from steadynorm.evidence.bench.measure import Measurement
from steadynorm.evidence.bench.results import tables
from steadynorm.evidence.bench.workloads import Workload
from steadynorm.report.page import Table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "images" / "roofline.svg"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"


def measurement(row: dict[str, Any]) -> Measurement:
    shape = tuple(map(int, row["shape"].split("x")))
    training = row["mode"] == "training"
    load = Workload(row["suite"], shape, row["layout"], row["dtype"], row["case"], training)
    times = (row[name] for name in ("milliseconds", "copies", "copies_low", "copies_high"))
    return Measurement(load, row["contender"], row["direction"], *times, row["of_limit"])


def networks(record: dict[str, Any]) -> Table:
    rows = record["networks"]
    title = "Whole networks, one training step"
    return Table(title, list(rows[0]), [list(row.values()) for row in rows], digits=3)


def picture(measured: list[Measurement]) -> None:
    import altair as alt
    import vl_convert

    limit = sum(measured[0].workload.limit)
    points = [
        {"MB": math.prod(m.workload.shape) * 4 / 1e6, "copies": m.copies, "contender": m.contender}
        for m in measured
        if m.direction == "both"
    ]
    base = alt.Chart(alt.InlineData(values=points))
    marks = base.mark_point(filled=True, size=70).encode(
        x=alt.X("MB:Q", scale=alt.Scale(type="log"), title="size of the input, MB"),
        y=alt.Y(
            "copies:Q",
            scale=alt.Scale(type="log"),
            title="forward + backward, in copies of the input",
        ),
        color=alt.Color("contender:N", title=None),
        shape=alt.Shape("contender:N", title=None),
    )
    roof = alt.Chart(alt.InlineData(values=[{"limit": limit}])).mark_rule(strokeDash=[5, 4])
    chart = (marks + roof.encode(y="limit:Q")).properties(width=560, height=320)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(vl_convert.vegalite_to_svg(chart.to_dict()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parts = []
    drawn: list[Measurement] = []
    for path in parser.parse_args().files:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = [measurement(row) for row in record["measurements"]]
        shown = tables(found) + ([networks(record)] if record.get("networks") else [])
        parts += [f"### {table.title}\n\n{table.markdown()}" for table in shown]
        parts.append(
            "Measured: " + ", ".join(f"{k} {v}" for k, v in record["machine"].items()) + "."
        )
        drawn = drawn or [
            m for m in found if m.workload.title == "bn+add+relu, training, resnet50, nchw, float32"
        ]
    if drawn:
        picture(drawn)
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
