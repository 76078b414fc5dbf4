"""The results in the documentation are those of the experiments as they are declared now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("altair", reason="charts need the extra lab")

from steadynorm.evidence.lab.experiments import every, get
from steadynorm.evidence.lab.store import declaration, plain, read

DOCS = Path(__file__).resolve().parents[3] / "docs"
PATHS = sorted((DOCS / "lab" / "results").glob("*.json"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_saved_verdict_follows_from_the_saved_runs(path):
    head, runs = read(path)
    experiment = get(head["experiment"])
    assert path.name == f"{experiment.name}{'.timed' if experiment.timed else ''}.json"
    assert head["profile"] == "full"
    assert head["revision"] == experiment.revision
    assert {name: head[name] for name in declaration(experiment)} == declaration(experiment)
    assert plain(experiment.verdict(runs).record()) == head["verdict"]
    assert head["verdict"]["seeds"] >= 5
    wanted = [(dict(planned.setting), planned.seed) for planned in experiment.planned("full")]
    assert [(run.setting, run.seed) for run in runs] == wanted
    page = (DOCS / "lab.md").read_text("utf-8")
    assert head["verdict"]["sentence"] in page, "python benchmarks/lab_page.py"


def test_every_experiment_has_results():
    assert {path.name.split(".")[0] for path in PATHS} == {one.name for one in every()}


def test_the_committed_results_are_small():
    assert sum(path.stat().st_size for path in PATHS) < 2_000_000
    for path in PATHS:
        json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)
