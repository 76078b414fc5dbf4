"""A self-contained HTML page: sections of text, cards, tables and interactive charts.

>>> from steadynorm.report.page import Page, Section, Table
>>> table = Table("Error of inference", ("policy", "error, %"), [("Batch", 38.3), ("Steady", 2.1)])
>>> page = Page("Small batches", [Section("Batch 2", ["Steady holds."], [table])])
>>> "<caption>Error of inference</caption>" in page.html()
True
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
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

    def markdown(self) -> str:
        """The table in Markdown, without its title; the rows to emphasize are bold."""
        rows = [[self.text(cell) for cell in row] for row in self.rows]
        for index in self.emphasis:
            rows[index] = [f"**{cell}**" for cell in rows[index]]
        lines = [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
            for line in [list(self.columns), ["---"] * len(self.columns), *rows]
        ]
        return "\n".join(lines) + (f"\n\n{self.note}" if self.note else "")

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
    """One finding, in a frame of its own. Readers can filter the cards of a section by level, by
    code and by words.

    `level`: how bad, which sets colour and mark; `level_name` is what the reader sees. `code`: what
    cards of one kind have in common. `places`: where it was found, as code after `place_name`.
    `remark`: a line before all else. `facts`: figures by name. `advice` and `line`: what to do, and
    code that does it, to copy. `more`: (summary, paragraphs) to unfold. `table`: to unfold, too.
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


Piece = str | Table | Chart | Card
AnySection = TypeVar("AnySection", bound="Section")


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

    @classmethod
    def of(cls: type[AnySection], title: str, *pieces: Piece, **more: Any) -> AnySection:
        """From pieces of any kind, those of a kind in their order; text is a paragraph for each."""
        kinds: dict[str, Any] = {"text": str, "tables": Table, "charts": Chart, "cards": Card}
        for name, kind in kinds.items():
            more[name] = [piece for piece in pieces if isinstance(piece, kind)]
        return cls(title, **more)

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
    details: Sequence[tuple[str, str]] = ()

    def addressed(self) -> list[tuple[str, Section]]:
        """Every section with its address within the page, made from its title."""
        found: dict[str, Section] = {}
        for section in self.sections:
            name = "-".join(re.findall(r"[^\W_]+", section.title.lower())) or "section"
            numbered = (f"{name}-{number}" if number > 1 else name for number in count(1))
            found[next(address for address in numbered if address not in found)] = section
        return list(found.items())

    def html(self) -> str:
        """The page as text. Raises ModuleNotFoundError when a chart needs vl-convert-python."""
        cards, charts = (
            any(getattr(section, what) for section in self.sections) for what in ("cards", "charts")
        )
        styles = ["page.css", *["cards.css"] * cards, *["charts.css"] * charts]
        scripts = [*[_resource("cards.js")] * cards, *([_vega(), _resource("charts.js")] * charts)]
        return _template().render(
            page=self,
            style=Markup("".join(map(_resource, styles))),
            theme=Markup(_resource("theme.js")),
            scripts=map(Markup, scripts),
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to `path`, whole or not at all; returns the path."""
        return replace_file(path, self.html())


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FunctionLoader(_resource), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["spec"] = _inside_script
    return environment.get_template("template.html.j2")


def _inside_script(value: object) -> Markup:
    """JSON that no content can break out of a script element with."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


def _resource(name: str) -> str:
    return resources.files("steadynorm.report").joinpath(name).read_text("utf-8")


@lru_cache(maxsize=1)
def _vega() -> str:
    import altair as alt
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    # The snippet may be left out, whatever the type stub says; the default exports vegaEmbed.
    bundle: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
    # In strings and regular expressions `<\/script` is the same, and does not end the element.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")
