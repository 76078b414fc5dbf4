"""The benchmark: what is timed, what the tables and files say of it."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("altair", reason="charts need the extra lab")

from steadynorm.cli import app
from steadynorm.evidence.bench import clock, networks, results
from steadynorm.evidence.bench.contenders import available
from steadynorm.evidence.bench.measure import Measurement, measure
from steadynorm.evidence.bench.results import charts, rows, tables, write
from steadynorm.evidence.bench.workloads import SMALL, Workload, workloads
from steadynorm.report.page import Table

TRAINING = Workload("small", (8, 4, 2, 2), "nchw", "float32", "bn+add+relu", True)


def measured(shape, contender, copies, load=TRAINING):
    """Measurements of all directions, forward a quarter of the time."""
    shares = {"forward": 0.25, "backward": 0.75, "both": 1.0} if load.training else {"forward": 1}
    return [
        Measurement(load._replace(shape=shape), contender, direction, 1.0, copies * share,
                    copies * share / 2, copies * share * 2, copies * share / 3.5)
        for direction, share in shares.items()
    ]  # fmt: skip


FOUND = [
    *measured((8, 4, 2, 2), "ours", 2.0),
    *measured((8, 4, 2, 2), "eager", 6.0),
    *measured((2, 4, 2, 2), "ours", 1.0),
    *measured((2, 4, 2, 2), "eager", 2.0),
    *measured((2, 4, 2, 2), "ours", 1.0, TRAINING._replace(training=False)),
    *measured((2, 4, 2, 2), "eager", 5.0, TRAINING._replace(training=False)),
]


@pytest.mark.parametrize("training", [True, False])
def test_every_contender_is_timed_in_every_direction(training):
    ticks = []
    load = TRAINING._replace(training=training)
    found = list(measure(load, ["ours", "eager"], 4, lambda: ticks.append(1)))
    directions = ["forward", "backward", "both"] if training else ["forward"]
    assert [(m.contender, m.direction) for m in found] == [
        (name, direction) for name in ("ours", "eager") for direction in directions
    ]
    assert len(ticks) == 4
    limits = {"forward": 1.5, "backward": 2.0, "both": 3.5}
    for m in found:
        assert m.workload == load
        assert m.milliseconds > 0
        assert m.low <= m.copies <= m.high
        assert m.of_limit == pytest.approx(m.copies / limits[m.direction])


class Event:
    """An event of an accelerator whose queue is 5 ms behind the host."""

    queue: list = []
    done = False

    def __init__(self, device, enable_timing):
        assert enable_timing
        assert device == torch.device("cuda")

    def record(self):
        self.at = 5.0 + 2.0 * len(self.queue)
        self.queue.append(self)

    def elapsed_time(self, end):
        assert Event.done, "asked before the device was done"
        return end.at - self.at


def test_on_an_accelerator_events_are_read_after_the_last_call(monkeypatch):
    def synchronize(device):
        Event.done = True

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    device = torch.device("cuda")
    laps = []
    for _ in range(2):
        start, middle, end = (clock.mark(device) for _ in range(3))
        laps.append((start, middle, end))
    assert clock.seconds_of(laps, device) == [(0.002, 0.002), (0.002, 0.002)]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="--device cuda: PyTorch sees cpu alone"):
        clock.check_device("cuda")


def test_contenders_run_where_they_can():
    names = ["ours", "given", "eager", "compile", "graph"]
    assert available(names) == ["ours", "given", "eager", "compile"]
    assert available(names, "cuda") == ["ours", "eager", "compile", "graph"]


def test_only_positions_have_layouts():
    found = list(workloads(["small"], ["bn"], ["nchw", "nhwc"], ["float32"], ["training"]))
    shapes = [load.shape for load in found if load.layout == "nhwc"]
    assert shapes == [shape for shape in SMALL if len(shape) == 4]
    assert len(found) == len(SMALL) + len(shapes)


def test_tables_compare_ours_with_the_others():
    training, inference = tables(FOUND)
    assert training.title == "bn+add+relu, training, small, nchw, float32"
    assert list(training.columns) == [
        "shape", "ours, forward", "ours, backward", "eager, both", "ours against eager"
    ]  # fmt: skip
    assert [list(row) for row in training.rows] == [
        ["8x4x2x2", 0.5, 1.5, 6.0, "3.00x"],
        ["2x4x2x2", 0.25, 0.75, 2.0, "2.00x"],
        ["geometric mean", None, None, None, "2.45x"],
        ["lowest", None, None, None, "2.00x"],
    ]
    assert "least memory traffic: 3.5 copies (forward + backward)" in training.note
    assert list(inference.rows[0]) == ["2x4x2x2", 1.0, 5.0, "5.00x"]


@pytest.mark.parametrize("names", [["eager"], ["given", "eager"], ["ours", "given"]])
def test_where_there_is_nothing_to_compare_with_there_are_times_alone(names):
    found = [m for name in names for m in measured((8, 4, 2, 2), name, 2.0)]
    (table,) = tables(found)
    assert [row[0] for row in table.rows] == ["8x4x2x2"]
    assert not any("against" in column for column in table.columns)
    assert table.rows[0][-1] == (1.5 if names[-1] == "given" else 2.0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--suites small --shapes a", "must be a comma-separated list of 0, 1, "),
        ("--suites unet3d --shapes 9", "steadynorm bench: what is asked for leaves nothing to mea"),
        ("--suites small --contenders graph", "left out, not for cpu or not installed: graph"),
        ("--suites small --contenders graph", "steadynorm bench: what is asked for leaves nothing"),
        ("--suites networks", "steadynorm bench: --suites networks needs no_such_package: pip"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(monkeypatch, tmp_path, arguments, told):
    monkeypatch.setattr(networks, "PACKAGES", ("no_such_package",))
    words = ["bench", *arguments.split(), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", ["bench --suites small", "tour"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_done(monkeypatch, tmp_path, words):
    (tmp_path / "file").touch()
    for module in ("bench.measure.measure", "tour.visit.run"):
        monkeypatch.setattr(f"steadynorm.evidence.{module}", None)  # nothing may be done by it
    result = CliRunner().invoke(app, [*words.split(), "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert "cannot be written" in result.output


def test_an_interrupted_warmup_ends_in_one_line(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("steadynorm.kernels.cpu.kernels.warmup", interrupted)
    result = CliRunner().invoke(app, ["warmup"])
    assert result.exit_code == 130
    assert "warmup: interrupted; what was compiled stays on disk.\n" in result.output


def test_charts_show_the_whole_step():
    training, _ = charts(FOUND)
    points = next(rows for rows in training.spec["datasets"].values() if len(rows) > 1)
    assert [(p["shape"], p["contender"], p["copies"]) for p in points] == [
        ("8x4x2x2", "ours", 2.0), ("8x4x2x2", "eager", 6.0),
        ("2x4x2x2", "ours", 1.0), ("2x4x2x2", "eager", 2.0),
    ]  # fmt: skip


def test_files_hold_every_measurement_and_the_machine(tmp_path, monkeypatch):
    machine = {"processor": "one", "commit": "abc"}
    table = Table("N", ("network", "faster"), [("net", "2.00x")])
    paths = write(tmp_path, FOUND, machine, table)
    assert [path.name for path in paths] == ["bench.csv", "bench.json", "bench.html"]
    monkeypatch.setattr(results, "PICTURES", ("a package that nobody has",))
    assert write(tmp_path, FOUND, machine, table) == paths[:2]
    record = json.loads(paths[1].read_text())
    assert record["machine"] == machine
    assert record["measurements"] == rows(FOUND, machine)
    assert record["networks"] == [{"network": "net", "faster": "2.00x"}]
    assert record["measurements"][2] == {
        "suite": "small", "shape": "8x4x2x2", "layout": "nchw", "dtype": "float32",
        "case": "bn+add+relu", "mode": "training", "contender": "ours", "direction": "both",
        "milliseconds": 1.0, "copies": 2.0, "copies_low": 1.0, "copies_high": 4.0,
        "of_limit": 0.571, **machine,
    }  # fmt: skip
    with paths[0].open() as stream:
        assert len(list(csv.DictReader(stream))) == len(FOUND)
    page = paths[2].read_text()
    assert page.count("<caption") == 3
