"""Every tool on a converted model is right, or raises; the table in the docs says which."""

import warnings
from importlib import import_module
from typing import Any

import pytest

tools = import_module("tests.with.tools")  # `with` is a keyword
table = import_module("tests.with.__main__")


@pytest.mark.parametrize("case", tools.CASES, ids=lambda case: f"{case.tool}: {case.does}")
def test_no_tool_is_wrong_in_silence(case: Any) -> None:
    for module in case.needs:
        pytest.importorskip(module, reason="an optional extra")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tools' own
        assert tools.verdict(case) == case.result


def test_a_wrong_result_is_seen() -> None:
    for case in tools.CASES:
        if case.raises is None:
            wrong = case._replace(run=lambda: tools.close(tools.X, tools.X + 1))
        else:
            wrong = case._replace(run=lambda: None)
        assert tools.verdict(wrong) != case.result


def test_the_page_holds_a_row_for_every_case() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    rows = text.split(table.BEGIN)[1].split(table.END)[0].splitlines()
    cases = [line for line in rows if line.startswith("| ")][1:]
    assert sorted(cases) == sorted(case.row for case in tools.CASES)  # imported in any order
