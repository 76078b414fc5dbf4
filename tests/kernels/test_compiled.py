"""Compiled networks call the CPU kernels, with the values and gradients of eager."""

import copy

import pytest
import torch

import steadynorm as sn
from steadynorm.kernels import choice, cpu

SHAPE = (6, 5, 7, 3)


def gradients(call, layer, *, residual, mask):
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(SHAPE, generator=random) * 3 + 2).requires_grad_()
    extra = torch.randn(SHAPE, generator=random).requires_grad_() if residual else None
    valid = torch.rand(6, 7, 3, generator=random) > 0.4 if mask else None
    grad = torch.randn(SHAPE, generator=random)
    y = call(x, residual=extra, mask=valid)
    wanted = [t for t in (x, extra, *layer.parameters()) if t is not None]
    return [y, *torch.autograd.grad(y, wanted, grad), *layer.buffers()]


AROUND = [(None, False, False), ("relu", True, False), ("gelu", True, True)]


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(), sn.Ghost(2), sn.Frozen()], ids=repr)
@pytest.mark.parametrize(("activation", "residual", "mask"), AROUND)
def test_the_kernels_run_and_agree_with_eager(policy, activation, residual, mask, monkeypatch):
    monkeypatch.setattr(choice, "NATIVE_LIMIT", 0)
    torch._dynamo.reset()
    layer = sn.BatchNorm2d(5, statistics=policy, activation=activation)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = gradients(layer, layer, residual=residual, mask=mask)
    cpu.calls.clear()
    found = gradients(compiled, twin, residual=residual, mask=mask)
    assert cpu.calls["apply"] == 1
    assert cpu.calls["normalize_grad"] + cpu.calls["apply_grad"] == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
