"""The doctor's page in a real browser: drawn, filtered, copied from, used by keyboard."""

from __future__ import annotations

import pytest
from tests.doctor.report import made
from tests.report.browser import chromium, visits

pytest.importorskip("altair", reason="charts need the extra lab")
pytest.importorskip("vl_convert", reason="charts need the extra lab")
from steadynorm.doctor.report.html import page


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("pages")
    for name in ("report", "sound", "weights_alone", "watched", "empty"):
        page(getattr(made, name)()).write(found / f"{name}.html")
    return found


@pytest.fixture
def visit(browser, folder):
    with visits(browser) as go:
        yield lambda name="report", *how, **options: go(
            (folder / f"{name}.html").as_uri(), *how, **options
        )


def shown(tab):
    """The codes of the cards that can be seen."""
    return tab.evaluate(
        "[...document.querySelectorAll('.card')].filter(c => c.checkVisibility())"
        ".map(c => c.dataset.code)"
    )


@pytest.mark.parametrize(
    ("name", "charts"),
    [("report", 3), ("sound", 3), ("weights_alone", 2), ("watched", 7), ("empty", 0)],
)
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 360)])
def test_draws_itself_and_asks_for_nothing(visit, name, charts, scheme, width):
    tab = visit(name, scheme, width)
    assert len(tab.requests) == 1
    assert tab.complaints == []
    assert tab.locator(".chart svg").count() == charts
    marks = tab.locator(".chart svg .role-mark path, .chart svg .role-mark line")
    assert marks.count() >= 10 * min(charts, 1)
    overflow = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert overflow <= 0, "the page must not scroll sideways"


def test_a_name_is_text_everywhere(visit):
    said = []
    tab = visit("weights_alone")
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    tab.reload()
    tab.wait_for_selector("html[data-charts=drawn]")
    assert (
        tab.locator("script", has_text="alert(1)").count()
        == tab.locator("script.spec", has_text="alert(1)").count()
    )  # as data of the charts alone
    assert tab.locator(".places code", has_text=made.SCRIPT).count() == 1
    assert tab.locator("tbody th", has_text=made.SCRIPT).count() == 1
    assert said == []


def test_filter_by_severity(visit):
    tab = visit()
    assert shown(tab) == ["SN101", "SN301", "SN102"]
    tab.get_by_label("Error 1").uncheck(force=True)
    assert shown(tab) == ["SN301", "SN102"]
    assert tab.locator(".filter output").inner_text() == "2 of 3 findings"
    tab.get_by_label("Error 1").check(force=True)
    assert shown(tab) == ["SN101", "SN301", "SN102"]


def test_filter_by_code_and_by_words_together(visit):
    tab = visit()
    tab.locator("select[name=code]").select_option("SN101")
    assert shown(tab) == ["SN101"]
    tab.get_by_label("Search").fill("head.bn")
    assert shown(tab) == []
    assert tab.get_by_text("No findings match.").is_visible()
    tab.get_by_role("button", name="Show all").click()
    assert shown(tab) == ["SN101", "SN301", "SN102"]
    assert tab.evaluate("document.activeElement.type") == "search"


def test_search_finds_a_layer_among_many(visit):
    tab = visit()
    tab.get_by_label("Search").fill("BODY.0")
    assert shown(tab) == ["SN101"]
    rows = tab.locator(".card .rows tbody tr")
    assert [rows.nth(i).is_visible() for i in range(2)] == [False, True]
    tab.get_by_label("Search").fill("never updated")
    assert shown(tab) == ["SN101"]
    assert tab.evaluate("document.querySelector('.rows').open") is False


def test_the_line_is_copied(visit):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    button = tab.locator(".card").first.get_by_role("button", name="Copy")
    button.click()
    tab.wait_for_function("document.querySelector('.card button').textContent === 'Copied'")
    assert tab.locator("[role=status]").inner_text() == "Copied"
    assert tab.evaluate("navigator.clipboard.readText()") == "cure('SN101')"


def test_without_a_clipboard_the_line_is_selected(visit):
    tab = visit()
    tab.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(Error('no')); }")
    tab.locator(".card button").first.click()
    tab.wait_for_function("document.querySelector('.card button').textContent !== 'Copy'")
    assert tab.evaluate("getSelection().toString()") == "cure('SN101')"


def test_by_keyboard_alone(visit):
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    seen = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        seen.append(
            tab.evaluate("(e => e.type || e.tagName.toLowerCase())(document.activeElement)")
        )
        if seen[-1] == "button":
            break
    assert seen[0] == "a"  # the link to the content
    for stop in ("radio", "search", "checkbox", "select-one", "pre", "button"):
        assert stop in seen, stop
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus must be seen"
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('.card button').textContent === 'Copied'")
    tab.focus(".card details summary")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.querySelector('.card details').open")
    tab.get_by_label("Error 1").focus()
    tab.keyboard.press("Space")
    assert shown(tab) == ["SN301", "SN102"]


def test_a_screen_reader_hears_the_structure(visit):
    tab = visit()
    assert tab.get_by_role("search", name="Filter findings").count() == 1
    assert tab.get_by_role("article", name="Error Statistics never updated SN101").count() == 1
    assert tab.get_by_role("group", name="Severity").get_by_role("checkbox").count() == 3
    assert tab.get_by_role("heading", level=2, name="What is wrong").count() == 1
    (described,) = tab.evaluate(
        "[...document.querySelectorAll('.chart')].slice(-1).map(e => ['labelledby', 'describedby']"
        ".map(how => document.getElementById(e.getAttribute(`aria-${how}`)).textContent))"
    )
    assert described[0] == "Channel by channel"
    assert described[1].startswith("Mean and standard deviation that the layer keeps")
    assert tab.get_by_role("table", name="What each layer keeps").count() == 1


def test_another_layer_can_be_chosen_and_outlives_a_change_of_colours(visit):
    tab = visit()
    choice = tab.locator(".vega-bind select")
    assert choice.input_value() == "head.bn"
    before = tab.locator(".chart svg").last.evaluate("e => e.outerHTML")
    choice.select_option(made.SCRIPT)
    tab.wait_for_function(
        "before => [...document.querySelectorAll('.chart svg')].at(-1).outerHTML !== before",
        arg=before,
    )
    tab.locator("input[value=dark]").check(force=True)
    tab.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    tab.wait_for_timeout(300)
    assert tab.locator(".vega-bind select").input_value() == made.SCRIPT
    assert tab.complaints == []


CONTRASTS = """(selector, of, least) => {
  const light = (css) => {
    const parts = css.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(color)) return light(color);
    }
    return 1;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return [...document.querySelectorAll(selector)].filter((e) => e.checkVisibility())
    .map((e) => [e.textContent.trim().slice(0, 20), ratio(light(getComputedStyle(e)[of]),
                 ground(of === "color" ? e : e.parentElement))])
    .filter(([, value]) => value < least);
}"""
WORDS = (
    "h1, h2, h3, p, dt, dd, th, td, summary, button, a, .level, .code, .filter span, legend, "
    "output, code, figcaption"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit, scheme):
    """WCAG AA: a contrast of 4.5 for text, of 3 for the edges of what can be used."""
    tab = visit("report", scheme)

    def faint(selector, of, least):
        return tab.evaluate(f"([s, o, l]) => ({CONTRASTS})(s, o, l)", [selector, of, least])

    assert faint(WORDS, "color", 4.5) == []
    assert faint(".card button, input[type=search], select", "borderTopColor", 3) == []
    tab.add_style_tag(content=":root { --soft: var(--line) !important; }")
    assert faint(WORDS, "color", 4.5) != []


def test_without_scripts_all_findings_can_be_read(browser, folder):
    context = browser.new_context(java_script_enabled=False)
    try:
        tab = context.new_page()
        tab.goto((folder / "report.html").as_uri())
        assert tab.locator(".card:visible").count() == 3
        assert tab.locator(".filter:visible, .card button:visible").count() == 0
    finally:
        context.close()
