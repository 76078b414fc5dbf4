"""The tour: what it shows, what it writes, and that it repeats."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from markupsafe import escape
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.evidence.tour.demo import Demo, DemoResult, TourOptions
from steadynorm.evidence.tour.demos import DEMOS
from steadynorm.evidence.tour.visit import run
from steadynorm.evidence.training import Recipe, execute
from steadynorm.evidence.workers import Job
from steadynorm.report.page import Table

for needed in ("sklearn", "altair", "vl_convert"):
    pytest.importorskip(needed, reason="the tour needs the extra lab")


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """The short tour, as a visitor takes it: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("tour") / "out"
    command = [sys.executable, "-m", "steadynorm.cli", "tour", "--short", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder, done.stdout


@pytest.fixture(scope="module")
def record(visited):
    return json.loads((visited[0] / "report.json").read_text("utf-8"))


def error(record, policy, together, measure="error"):
    (run,) = (
        run
        for run in record["stops"]["small-batches"]["runs"]
        if (run["policy"], run["together"]) == (policy, together)
    )
    (value,) = run[measure]
    return value


def test_at_batch_64_ours_trains_as_torchs_does(record):
    stop = record["stops"]["drop-in"]
    assert stop["largest_loss_difference"] < 1e-3
    runs = {run["normalization"]: run for run in stop["runs"]}
    assert runs["steadynorm"]["accuracy"] == pytest.approx(runs["torch.nn"]["accuracy"], abs=0.01)
    assert runs["steadynorm"]["accuracy"] > 0.9
    assert runs["steadynorm"]["points"][0]["loss"] > runs["steadynorm"]["points"][-1]["loss"]


@pytest.mark.parametrize("measure", ["error", "error_calibrated"])
def test_ten_sigmoid_layers_need_a_normalization_that_holds(record, measure):
    assert error(record, "none", 64, measure) > 80
    assert error(record, "Batch", 64, measure) < 15
    assert error(record, "Batch", 2, measure) > 80
    for together in (64, 2, 1):
        assert error(record, "Steady", together, measure) < 20  # one seed, a short run


def test_the_doctor_names_the_batch_and_its_advice_holds(record):
    (run_of,) = record["stops"]["doctor"]["runs"]
    before, after = ([f["code"] for f in run_of[when]] for when in ("before", "after"))
    assert before[0] == "SN303"  # the cause comes first
    assert "SN302" in before
    assert "SN302" not in after  # what is safe was done
    assert len(run_of["done"]) == 3
    accuracy = run_of["accuracy"]
    # After so few steps new statistics gain or lose a few of 360 digits, by the processor; the cure
    # is called safe, so it must not lose more than two standard errors, 2·√(0.25/360).
    assert accuracy["cured"] > accuracy["as_it_was"] - 0.053
    assert 1 - accuracy["advised"] < (1 - accuracy["as_it_was"]) / 3


def test_the_folded_network_gives_the_same_answers(record):
    (run_of,) = record["stops"]["folding"]["runs"]
    assert run_of["layers"] == 3
    assert [change["what"] for change in run_of["changes"]] == ["folded"] * 3
    assert run_of["same_answers"] == run_of["digits"] == 360
    assert 0 < run_of["logit_difference"] < 1e-5 * run_of["logit"]
    assert run_of["accuracy"] > 0.9
    for seconds in run_of["seconds"].values():
        assert list(seconds) == ["torch.nn", "steadynorm", "folded"]
        assert all(value > 0 for values in seconds.values() for value in values)


def test_the_timed_steps_train_alike(record):
    (run_of,) = record["stops"]["speed"]["runs"]
    done = [change["what"] for change in run_of["changes"]]
    assert sorted(done) == ["converted"] * 3 + ["fused"] * 3
    theirs, ours = run_of["losses"].values()
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[-1] < ours[0]
    assert {len(values) + 2 for values in run_of["seconds"].values()} == {len(ours)}


def test_demonstrations_that_take_times_run_alone():
    for demo in DEMOS:
        timed = demo.name in {"folding", "speed"}
        assert {job.alone for job in demo.jobs(TourOptions(None, (0,), True))} == {timed}


def test_the_terminal_shows_tables_and_where_the_report_is(visited):
    folder, printed = visited
    for words in (
        "scikit-learn digits, 8×8: 1,437 to train on, 360 to test on",
        "A small convolutional network, batch 64",
        "Batch cannot train",
        "Two at a time:",
        "report.html",
    ):
        assert words in printed
    assert sorted(entry.name for entry in folder.iterdir()) == ["report.html", "report.json"]


def test_the_page_holds_every_demonstration(visited):
    page = (visited[0] / "report.html").read_text("utf-8")
    for demo in DEMOS:
        assert f"{escape(demo.title)}</h2>" in page
    assert "http-equiv" in page


def small_jobs(options):
    recipe = Recipe(4, 80, points=2)
    return [
        Job(
            "small", (name, seed), 20, execute,
            ("fully connected", name, recipe, options.data_dir, seed),
        )
        for name in ("steady", "torch")
        for seed in options.seeds
    ]  # fmt: skip


def small_result(options, outcomes):
    rows = [(name, seed, run.error) for (name, seed), run in sorted(outcomes.items())]
    runs = [run.record() for _, run in sorted(outcomes.items())]
    table = Table("Small", ("policy", "seed", "error"), rows)
    return DemoResult.of("Small", "It is small.", table, figures={"runs": runs})


SMALL = Demo("small", "A small demonstration", small_jobs, small_result)


def test_the_same_seeds_give_the_same_figures_on_any_number_of_workers():
    setting = TourOptions(None, (5, 6), short=True)
    one, two = (run([SMALL], setting, workers=workers).record() for workers in (1, 2))
    one.pop("machine")
    two.pop("machine")
    assert one == two
    other = run([SMALL], TourOptions(None, (6, 7), short=True)).record()["stops"]["small"]
    mine = one["stops"]["small"]
    assert mine["runs"][1] == other["runs"][0], "a seed's run does not depend on the others"
    assert mine["runs"][0] != other["runs"][0]


def test_progress_is_reported_per_demonstration():
    begun, told = {}, {}
    run(
        [SMALL],
        TourOptions(None, (0,), short=True),
        begin=lambda demo, steps: begun.__setitem__(demo.name, steps),
        progress=told.__setitem__,
    )
    assert begun == told == {"small": 40}


def test_demonstrations_have_names_of_their_own_and_their_jobs_too():
    assert len({demo.name for demo in DEMOS}) == len(DEMOS)
    for short in (True, False):
        for demo in DEMOS:
            jobs = demo.jobs(TourOptions(None, (0, 1), short))
            assert {job.group for job in jobs} == {demo.name}
            assert len({job.key for job in jobs}) == len(jobs)


def test_json_is_all_that_stdout_holds(monkeypatch, tmp_path):
    monkeypatch.setattr("steadynorm.evidence.tour.demos.DEMOS", (SMALL,))
    words = ["tour", "--short", "--seed", "5", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert list(json.loads(done.stdout)["stops"]) == ["small"]
