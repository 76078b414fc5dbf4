"""What the doctor says of a network that nobody trained yet."""

from __future__ import annotations

import torch
from torch import nn

import steadynorm as sn


def test_nothing_is_called_trained_where_nothing_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    data = [0.1 * torch.randn(64, 4) for _ in range(8)]
    report = sn.diagnose(model, data, loss=lambda output, _: output.square().mean())
    (finding,) = (f for f in report.findings if f.code == "SN101")
    assert "nothing in this model was trained yet" in finding.message
    assert "Nothing was trained yet: calibration alone would raise the loss" in finding.cure
    assert "weights were trained" not in finding.cure
