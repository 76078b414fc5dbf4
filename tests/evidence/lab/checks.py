"""An experiment from end to end on short runs, its verdict recomputed from the findings alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from markupsafe import escape

from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.experiment import Experiment
from steadynorm.evidence.lab.report import SavedResults, findings
from steadynorm.evidence.lab.runs import Setting
from steadynorm.evidence.lab.store import Store, plain, read
from steadynorm.report.page import Page, Section

SEEDS = 2


def runs_from_end_to_end(
    experiment: Experiment, settings: Sequence[Setting], digits: Digits, folder: Path
) -> None:
    """Run, store, read back, judge, and show on a page."""
    profiles = {"quick": settings, "full": settings}
    small = replace(experiment, settings=profiles, seeds=dict.fromkeys(profiles, SEEDS))
    store = Store(folder, "digits")
    planned = small.planned("quick")
    results = []
    for run in planned:
        ticks: list[int] = []
        result = small.execute(run.setting, run.seed, digits, ticks.append)
        assert 0 <= sum(ticks) <= run.steps
        store.put(small, run, result)
        results.append(plain(result))
    if not experiment.timed:
        last = planned[-1]
        again = small.execute(last.setting, last.seed, digits, lambda steps: None)
        assert plain(again) == results[-1], "the same setting and seed give the same run"
    head, back = read(store.finish(small, "quick", planned))
    assert [run.result for run in back] == results
    check_verdict(head["verdict"])
    shown = experiment.figures(back)
    tables = [findings(SavedResults(head, back, experiment)), *shown.tables]
    page = Page("T", [Section("S", shown.text, tables, shown.charts)]).html()
    assert page.count("<caption") == len(tables) > 1
    assert page.count("<figure") == len(shown.charts)
    for found in head["verdict"]["findings"]:
        assert f'<th scope="row">{escape(found["words"])}</th>' in page
        assert f">{escape(found['expected'])}<" in page


def check_verdict(verdict: dict[str, Any]) -> None:
    """The verdict follows from the findings, and each finding from its interval and its bounds."""
    answers = []
    for found in verdict["findings"]:
        assert found["seeds"] == SEEDS
        low, value, high = found["low"], found["value"], found["high"]
        assert low <= value <= high
        bounds = {"above": -math.inf, "below": math.inf}
        for side, bound in re.findall(r"(above|below) (\S+)", found["expected"]):
            bounds[side] = float(bound)
        assert len(set(bounds.values()) - {-math.inf, math.inf}) >= 1
        inside = bounds["above"] < low and high < bounds["below"]
        outside = high <= bounds["above"] or bounds["below"] <= low
        answers.append("yes" if inside else "no" if outside else "open")
        assert found["holds"] == answers[-1], found
    expected = {
        (True, False, False): "supported",
        (False, True, False): "not supported here",
        (True, True, False): "mixed",
        (True, True, True): "mixed",
        (False, True, True): "not supported here",
        (True, False, True): "undecided",
        (False, False, True): "undecided",
    }
    seen = tuple(answer in answers for answer in ("yes", "no", "open"))
    assert verdict["outcome"] == expected[seen]
    assert verdict["sentence"].endswith(".")
    assert not re.search(r"\b(nan|inf|None)\b", verdict["sentence"])
