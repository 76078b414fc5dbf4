"""Compiled networks call the CPU kernels, with the values and gradients of eager."""

import copy

import pytest
import torch

import steadynorm as sn
from steadynorm.kernels import aten
from steadynorm.kernels.cpu import operators
from steadynorm.kernels.cpu import stages as cpu
from steadynorm.kernels.cpu.kernels import SCALARS

SHAPE = (6, 5, 7, 3)


def gradients(call, layer, dtype, *, residual, mask):
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(SHAPE, generator=random) * 3 + 2).to(dtype).requires_grad_()
    extra = torch.randn(SHAPE, generator=random).to(dtype).requires_grad_() if residual else None
    valid = torch.rand(6, 7, 3, generator=random) > 0.4 if mask else None
    grad = torch.randn(SHAPE, generator=random).to(dtype)
    y = call(x, residual=extra, mask=valid)
    wanted = [t for t in (x, extra, *layer.parameters()) if t is not None]
    return [y, *torch.autograd.grad(y, wanted, grad), *layer.buffers()]


AROUND = [
    (None, False, False, torch.float32),
    ("relu", True, False, torch.float32),
    ("relu", True, False, torch.float16),
    ("gelu", True, True, torch.float32),
]
# The gradient of a channel is a sum of values that float16 has rounded.
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize(
    "policy", [sn.Batch(), sn.Steady(window=None), sn.Ghost(2), sn.Frozen()], ids=repr
)
@pytest.mark.parametrize(("activation", "residual", "mask", "dtype"), AROUND)
def test_the_kernels_run_and_agree_with_eager(
    policy, activation, residual, mask, dtype, monkeypatch
):
    if dtype not in SCALARS:
        pytest.skip(f"this processor does not convert {dtype}")
    monkeypatch.setattr(aten, "LIMIT", 0)
    layer = sn.BatchNorm2d(5, statistics=policy, activation=activation)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = gradients(layer, layer, dtype, residual=residual, mask=mask)
    ran = []
    for name in ("apply", "normalize_grad", "apply_grad"):
        stage = getattr(cpu, name)

        def spy(*arguments, name=name, stage=stage, **options):
            ran.append(name)
            return stage(*arguments, **options)

        monkeypatch.setattr(cpu, name, spy)
    found = gradients(compiled, twin, dtype, residual=residual, mask=mask)
    by_batch = not isinstance(policy, sn.Frozen)
    assert ran == ["apply", "normalize_grad" if by_batch and not mask else "apply_grad"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize("remembers", [False, True], ids=["one-way", "two-way"])
@pytest.mark.parametrize("groups", [None, [2, 4]])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
# Of opcheck itself, which from torch 2.14 on looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operators_are_what_torch_library_asks_of_them(activation, groups, remembers):
    """Schemas, aliases, fake results, and gradients under compilation."""
    torch.manual_seed(4)
    x, residual = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(5).requires_grad_() for _ in range(2))
    mask = torch.rand(6, 7, 3) > 0.3
    for valid in (None, mask):
        torch.library.opcheck(torch.ops.steadynorm.measure, (x.detach(), valid, groups))
        count, (mean, var, low) = torch.ops.steadynorm.measure(x.detach(), valid, groups)
        one = torch.ones_like(mean)
        parts, memory = [mean, low, var, one, 0 * one, one], None
        if remembers:
            parts, memory = [*parts[:5], 0.3 * one, 0.2 * one], torch.rand(2, *mean.shape)
        normalizer = torch.stack(parts)
        batch = torch.stack([count.expand_as(mean), mean, var, low])
        settings = (1e-5, activation, groups, None)
        given = (x, weight, bias, residual, valid, normalizer, batch, memory, *settings)
        torch.library.opcheck(torch.ops.steadynorm.apply, given)
        y = torch.ops.steadynorm.apply(*given).detach()
        detached = (t.detach() for t in (torch.randn(SHAPE), x, weight, bias, residual))
        torch.library.opcheck(
            torch.ops.steadynorm.gradients,
            (*detached, valid, y, normalizer, batch, memory, *settings, activation is not None),
        )


def test_a_failed_exchange_in_a_compiled_backward_says_what_to_look_at():
    with pytest.raises(RuntimeError, match=r"exchange of statistics .* Look at the first replica"):
        operators._Group("no such group").sum(torch.ones(2, 3))
