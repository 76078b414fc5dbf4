"""The page in a real browser: charts drawn, no request, both themes, a phone's width."""

from __future__ import annotations

import pytest
from tests.report.browser import chromium, visits

from steadynorm.report.page import Page, Section, Table

pytest.importorskip("altair", reason="charts need the extra lab")


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    from steadynorm.report.charts import intervals, lines

    name = "</script><script>window.broken = 1</script>"
    rows = [
        {"step": step, "loss": 0.5**step, "policy": policy}
        for policy in ("Batch", name)
        for step in range(5)
    ]
    marks = [{"layer": "layer 1", "low": 0.5, "mid": 1.0, "high": 1.5}]
    page = Page(
        name,
        [
            Section(
                name,
                tables=[Table("Wide", [f"column {n}" for n in range(12)], [["x"] * 12])],
                charts=[
                    lines("Loss", rows, x="step", y="loss", series="policy", description="falls"),
                    intervals("Ratio", marks, value="mid", low="low", high="high", label="layer",
                              description="agrees", reference=1.0),
                ],
            )
        ],
    )  # fmt: skip
    return page.write(tmp_path_factory.mktemp("page") / "report.html").as_uri()


@pytest.fixture
def opened(browser, address):
    with visits(browser) as visit:
        yield lambda scheme, width: visit(address, scheme, width)


PAPER = "getComputedStyle(document.body).backgroundColor"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_draws_itself_and_asks_for_nothing(opened, address, scheme, width):
    tab = opened(scheme, width)
    assert tab.requests == [address]
    assert tab.complaints == []
    assert tab.evaluate("document.querySelectorAll('.chart svg').length") == 2
    assert tab.evaluate("document.querySelectorAll('.chart svg .mark-line path').length") >= 2
    assert tab.evaluate("typeof window.broken") == "undefined"
    assert tab.evaluate("document.documentElement.dataset.theme") == scheme
    overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "the page must not scroll sideways"


def test_the_switch_wins_over_the_system_and_redraws(opened):
    tab = opened("light", 900)
    light = tab.evaluate(PAPER), tab.evaluate("document.querySelector('.chart svg').outerHTML")
    tab.focus("input[value=system]")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.wait_for_function(
        "before => document.querySelector('.chart svg')?.outerHTML !== before", arg=light[1]
    )
    assert tab.evaluate(PAPER) != light[0]


def test_follows_the_system_while_it_is_open(opened):
    tab = opened("light", 900)
    tab.emulate_media(color_scheme="dark")
    tab.wait_for_selector("html[data-theme=dark]", timeout=5_000)


def test_a_click_in_the_legend_singles_out_a_series(opened):
    tab = opened("light", 1200)
    faint = (
        "[...document.querySelectorAll('.chart svg .mark-line path')]"
        ".filter(path => Number(path.getAttribute('opacity')) < 0.5).length"
    )
    assert tab.evaluate(faint) == 0
    tab.locator(".role-legend-label text", has_text="Batch").first.click()
    tab.wait_for_function(f"() => {faint} === 1", timeout=5_000)
