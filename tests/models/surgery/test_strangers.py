"""Batch norms with a forward of their own that computes something else are left as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.models.surgery.test_convert import BatchNormAct2d
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.convert import convert


class AbsoluteBatchNorm2d(nn.BatchNorm2d):
    """Named and built like a batch norm, but something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


class GhostBatchNorm2d(nn.BatchNorm2d):
    """In inference a batch norm; in training it normalizes each half of the batch by itself."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(2) if self.training else (x,)
        return torch.cat([super(GhostBatchNorm2d, self).forward(part) for part in parts])


class BiasedBatchNorm2d(nn.BatchNorm2d):
    """Normalizes as a batch norm does, and keeps the biased variance."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.running_var.clone()
        y = super().forward(x)
        if self.training:
            self.running_var.copy_(0.9 * before + 0.1 * x.var((0, 2, 3), unbiased=False))
        return y


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (AbsoluteBatchNorm2d(4), "AbsoluteBatchNorm2d has its own forward, and it is not a"),
        (GhostBatchNorm2d(4), "GhostBatchNorm2d has its own forward, and in training it is not a"),
        (BiasedBatchNorm2d(4), "BiasedBatchNorm2d has its own forward, and in training it is not"),
        (BatchNormAct2d(4, nn.PReLU()), "applies PReLU(num_parameters=1), which is not one of our"),
        (BatchNormAct2d(4, nn.LeakyReLU(0.1)), "which is not one of our activations"),
    ],
)
def test_strangers_are_left_and_named(layer: nn.Module, why: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    random_state = torch.get_rng_state()
    result, changes = convert(nn.Sequential(layer))
    assert type(result[0]) is type(layer)
    assert changes.tally() == {"left": 1}
    assert why in changes[0].why
    assert layer.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in result[0].state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_look_alike_is_known_in_every_type(dtype: torch.dtype) -> None:
    layer = BatchNormAct2d(4).to(dtype)
    before = copy.deepcopy(layer.state_dict())
    result, _ = convert(nn.Sequential(layer))
    assert isinstance(result[0], sn.BatchNorm2d)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_look_alike_with_a_dropout_is_left() -> None:
    """timm's `BatchNormAct2d(drop_layer=...)`."""
    layer = BatchNormAct2d(3)
    layer.drop = nn.Dropout(0.5)
    result, changes = convert(nn.Sequential(layer))
    assert type(result[0]) is BatchNormAct2d
    assert (
        changes.left[0].why
        == "BatchNormAct2d also applies its `drop`, Dropout(p=0.5, inplace=False)"
    )
