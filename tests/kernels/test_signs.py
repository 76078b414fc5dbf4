"""One bit for each output in place of the output: the same gradients, wherever strips end."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.cpu_cases import EDGES, EPS, F32, F64, HALVES, LAYOUTS, Case

import steadynorm as sn
from steadynorm.kernels.cpu import stages as cpu
from steadynorm.kernels.spec import Keep

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")

SHAPES = [*EDGES, (7, 3, 40, 40), (7, 50, 9, 11), (5, 3, 7, 7), (7, 5)]


def forward(case, activation, signs):
    return cpu.normalize(
        case.x, case.weight, case.bias, EPS, residual=case.residual, activation=activation,
        groups=case.groups, signs=signs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
@pytest.mark.parametrize("groups", [None, "two"])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_signs_tell_where_the_activation_is_open(activation, groups, dtype, way):
    for layout in LAYOUTS:
        for shape in SHAPES:
            parts = (shape[0] - 1, 1) if groups and shape[0] > 1 else None
            case = Case(shape, layout, dtype, groups=parts)
            case.residual.mul_(4)
            signs = cpu.empty_signs(case.x, case.groups)
            y, _ = forward(case, activation, signs)
            found = cpu.outputs_for(signs, case.x, case.groups)
            open_ = (y > 0) & (y < 6) if activation == "relu6" else y > 0
            assert torch.equal(found, open_.to(y.dtype)), (shape, layout)
            assert found.stride() == case.x.stride()


def sums_close(mine, other):
    """Thousands of values of size 1, added in float32 in two orders that the processor decides.

    A wrong sign would change a sum by a whole value.
    """
    torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
@pytest.mark.parametrize("groups", [None, (2, 3, 2)], ids=str)
def test_gradients_by_signs_are_those_by_the_output(groups, dtype, way):
    for layout in LAYOUTS:
        for shape in ((7, 3, 40, 40), (7, 20, 24, 24), (7, 41, 13, 11), (7, 50, 9, 11), (7, 5)):
            case = Case(shape, layout, dtype, groups=groups)
            signs = cpu.empty_signs(case.x, groups)
            y, batch = forward(case, "relu", signs)
            rho = (batch.var + EPS).rsqrt()
            place = (case.grad, case.x, batch.mean, rho, -batch.mean_low * rho)
            factors = (rho**3 / 9, rho / 9, batch.mean_low, batch.mean_low)
            how = {"activation": "relu", "groups": groups}
            for stage, more in ((cpu.apply_grad, factors[:2]), (cpu.normalize_grad, factors)):
                by_y = stage(*place, *more, y=y, want_residual=True, **how)
                by_signs = stage(*place, *more, signs=signs, want_residual=True, **how)
                for mine, other in zip(by_signs[:2], by_y[:2], strict=True):
                    torch.testing.assert_close(mine, other)
                for mine, other in zip(by_signs[2:], by_y[2:], strict=True):
                    sums_close(mine, other)
                assert torch.equal(by_signs[1], by_y[1])
            for mine, other in zip(
                cpu.reduce_grad(*place, signs=signs, **how),
                cpu.reduce_grad(*place, y=y, **how),
                strict=True,
            ):
                sums_close(mine, other)


def test_nan_counts_as_open():
    """As PyTorch has it: a NaN in the output lets the gradient through."""
    case = Case((4, 3, 5, 7), "first")
    case.residual[1, 2, 3] = float("nan")
    signs = cpu.empty_signs(case.x)
    y, _ = forward(case, "relu", signs)
    assert torch.equal(cpu.outputs_for(signs, case.x), (~(y <= 0)).float())


def test_only_a_gate_behind_a_residual_has_signs():
    def kept(activation, residual):
        return Keep.needed(activation, residual=residual, compiled=True)

    assert kept("relu", False) is Keep.REBUILT, "z is rebuilt from x"
    assert kept("tanh", True) is Keep.OUTPUT, "one bit says too little"
    assert kept(None, True) is Keep.NOTHING
    assert kept("relu6", True) is Keep.SIGNS
    assert kept("silu", True) is Keep.REBUILT


@pytest.mark.parametrize("statistics", ["batch", "steady"])
def test_the_layer_keeps_bits_and_not_the_output(statistics):
    layer = sn.BatchNorm2d(8, statistics=statistics, activation="relu")
    x, residual = (torch.randn(16, 8, 32, 32, requires_grad=True) for _ in range(2))
    kept: list[torch.Tensor] = []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x, residual=residual)
    large = [t for t in kept if t.nbytes >= x.nbytes // 2]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert not y.requires_grad or sum(t.nbytes for t in kept) < 1.1 * x.nbytes


def test_more_threads_than_processors(monkeypatch):
    """Threads wait for one another between passes, also where they take turns on a processor."""
    case = Case((64, 24, 30, 30), "last")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 7):
            torch.set_num_threads(threads)
            results.append(forward(case, "relu", None)[0])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results)
