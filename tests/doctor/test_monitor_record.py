"""A monitor's record is what JSON can hold."""

from __future__ import annotations

import json

import torch
from torch import nn

import steadynorm as sn


def test_a_record_with_infinities_is_json():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    with sn.monitor(model, every=1) as watch:
        model(torch.full((4, 4), float("inf"))).sum().mul(float("inf")).backward()
    text = json.dumps(watch.record(), allow_nan=False)
    first = json.loads(text)["readings"][0]
    assert (first["shift"], first["nonfinite"]) == (None, 6)
    reading = watch.readings[0]
    watch._readings[0] = reading._replace(gradient=float("inf"), ratio=-float("inf"))
    first = json.loads(json.dumps(watch.record(), allow_nan=False))["readings"][0]
    assert (first["gradient"], first["ratio"]) == ("inf", "-inf")
