"""Intervals, findings, verdicts, stored numbers; every experiment is declared as it should be."""

from __future__ import annotations

import json
import math
import pickle

import numpy as np
import pytest

pytest.importorskip("altair", reason="charts need the extra lab")

from steadynorm.evidence import estimates
from steadynorm.evidence.estimates import Estimate
from steadynorm.evidence.lab import figures
from steadynorm.evidence.lab.experiment import canonical
from steadynorm.evidence.lab.experiments import NAMES, every, get
from steadynorm.evidence.lab.runs import FinishedRun, Runs, grid
from steadynorm.evidence.lab.store import plain
from steadynorm.evidence.lab.verdict import expect, judge


@pytest.mark.parametrize("count", [2, 5, 40])
def test_a_mean_has_students_interval(count):
    stats = pytest.importorskip("scipy.stats", reason="comes with scikit-learn")
    values = np.random.default_rng(0).normal(3, 2, count).tolist()
    found = estimates.mean(values)
    low, high = stats.t.interval(0.95, count - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found.value == pytest.approx(np.mean(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=2e-3)
    assert found.seeds == count


def test_differences_and_ratios_are_paired():
    first, second = [1.0, 10.0, 100.0], [0.5, 5.0, 50.0]
    assert estimates.ratio(first, second) == pytest.approx((2, 2, 2, 3))
    found = estimates.difference(first, second)
    assert found.value == pytest.approx(np.mean([0.5, 5, 50]))
    with pytest.raises(ValueError, match=r"^ratio: `second` must be above 0; got 0\.0\.$"):
        estimates.ratio([1.0], [0.0])
    with pytest.raises(ValueError, match="shorter"):
        estimates.difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("low", "high", "bounds", "holds"),
    [
        (2.1, 3.0, {"above": 2}, "yes"),
        (2.0, 3.0, {"above": 2}, "open"),  # the bound itself is not above it
        (1.0, 2.0, {"above": 2}, "no"),
        (1.0, 1.9, {"below": 2}, "yes"),
        (2.0, 3.0, {"below": 2}, "no"),
        (-0.9, 0.9, {"above": -1, "below": 1}, "yes"),
        (-1.5, 0.9, {"above": -1, "below": 1}, "open"),
        (1.5, 1.9, {"above": -1, "below": 1}, "no"),
    ],
)
def test_a_finding_goes_by_the_whole_interval(low, high, bounds, holds):
    assert expect("x", Estimate((low + high) / 2, low, high, 5), **bounds).holds == holds


def test_one_seed_decides_nothing():
    assert expect("x", estimates.mean([9.0]), above=2).holds == "open"


def test_a_finding_needs_a_bound():
    with pytest.raises(ValueError, match=r"`above` or `below` must be given"):
        expect("x", estimates.mean([9.0]))


@pytest.mark.parametrize(
    ("holds", "outcome"),
    [
        ("yy", "supported"),
        ("nn", "not supported here"),
        ("yn", "mixed"),
        ("yo", "undecided"),
        ("oo", "undecided"),
        ("no", "not supported here"),
        ("yno", "mixed"),
    ],
)
def test_the_verdict_follows_from_the_findings(holds, outcome):
    spans = {"y": (3.0, 4.0), "n": (0.0, 1.0), "o": (1.0, 3.0)}
    findings = [
        expect(letter, Estimate(2.0, *spans[letter], 5 + index), above=2)
        for index, letter in enumerate(holds)
    ]
    verdict = judge("So it is.", findings)
    assert verdict.outcome == outcome
    assert verdict.seeds == 5
    assert verdict.record()["findings"][0]["words"] == holds[0]


def test_runs_are_found_by_factor_and_paired_by_seed():
    runs = Runs(
        FinishedRun({"batch": batch}, seed, {"error": batch + seed / 10})
        for seed in (2, 0, 1)
        for batch in (2, 8)
    )
    assert runs.values("error", batch=8) == [8.0, 8.1, 8.2]
    assert runs.distinct("batch") == [2, 8]
    assert runs.seeds == [0, 1, 2]
    assert len(runs.where(batch=2, policy="batch")) == 0
    with pytest.raises(ValueError, match=r"must leave one run for each seed; got 6 runs of 3"):
        runs.values("error")
    with pytest.raises(ValueError, match="got 0 runs of 0 seeds"):
        runs.values("error", batch=9)


def test_settings_are_compared_seed_by_seed():
    runs = Runs(
        FinishedRun({"batch": batch, "rate": 1}, seed, {"error": float(batch * (seed + 1))})
        for seed in (1, 0, 2)
        for batch in (2, 8)
    )
    assert runs.mean("error", batch=2)[:1] == (4.0,)
    assert runs.ratio("error", "batch", 8, 2, rate=1) == pytest.approx((4, 4, 4, 3))
    found = runs.difference("error", "batch", 8, 2)
    assert found == pytest.approx(estimates.mean([6.0, 12.0, 18.0]))
    twice = runs.derived(twice=lambda run: 2 * run["error"])
    assert twice.values("twice", batch=8) == [16.0, 32.0, 48.0]
    assert twice.values("error", batch=8) == [8.0, 16.0, 24.0]


def test_a_grid_varies_the_last_factor_fastest():
    assert grid(a=(1, 2), fixed="x", b=range(2)) == [
        {"a": a, "fixed": "x", "b": b} for a in (1, 2) for b in (0, 1)
    ]


def rows_of(chart):
    (rows,) = chart.spec["datasets"].values()
    return rows


def test_a_chart_takes_numbers_and_lists():
    runs = Runs(
        FinishedRun({"kind": kind}, 0, {"rate": 3.0, "at": [1, 2, 3], "error": error})
        for kind, error in (("a", [4.0, None, 0.0]), ("b", [5.0, 6.0, 7.0]))
    )
    options = {"x": "at", "y": "error", "series": "kind", "names": {"a": "A"}}
    rows = rows_of(figures.chart("T", runs, **options))
    assert [(row["kind"], row["at"], row["error"]) for row in rows] == [
        ("A", 1, 4.0), ("A", 3, 0.0), ("b", 1, 5.0), ("b", 2, 6.0), ("b", 3, 7.0),
    ]  # fmt: skip
    assert len(rows_of(figures.chart("T", runs, **options, log_y=True))) == 4
    single = figures.chart("T", runs, x="rate", y="rate", series=lambda run: run["kind"] * 2)
    first, second = rows_of(single)
    assert first == {"series": "aa", "seed": 0, "rate": 3.0}
    assert second["series"] == "bb"


def test_numbers_are_stored_short_and_strict():
    found = plain({"a": (1 / 3, -math.inf, 3e-45), "b": {"c": [True, None, "x", 12345678]}})
    assert found == {"a": [0.333333, None, 3e-45], "b": {"c": [True, None, "x", 12345678]}}
    with pytest.raises(TypeError, match=r"a result must hold dicts, lists, .*; got ndarray"):
        plain({"a": np.zeros(3)})


def test_the_target_must_be_held_for_two_looks():
    assert figures.first_reaching([1, 2, 3], [0.2, 0.95, 0.95], 0.9) == 2
    assert figures.first_reaching([1, 2, 3], [0.95, 0.2, 0.3], 0.9) is None
    assert figures.first_reaching([1, 2, 3], [0.1, 0.2, 0.9], 0.9) == 3
    assert figures.first_reaching([], [], 0.9) is None


def test_a_table_has_a_dash_where_a_run_has_no_figure():
    runs = Runs(
        FinishedRun({"policy": policy, "batch": batch}, seed, {"error": error})
        for seed in (0, 1)
        for policy, batch, error in (
            ("a", 1, None if seed else 3.0), ("a", 2, 2.0), ("b", 2, 4.0 + seed),
        )
    )  # fmt: skip
    found = figures.table(
        "T", runs, rows="policy", columns="batch", measure="error", times=10,
        names={"a": "A"}, corner="which",
    )  # fmt: skip
    assert list(found.columns) == ["which", "1", "2"]
    assert [list(row) for row in found.rows] == [
        ["A", "–", "20.0 ± 0.0"],
        ["b", "–", "45.0 ± 63.5"],  # 5·√2·12.706/√2
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_declared(name):
    experiment = get(name)
    assert experiment.name == name.replace("_", "-")
    for words in (experiment.claim, experiment.rule, experiment.measure):
        assert words.endswith((".", "%")), words
    assert experiment.factors
    assert experiment.source
    assert pickle.loads(pickle.dumps(experiment)) == experiment, "workers are sent it"
    for profile in ("quick", "full"):
        planned = experiment.planned(profile)
        assert len({run.key(experiment, "data") for run in planned}) == len(planned) > 0
        assert all(run.steps > 0 for run in planned)
        assert len({tuple(run.setting) for run in planned}) == 1, "every setting has all factors"
        json.loads(canonical([run.setting for run in planned]))
    for profile, least in (("quick", 2), ("full", 5)):  # one seed decides nothing
        for setting in experiment.settings[profile]:  # `networks` train side by side in a run
            assert experiment.seeds[profile] * setting.get("networks", 1) >= least, setting


def test_names_are_accepted_in_both_spellings():
    assert get("learning-rate-range") is get("learning_rate_range")
    with pytest.raises(ValueError, match=r"`name` must be one of convergence, .*; got 'depth'\."):
        get("depth")
    assert [experiment.name.replace("-", "_") for experiment in every()] == list(NAMES)
