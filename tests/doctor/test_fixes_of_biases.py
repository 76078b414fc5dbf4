"""A bias is dropped by what the batches show of its layer, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.doctor.fixes import Fixed, fix


class TwoAxes(nn.Module):
    """(N, L, C): one batch norm acts on C, by way of transposes, the other one on L."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.right = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.wrong = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.right(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.wrong(self.second(y))


def fixed(model: nn.Module, batches: list[Tensor] | None) -> Fixed:
    return fix(model, sn.diagnose(model, batches), batches)


def test_a_bias_before_a_norm_along_another_axis_stays() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 6, 4).double() for _ in range(4)]
    model = TwoAxes().double()
    for batch in 10 * batches:
        model(batch)
    model.eval()
    mended = fixed(model, batches)
    assert mended.model.first.bias is None
    assert mended.model.second.bias is not None
    expected, found = model(batches[0]), mended.model(batches[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv1d(4, 6, 1)])
def test_without_batches_a_linear_layer_keeps_its_bias(layer: nn.Module) -> None:
    model = nn.Sequential(layer, nn.BatchNorm1d(6), nn.ReLU())
    change = fixed(model, None).changes[0]
    linear = isinstance(layer, nn.Linear)
    assert change.what == ("left" if linear else "dropped")
    assert ("without batches nobody knows on which axis" in change.why) is linear
