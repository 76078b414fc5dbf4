"""The report says how far the statistics were off."""

import json

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.models.report import CalibrationReport, LayerReport


def test_distances_are_in_measured_standard_deviations() -> None:
    x = torch.tensor([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])  # std 2 and √300
    layer = nn.BatchNorm1d(2, eps=0.0)
    layer.running_mean.copy_(torch.tensor([9.0, 20.0]))
    layer.running_var.copy_(torch.tensor([1.0, 300.0]))
    report = sn.calibrate(layer, [x], progress=False)
    (row,) = report.layers
    assert (row.name, row.kind, row.status, row.values) == (
        "(model)",
        "BatchNorm1d",
        "calibrated",
        3,
    )
    assert row.mean_shift == pytest.approx((3**2 / 2) ** 0.5)
    assert row.mean_shift_max == pytest.approx(3)
    assert row.std_ratio == pytest.approx(0.5**0.5)
    again = sn.calibrate(layer, [x], progress=False).layers[0]
    assert again.mean_shift == pytest.approx(0, abs=1e-6)
    assert again.std_ratio == pytest.approx(1, abs=1e-6)


def test_it_prints_as_a_table_and_reads_as_json() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), sn.BatchNorm1d(2, statistics="frozen"))
    report = sn.adapt(model, [torch.ones(1500, 2)], prior=4, progress=False)
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert lines[1].split() == [
        "0",
        "BatchNorm1d",
        "adapted",
        "1,500",
        "316.228",
        "316.228",
        "316.229",
    ]
    assert lines[2].split() == ["1", "BatchNorm1d", "left:", "frozen"]
    record = json.loads(report.to_json())
    assert record == report.to_dict()
    assert record["prior"] == 4
    assert record["batches"] == 1
    assert record["passes"] == 1
    assert record["layers"][1]["mean_shift"] is None
    assert record["layers"][0]["values"] == 1500


def test_records_are_frozen() -> None:
    row = LayerReport("bn", "BatchNorm1d", "left", "frozen")
    report = CalibrationReport((row,), 0, 0, None)
    assert report.left == (row,)
    assert report.moved == ()
    with pytest.raises(AttributeError):
        row.values = 3
    with pytest.raises(AttributeError):
        report.batches = 3


def test_the_bar_shows_on_terminals_only(capfd: pytest.CaptureFixture[str]) -> None:
    sn.calibrate(nn.BatchNorm1d(2), [torch.ones(2, 2)], progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_bar_counts_batches(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    sn.calibrate(model, [torch.ones(2, 2)] * 3, passes="layerwise", progress=True)
    shown = capfd.readouterr().err
    assert "calibrate" in shown
    assert "6/6" in shown
    sn.calibrate(model, (torch.ones(2, 2) for _ in range(3)), progress=True)
    assert "3/?" in capfd.readouterr().err
