"""Batches of every kind stay as they are; those that draw nothing or vary in nothing."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tests.doctor.test_measure import data, seen
from torch import Tensor, nn

from steadynorm.doctor.diagnosis import judge
from steadynorm.doctor.evidence import chance


@dataclass(frozen=True)
class Sample:
    x: Tensor
    name: str = "a"


@pytest.mark.parametrize("kind", [dict, UserDict, MappingProxyType, lambda named: Sample(**named)])
def test_a_model_writes_into_no_batch_of_any_kind(kind: Any) -> None:
    """Hugging Face's batches are UserDicts; a batch is read more than once."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.norm(x.add_(1))
            return result

    inputs = [torch.randn(16, 4) for _ in range(3)]
    before = torch.cat(inputs)
    given = [kind({"x": x}) for x in inputs]
    forward = (lambda model, batch: model(batch.x)) if isinstance(given[0], Sample) else None
    found = data(seen(Writes(), given, forward=forward))
    assert torch.equal(torch.cat(inputs), before)
    np.testing.assert_allclose(found.mean, before.double().mean(0) + 1, rtol=1e-5, atol=1e-6)


def test_where_nothing_varies_batches_do_not_scatter() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    model[0].bias.data.fill_(-1e6)  # all units are dead
    evidence = seen(model, [torch.randn(16, 4) for _ in range(8)])
    assert data(evidence).effective is None
    assert "SN309" not in [finding.code for finding in judge(evidence).findings]


def test_numbers_drawn_on_a_mac_are_seen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(torch.zeros(4, dtype=torch.uint8) + number for number in (0, 0, 1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: next(states))
    first, second, third = (chance._random_state() for _ in range(3))
    assert first == second != third
