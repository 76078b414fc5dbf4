"""The page: everything escaped, nothing fetched, charts drawn, tables sound."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from steadynorm.report.page import Chart, Page, Section, Table
from steadynorm.report.terminal import to_rich

pytest.importorskip("altair", reason="charts need the extra lab")
from steadynorm.report.charts import intervals, lines

HOSTILE = "</script><script>window.broken=1</script>&\"'<!-- \u2028"
ROWS = [
    {"step": step, "loss": 2.0**-step, "policy": policy, "seed": seed}
    for policy in ("Batch", HOSTILE)
    for seed in (0, 1)
    for step in range(4)
]


def charts():
    return [
        lines("Loss", ROWS, x="step", y="loss", series="policy", replicate="seed", log_y=True,
              description=HOSTILE, order=["Steady", "Batch", HOSTILE], highlight="Batch"),
        intervals("Ratio", [{"layer": HOSTILE, "low": 0.5, "mid": 1.0, "high": 2.0, "at": "2"}],
                  value="mid", low="low", high="high", label="layer", series="at",
                  description="", log=True, reference=1.0, wide=True),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def page():
    table = Table(HOSTILE, ("policy", "error"), [(HOSTILE, 1.25), ("Steady", None)], note=HOSTILE)
    sections = [Section(HOSTILE, [HOSTILE], [table], charts()), Section("Second"), Section("Third")]
    return Page(HOSTILE, sections, lead=HOSTILE, details=[(HOSTILE, HOSTILE)])


class Reader(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = (tag, dict(attrs))

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text.append(data)
        elif self.inside[0] == "script":
            self.scripts.append((self.inside[1], data))


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page.html())
    return reader


def test_text_is_escaped(read):
    assert sum(tag == "script" for tag, _ in read.tags) == 5  # theme, two specs, vega, charts
    shown = "".join(read.text)
    assert shown.count(HOSTILE) >= 6


def test_specifications_survive_the_script_element(read, page):
    specs = [json.loads(text) for attrs, text in read.scripts if attrs.get("class") == "spec"]
    assert specs == [chart.spec for chart in page.sections[0].charts]
    assert all(spec["width"] == "container" for spec in specs)


def test_nothing_is_fetched(read):
    for tag, attrs in read.tags:
        assert "src" not in attrs, (tag, attrs)
        assert tag not in ("link", "iframe", "object", "img")
        assert attrs.get("href", "#").startswith("#")
    (policy,) = (a["content"] for _, a in read.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


def test_accessible_structure(read):
    identities = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(identities) == len(set(identities))
    for _, attrs in read.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            if name in attrs:
                assert attrs[name] in identities
    kinds = [tag for tag, _ in read.tags]
    assert kinds.count("caption") == kinds.count("table") == 1
    assert kinds.count("h1") == 1
    assert ("th", {"scope": "row"}) in read.tags
    assert ("html", {"lang": "en"}) in read.tags


def test_sections_of_one_name_have_addresses_of_their_own():
    html = Page("Title", [Section("Same"), Section("Same")]).html()
    assert len(set(re.findall(r'<section id="([^"]+)"', html))) == 2


def test_a_page_without_charts_carries_no_chart_library():
    html = Page("Title", [Section("Only", ["text"])]).html()
    assert len(html) < 20_000
    assert "vega" not in html.lower()


def test_write_is_the_page(page, tmp_path):
    assert page.write(tmp_path / "report.html").read_text("utf-8") == page.html()


def test_table_refuses_a_ragged_row():
    with pytest.raises(
        ValueError, match=r"^Table 'T': every row must have 2 cells, one per column"
    ):
        Table("T", ("a", "b"), [("x",)])


def test_cells_as_they_are_shown():
    table = Table("T", ("a", "b", "c"), [("x", 1234.5, "1.0 ± 0.2"), ("y", None, "–")], digits=2)
    assert [table.text(cell) for cell in (1234.5, 1234, None, "y")] == [
        "1,234.50", "1,234", "–", "y"
    ]  # fmt: skip
    assert [table.numeric(column) for column in range(3)] == [False, True, True]


def test_markdown():
    table = Table("T", ("a|b", "c"), [("x", 1.25), (None, 2)], note="Note.", digits=2, emphasis=[1])
    assert table.markdown().split("\n") == [
        "| a\\|b | c |", "| --- | --- |", "| x | 1.25 |", "| **–** | **2** |", "", "Note.",
    ]  # fmt: skip


def test_terminal_shows_markup_as_text():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(to_rich(Table("T [red]", ("a [b]",), [("[bold]x[/bold]",)], note="[i]n")))
    console.file.close()
    shown = console.export_text()
    for text in ("T [red]", "a [b]", "[bold]x[/bold]", "[i]n"):
        assert text in shown


def test_lines_keep_a_series_colour_where_others_are_missing():
    chart = charts()[0]
    colour = chart.spec["layer"][1]["encoding"]["color"]
    assert colour["scale"]["domain"] == ["Steady", "Batch", HOSTILE]
    assert colour["legend"]["values"] == ["Batch", HOSTILE]


def test_y_max_only_cuts_what_is_above():
    cut, whole = (
        lines("Loss", ROWS, x="step", y="loss", series="policy", description="", y_max=y_max)
        for y_max in (0.5, 2.0)
    )
    assert cut.spec["layer"][0]["encoding"]["y"]["scale"]["domainMax"] == 0.5
    assert "domainMax" not in whole.spec["layer"][0]["encoding"]["y"]["scale"]


def test_chart_descriptions_reach_the_specification():
    assert charts()[0].spec["description"] == HOSTILE
    assert isinstance(charts()[1], Chart)
