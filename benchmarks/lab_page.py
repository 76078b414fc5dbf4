"""Write the figures of docs/lab.md, its pictures and docs/lab/report.html from the results there.

    steadynorm lab run --all --profile full --out lab
    cp lab/results/*.json docs/lab/results/
    python benchmarks/lab_page.py

The words of the page stay; what stands between `<!-- figures: NAME -->` and `<!-- end -->` is made
anew. An experiment that has no such place yet gets one at the end of the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steadynorm.evidence.lab.report import SavedResults, findings, markdown, page, saved
from steadynorm.files import replace_file
from steadynorm.report.page import Chart

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "lab.md"
FOLDER = ROOT / "docs" / "lab"
END = "<!-- end -->"
PICTURES = {"covariate-shift": 4}  # of an experiment, else 2; the page with all is beside
TABLES = 1
INK, SOFT, GRID = "#1d2733", "#4b5a6e", "#d9dfe6"
PALETTE = ["#0b62b0", "#c8500a", "#0a7d5a", "#9c3c8b", "#8a6a00", "#4b5a6e", "#b3263c", "#2aa1b3"]


def svg(chart: Chart) -> str:
    """A chart as a picture, in the page's light colours."""
    spec: dict[str, Any] = dict(chart.spec) | {"width": 620, "title": chart.title}
    layers = spec.get("layer", [])
    if any(layer["mark"]["type"] == "line" for layer in layers):  # dots are there to be pointed at
        spec["layer"] = [layer for layer in layers if layer["mark"]["type"] != "circle"]
    return drawn(spec)


def drawn(spec: dict[str, Any]) -> str:
    """A Vega-Lite specification as SVG."""
    import vl_convert

    axis = dict(
        labelColor=SOFT, titleColor=SOFT, tickColor=GRID, domainColor=SOFT, gridColor=GRID,
        labelFontSize=12, titleFontSize=12, titleFontWeight="normal", labelOverlap=True,
    )  # fmt: skip
    legend = dict(
        labelColor=INK, labelFontSize=12, orient="top", direction="horizontal", columns=3,
        symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1, title=None, labelLimit=260,
    )  # fmt: skip
    config = dict(
        background="white", font="sans-serif", view={"stroke": None}, axis=axis, legend=legend,
        title={"anchor": "start", "color": INK, "fontSize": 13}, range={"category": PALETTE},
        rule={"color": SOFT}, padding=8,
    )  # fmt: skip
    picture: str = vl_convert.vegalite_to_svg(spec, config=config)
    # Names count what the process drew before; these make the same picture the same file.
    found = dict.fromkeys(re.findall(r'id="(\w+)"', picture))
    names = {name: f"part{number}" for number, name in enumerate(found)}
    return re.sub(r'(id="|#)(\w+)', lambda m: m[1] + names.get(m[2], m[2]), picture) + "\n"


def figures(one: SavedResults) -> Iterator[str]:
    """One experiment: claim, verdict, what it follows from, tables and pictures."""
    head, shown = one.head, one.figures()
    verdict = head["verdict"]
    yield f"*Claim:* {head['claim']} ({head['source']})"
    yield f"**{verdict['outcome'].capitalize()}.** {verdict['sentence']}"
    yield f"Rule, written down before: {head['rule']} Measured: {head['measure']}"
    for table in [findings(one), *shown.tables[:TABLES]]:
        yield f"{table.title}:\n\n{table.markdown()}"
    for number, chart in enumerate(shown.charts[: PICTURES.get(one.name, 2)], start=1):
        path = FOLDER / "pictures" / f"{one.name}-{number}.svg"
        replace_file(path, svg(chart))
        yield f"![{chart.title}. {chart.description}](lab/pictures/{path.name})"


def put(text: str, name: str, block: str) -> str:
    """`text` with the block of this name replaced, or added at the end."""
    start = f"<!-- figures: {name} -->"
    whole = f"{start}\n\n{block}\n\n{END}"
    if start not in text:
        return f"{text.rstrip()}\n\n{whole}\n"
    return re.sub(f"{re.escape(start)}.*?{END}", lambda _: whole, text, count=1, flags=re.DOTALL)


def main() -> None:
    results = saved(FOLDER / "results")
    text = PAGE.read_text("utf-8")
    text = put(text, "all", markdown(results).strip())
    for one in results:
        block = "\n\n".join(figures(one))
        if f"<!-- figures: {one.name} -->" not in text:
            text = f"{text.rstrip()}\n\n## {one.head['title']}\n"
        text = put(text, one.name, block)
    replace_file(PAGE, text)
    page(results).write(FOLDER / "report.html")


if __name__ == "__main__":
    main()
