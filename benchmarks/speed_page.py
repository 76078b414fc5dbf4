"""Write the tables and the picture of docs/speed.md from what `steadynorm bench` measured.

    steadynorm bench --suites resnet50 --cases bn,bn+add+relu --contenders ours,given,eager,compile
    python benchmarks/speed_page.py bench/bench.json

Tables of other runs (several files may be named) follow one another in the page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"
PICTURE = ROOT / "docs" / "images" / "roofline.svg"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
MINE = ("ours", "given")


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(title: str, rows: list[dict[str, Any]], training: bool) -> str:
    shapes: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in rows:
        shapes[row["shape"]][row["contender"], row["direction"]] = row["copies"]
    total = "both" if training else "forward"
    names = list(dict.fromkeys(row["contender"] for row in rows))
    peers = [name for name in names if name not in MINE]
    columns = ["shape"]
    for name in names:
        split = training and name in MINE
        columns += [f"{name} forward", f"{name} backward"] if split else [name]
    columns += [f"ours against {peer}" for peer in peers]
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    gains: dict[str, list[float]] = defaultdict(list)
    for shape, found in shapes.items():
        cells = [shape]
        for name in names:
            split = training and name in MINE
            ways = ("forward", "backward") if split else (total,)
            cells += [f"{found[name, way]:.2f}" for way in ways]
        for peer in peers:
            gains[peer].append(found[peer, total] / found["ours", total])
            cells.append(f"{gains[peer][-1]:.2f}x")
        lines.append("| " + " | ".join(cells) + " |")
    empty = " | " * (len(columns) - 1 - len(peers))
    for label, of in (("geometric mean", mean), ("lowest", min)):
        figures = " | ".join(f"**{of(gains[peer]):.2f}x**" for peer in peers)
        lines.append(f"| {label} {empty}| {figures} |")
    return "\n".join(lines)


def networks(record: dict[str, Any]) -> str:
    rows = record["networks"]
    columns = list(rows[0])
    lines = ["### Whole networks, one training step", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: list[dict[str, Any]], limit: float) -> None:
    import altair as alt
    import vl_convert

    points = [
        {
            "MB": math.prod(map(int, row["shape"].split("x"))) * 4 / 1e6,
            "copies": row["copies"],
            "contender": row["contender"],
        }
        for row in rows
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
    drawn = False
    for path in parser.parse_args().files:
        record = json.loads(path.read_text(encoding="utf-8"))
        grouped: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
        for row in record["measurements"]:
            key = tuple(row[name] for name in ("suite", "case", "mode", "layout", "dtype"))
            grouped[key].append(row)
        for key, rows in grouped.items():
            suite, case, mode, layout, dtype = key
            parts.append(
                table(f"{case}, {mode}, {suite}, {layout}, {dtype}", rows, mode == "training")
            )
            if key == ("resnet50", "bn+add+relu", "training", "nchw", "float32") and not drawn:
                drawn = True
                picture([row for row in rows if row["direction"] == "both"], 4.0)
        if record.get("networks"):
            parts.append(networks(record))
        about = record["machine"]
        parts.append("Measured: " + ", ".join(f"{k} {v}" for k, v in about.items()) + ".")
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after, "utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
