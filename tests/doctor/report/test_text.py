"""The report in the terminal: what is wrong first, lines to copy, names as text."""

from __future__ import annotations

import sys
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console
from tests.doctor.report import made

import steadynorm as sn
from steadynorm.doctor.report import groups
from steadynorm.doctor.report.text import show, to_rich, to_text
from steadynorm.doctor.rules import find_rule

WHOLE = f"""\
shop.models:resnet: 1 error, 1 warning, 1 remark
5 batch norms, 3 rules, from a model and 3 batches

error SN101 statistics never updated
  <script>alert(1)</script>, body.0.bn
  what SN101 says of it, with 1.5
  of it 1.5
  cure  {find_rule("SN101").cure}
        cure('SN101')

warning SN301 {find_rule("SN301").name.replace("-", " ")}  follows from SN101
  what SN301 says of it, with 1.5
  of it 1.5
  cure  {find_rule("SN301").cure}
        cure('SN301')

info SN102 {find_rule("SN102").name.replace("-", " ")}
  head.bn
  [red]not[/red] \\x1b[31mfinite
  largest inf · none nan · type float16

body.2.bn was not called
2 rules need a training run: sn.monitor(model).
Why: steadynorm doctor --explain SN101"""


def test_whole_text():
    assert to_text(made.report()).splitlines() == WHOLE.splitlines()


def test_no_code_for_the_terminal_gets_through():
    stream = StringIO()
    Console(file=stream, width=80, color_system=None).print(to_rich(made.report()))
    assert "\x1b" not in stream.getvalue()
    assert "[red]not[/red]" in stream.getvalue()


def test_no_spaces_at_the_ends_of_lines():
    stream = StringIO()
    show(made.report(), Console(file=stream, width=60))
    assert [line for line in stream.getvalue().splitlines() if line != line.rstrip()] == []


def test_colours_where_the_terminal_has_them():
    stream = StringIO()
    Console(file=stream, force_terminal=True, width=80).print(to_rich(made.report()))
    assert "\x1b[1;31merror" in stream.getvalue()


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_line_to_copy_stays_whole(width):
    line = "model, changes = sn.convert(model, statistics=sn.Steady(prior=2.0))  # one line, long"
    long = replace(made.finding("SN101", made.Severity.ERROR, "a"), line=f"if x:\n    {line}")
    stream = StringIO()
    show(replace(made.report(), findings=(long,)), Console(file=stream, width=width))
    shown = stream.getvalue().splitlines()
    assert f"        if x:\n            {line}".splitlines() == [
        text.rstrip() for text in shown if "if x" in text or "convert" in text
    ]


def test_rich_itself_loses_nothing_of_a_long_line():
    line = "a_name_that_is_far_too_long_for_this_console = sn.Steady(prior=2.0)"
    long = replace(made.finding("SN101", made.Severity.ERROR, "a"), line=line)
    stream = StringIO()
    Console(file=stream, width=30).print(to_rich(replace(made.report(), findings=(long,))))
    assert line.replace(" ", "") in "".join(stream.getvalue().split())


def test_nothing_found_says_what_was_looked_at():
    assert to_text(made.sound()).splitlines()[:2] == [
        "shop.models:resnet: nothing found",
        "5 batch norms, 3 rules, from a model and 3 batches",
    ]
    assert to_text(made.empty()).splitlines()[0] == "empty.pt: no batch norm found"


def test_weights_alone_say_what_is_missing():
    lines = to_text(made.weights_alone()).splitlines()
    assert lines[1] == "5 batch norms, 1 rule, from weights alone"
    assert lines[-3:-1] == [
        "1 rule needs the model, not its weights alone.",
        "1 rule needs batches of data: sn.diagnose(model, batches), or --data.",
    ]


def test_many_layers_of_one_kind_are_told_once():
    many = tuple(made.finding("SN101", made.Severity.ERROR, f"layer{n}") for n in range(53))
    text = to_text(replace(made.report(), findings=many))
    assert "layer0, layer1, layer2, layer3, layer4, layer5 and 47 more" in text
    assert text.count("error SN101") == 1
    assert text.startswith("shop.models:resnet: 1 error\n")


def test_groups_keep_the_order_of_the_findings():
    found = groups.grouped(made.report().findings)
    assert [(group.first.code, len(group.findings)) for group in found] == [
        ("SN101", 2), ("SN301", 1), ("SN102", 1)
    ]  # fmt: skip
    assert found[1].because == ("SN101",)
    assert found[1].layers == ()


def test_report_prints_itself():
    assert str(made.report()) == to_text(made.report())


def test_text_needs_no_rich(monkeypatch):
    for name in ("rich", "rich.console", "rich.text", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert str(made.report()).splitlines() == WHOLE.splitlines()
    assert sn.diagnose(torch.nn.BatchNorm1d(2), [torch.randn(8, 2)]).evidence.data is not None


def test_a_page_names_the_library_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("steadynorm.doctor.diagnosis.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^Report\.to_html needs jinja2: pip install"):
        made.report().to_html(tmp_path / "page.html")
