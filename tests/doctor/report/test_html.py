"""The page's source: what is wrong first, everything escaped, charts for what there is."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from tests.doctor.report import made

from steadynorm.doctor.report.charts import compared, layer_charts

pytest.importorskip("altair", reason="charts need the extra lab")
pytest.importorskip("vl_convert", reason="charts need the extra lab")
from steadynorm.doctor.report.html import page


def values(chart, part=None):
    """The rows behind a chart, or behind one of its layers."""
    where = chart.spec if part is None else chart.spec["layer"][part]
    return chart.spec["datasets"][where["data"]["name"]]


def titles(report):
    return [section.title for section in page(report).sections]


class Reader(HTMLParser):
    """Text outside scripts, and every start tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.skip = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.skip = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.skip = False

    def handle_data(self, data):
        if not self.skip:
            self.text.append(data)


def test_what_is_wrong_comes_first():
    assert titles(made.report()) == [
        "What is wrong", "Running statistics against the data", "Layer by layer",
        "What was not looked at",
    ]  # fmt: skip
    assert titles(made.weights_alone())[1] == "What the layers keep"
    assert titles(made.watched())[1:3] == ["Over the run", "The last reading"]
    assert titles(made.empty()) == ["What is wrong"]


def test_the_charts_of_a_run_are_of_its_figures():
    charts = page(made.watched()).sections[1].charts
    assert [chart.title for chart in charts] == [
        "Batch mean against running mean", "Batch standard deviation over the running one",
        "Gradient that reaches the layer", "Channels nowhere above 0",
        "Outputs where a sigmoid is flat",
    ]  # fmt: skip


def test_a_card_for_each_defect_with_its_cure():
    cards = page(made.report()).sections[0].cards
    assert [(card.code, card.level, card.level_name) for card in cards] == [
        ("SN101", "error", "Error"), ("SN301", "warning", "Warning"), ("SN102", "info", "Remark")
    ]  # fmt: skip
    first, second, odd = cards
    assert first.places == [made.SCRIPT, "body.0.bn"]
    assert first.line == "cure('SN101')"
    assert [row[0] for row in first.table.rows] == [made.SCRIPT, "body.0.bn"]
    assert second.remark == "Follows from SN101: cure that first."
    assert second.places == ["the whole model"]
    assert odd.text == ["[red]not[/red] \\x1b[31mfinite"]


def test_names_are_text():
    read = Reader(page(made.report()).html())
    assert sum(tag == "script" for tag, _ in read.tags) == 7  # theme, 3 specs, cards, vega, charts
    assert "".join(read.text).count(made.SCRIPT) >= 3
    for tag, attributes in read.tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#"), tag


def test_labels_point_to_what_is_there():
    read = Reader(page(made.report()).html())
    identities = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    for _, attributes in read.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, identities[0]) in identities
    articles = [attributes for tag, attributes in read.tags if tag == "article"]
    assert len(articles) == 3
    assert all("aria-labelledby" in attributes for attributes in articles)


@pytest.mark.parametrize(
    ("make", "title"), [(made.sound, "Nothing found"), (made.empty, "No batch norm found")]
)
def test_nothing_found_is_said_too(make, title):
    (card,) = page(make()).sections[0].cards
    assert card.title == title
    assert "search" not in [a.get("type") for _, a in Reader(page(make()).html()).tags]


def test_compared_in_the_datas_standard_deviations():
    layer = made.layer(3, "a")
    found = compared(layer)
    mean, var = layer.data.mean, layer.data.var
    np.testing.assert_allclose(found.shift, (layer.state.running_mean - mean) / np.sqrt(var + 1e-5))
    np.testing.assert_allclose(found.ratio, np.sqrt((var / 4 + 1e-5) / (var + 1e-5)))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_what_is_not_finite_is_not_drawn(name):
    layer = made.layer(3, "a")
    broken = np.where(np.arange(made.CHANNELS) == 2, np.inf, 1.0)
    assert compared(replace(layer, state=replace(layer.state, **{name: broken}))) is None
    assert compared(replace(layer, state=replace(layer.state, **{name: None}))) is None
    evidence = replace(
        made.report().evidence,
        layers=(replace(layer, state=replace(layer.state, **{name: broken}), data=None),),
    )
    assert page(replace(made.report(), evidence=evidence)).html()


def test_charts_show_the_middle_of_each_layer():
    evidence = made.report().evidence
    drift, spread, channel = layer_charts(evidence, made.report().findings)
    rows = values(drift, 1)
    assert [row["layer"] for row in rows] == list(made.NAMES)
    shifts = [compared(layer).shift for layer in evidence.layers]
    assert [row["median"] for row in rows] == pytest.approx(np.median(shifts, 1), rel=1e-3)
    assert [row["90 %"] for row in rows] == pytest.approx(np.percentile(shifts, 90, 1), rel=1e-3)
    states = ["no finding", "error", "error", "no finding", "remark"]
    assert [row["state"] for row in rows] == states
    assert {row["median"] for row in values(spread, 1)} == {0.5}
    assert len(values(channel)) == 2 * made.CHANNELS * len(made.NAMES)
    assert channel.spec["params"][0]["value"] == "head.bn"


def test_a_deep_network_stays_a_page_one_can_open():
    layers = tuple(made.layer(index, f"layer{index}") for index in range(200))
    evidence = replace(made.report().evidence, layers=layers)
    assert len(page(replace(made.report(), evidence=evidence)).html()) < 2_500_000


def test_a_run_of_many_layers_is_a_field_of_colour():
    few, many = (page(made.watched(layers)).sections[1].charts for layers in (3, 12))
    assert [chart.title for chart in few] == [chart.title for chart in many]
    assert few[0].spec["layer"][0]["mark"]["type"] == "line"
    assert many[0].spec["mark"]["type"] == "rect"
    steps = {row["step"] for row in values(many[0])}
    assert steps == set(range(0, 40, 4))
    assert len(values(many[0])) == 12 * 10 - 1  # without the one that was NaN


@pytest.mark.parametrize("make", [made.report, made.watched])
def test_without_the_chart_library_all_but_charts_is_there(make, monkeypatch):
    monkeypatch.setattr("steadynorm.doctor.report.html.find_spec", lambda module: None)
    made_page = page(make())
    assert not any(section.charts for section in made_page.sections)
    assert made_page.sections[0].cards
    assert "steadynorm[lab]" in made_page.sections[-1].text[-1]
    assert "vega" not in made_page.html()


def test_loss_is_told_by_what_normalizes():
    (table,) = page(made.report()).sections[1].tables
    assert [row[1] for row in table.rows] == [0.5, 2.0, 0.75]
