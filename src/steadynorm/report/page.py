"""A self-contained HTML page: sections of text, cards, tables and interactive charts.

>>> from steadynorm.report.page import Page, Section, Table
>>> table = Table("Error of inference", ("policy", "error, %"), [("Batch", 38.3), ("Steady", 2.1)])
>>> page = Page("Small batches", [Section("Batch 2", ["Steady holds."], [table])])
>>> "<caption>Error of inference</caption>" in page.html()
True
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from steadynorm.files import replace_file

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns. Numbers are right-aligned and shown with `digits` decimals; None
    shows as a dash. `note` stands below. `emphasis` are indices of rows to set in bold.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    digits: int = 1
    emphasis: Sequence[int] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Table {self.title!r}: every row must have {len(self.columns)} cells, one "
                    f"per column; got {list(row)!r}."
                )

    def text(self, cell: Cell) -> str:
        """A cell as it is shown."""
        if cell is None:
            return "–"
        if isinstance(cell, float):
            return f"{cell:,.{self.digits}f}"
        return f"{cell:,}" if isinstance(cell, int) else cell

    def numeric(self, column: int) -> bool:
        """Whether a column starts with a number (`−2.1 ± 0.3` is one), and so is aligned right."""
        first = next((row[column] for row in self.rows if row[column] is not None), "")
        return not isinstance(first, str) or first.lstrip("−-")[:1].isdigit()


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification (`altair.Chart.to_dict()`) with its title, and a description for
    those who cannot see it. Colours are left to the page, which has a light and a dark set. A
    `wide` chart takes the page's whole width.
    """

    title: str
    spec: dict[str, Any]
    description: str
    wide: bool = False


@dataclass(frozen=True)
class Card:
    """One thing that was found, in a frame of its own. Where a section has several cards, readers
    can filter them by level, by code and by words.

    `level`: how bad, which sets colour and mark; `level_name` is what the reader sees. `code`: what
    is common to cards of one kind. `places`: where it was found, shown as code after `place_name`.
    `remark`: a line in
    front of all else, such as what it follows from. `facts`: figures by name. `advice` and `line`:
    what to do, and code that does it, to copy. `more`: (summary, paragraphs) to fold out. `table`:
    more of the same, folded out.
    """

    title: str
    level: Literal["error", "warning", "info", "good"]
    level_name: str
    code: str = ""
    places: Sequence[str] = ()
    place_name: str = ""
    remark: str = ""
    text: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    advice: str = ""
    line: str = ""
    more: Sequence[tuple[str, Sequence[str]]] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, cards, tables and charts, shown in this order. `filtered`: how readers
    call its cards where they can be filtered ("findings"), "" for no filter.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    cards: Sequence[Card] = ()
    filtered: str = ""

    def choices(self, what: Literal["level", "code"]) -> dict[str, str]:
        """What the cards can be filtered by: value -> what the reader sees, in order."""
        if what == "level":
            return {card.level: card.level_name for card in self.cards}
        named = sorted({(card.code, card.title) for card in self.cards})
        return {code: f"{code} {title}" for code, title in named}


@dataclass(frozen=True)
class Page:
    """A page that needs nothing but itself: no network request, readable in light and dark, on a
    phone, by keyboard and by a screen reader. All text is escaped.
    """

    title: str
    sections: Sequence[Section]
    lead: str = ""
    details: Sequence[tuple[str, str]] = field(default_factory=tuple)

    def addressed(self) -> list[tuple[str, Section]]:
        """Every section with its address within the page, made from its title."""
        found: dict[str, Section] = {}
        for section in self.sections:
            letters = (letter if letter.isalnum() else " " for letter in section.title.lower())
            name = "-".join("".join(letters).split()) or "section"
            number = 2
            address = name
            while address in found:
                address, number = f"{name}-{number}", number + 1
            found[address] = section
        return list(found.items())

    def html(self) -> str:
        """The page as text. Raises ModuleNotFoundError when a chart needs vl-convert-python."""
        charts = any(section.charts for section in self.sections)
        cards = any(section.cards for section in self.sections)
        environment = Environment(
            loader=FunctionLoader(_resource),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["spec"] = _inside_script
        styles = [
            "page.css",
            *(["cards.css"] if cards else []),
            *(["charts.css"] if charts else []),
        ]
        return environment.get_template("template.html.j2").render(
            page=self,
            style=Markup("".join(map(_resource, styles))),
            theme=Markup(_resource("theme.js")),
            cards_script=Markup(_resource("cards.js")) if cards else "",
            charts_script=Markup(_resource("charts.js")),
            vega=Markup(_vega()) if charts else "",
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to `path`, whole or not at all; returns the path."""
        return replace_file(path, self.html())


def _inside_script(value: object) -> Markup:
    """JSON that no content can break out of a script element with."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _resource(name: str) -> str:
    return resources.files("steadynorm.report").joinpath(name).read_text("utf-8")


@lru_cache(maxsize=1)
def _vega() -> str:
    import vl_convert

    version = _vega_lite_version()
    # The snippet may be left out, whatever the type stub says; the default exports vegaEmbed.
    bundle: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    # In strings and regular expressions `<\/script` is the same, and does not end the element.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _vega_lite_version() -> str:
    import altair as alt

    return ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
