"""Every stage of the CPU kernels' backward against float64 NumPy."""

import numpy as np
import pytest
import torch
from tests import truth
from tests.kernels.cpu_cases import (
    EDGES,
    EPS,
    F32,
    F64,
    HALVES,
    LAYOUTS,
    SHAPES,
    Case,
    beside,
    check_forward,
    seen,
)
from tests.tolerances import close, error

from steadynorm.kernels.cpu import stages as cpu

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def check_backward(case, activation=None, add=False, mask=None):
    """`reduce_grad`, `apply_grad` and `normalize_grad` after a forward by the batch's moments."""
    y, moments, scale, shift = check_forward(case, activation, add)
    residual = case.residual if add else None
    options = {"y": y, "residual": residual, "activation": activation, "groups": case.groups}
    at = (moments.mean, scale, shift)
    right = gradients(case, activation, add)
    real = moments.mean.dtype
    kind = "backward"

    sums = cpu.reduce_grad(case.grad, case.x, *at, **options)
    # About the rounded mean: the same as about the mean, to what a rounding times Σg amounts to.
    size = case.x.numel() / case.x.shape[1] ** 0.5
    assert error(sums[0] / size, right["sum_grad"] / size) < 1e-6 if real is F32 else 1e-12
    n = torch.tensor([[x.size / x.shape[1]] for x in case.split(case.x)], dtype=real)
    n = n if case.groups else n[0]
    rho = (moments.var + EPS).rsqrt()
    constant_factor = scale / n
    low = moments.mean_low

    def check(dx, dresidual):
        close(dx, right["dx"], kind, "dx")
        assert dx.stride() == case.x.stride()
        if add:
            close(dresidual, right["g"], kind, "dresidual")
        else:
            assert dresidual is None

    slope = -constant_factor * rho**2 * (sums[1] - low * sums[0])
    constant = -constant_factor * sums[0] - slope * low
    check(*cpu.apply_grad(case.grad, case.x, *at, slope, constant, want_residual=add, **options))
    *both, total, moved = cpu.normalize_grad(
        case.grad,
        case.x,
        *at,
        rho,
        constant_factor,
        low,
        low,
        want_residual=add,
        **options,
    )
    check(*both)
    assert error(total / size, sums[0] / size) < 1e-6
    assert error(moved / size, sums[1] / size) < 1e-6


def gradients(case, activation, add):
    _, derivative = truth.ACTIVATIONS[activation]
    parts = {"g": [], "dx": [], "sum_grad": []}
    tensors = (case.x, case.residual, case.grad)
    for x, r, grad in zip(*map(case.split, tensors), strict=True):
        m = truth.moments(x)
        rho = 1 / np.sqrt(m.var + EPS)
        moved, gain = x - beside(m.mean, x), beside(rho * seen(case.weight), x)
        z = moved * gain + beside(seen(case.bias), x) + (r if add else 0)
        g = grad * derivative(z)
        over = (0, *range(2, x.ndim))
        s1, s2 = g.sum(over), (g * moved).sum(over)
        through = s1 / m.count, rho**2 * s2 / m.count
        parts["dx"].append(gain * (g - beside(through[0], x) - moved * beside(through[1], x)))
        parts["g"].append(g)
        parts["sum_grad"].append(s1)
    return {
        "g": np.concatenate(parts["g"]),
        "dx": np.concatenate(parts["dx"]),
        "sum_grad": case.rows(parts["sum_grad"]),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if np.prod(s) // s[1] > 4], ids=str)
def test_backward(shape, layout, way):
    check_backward(Case(shape, layout), "relu", add=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", list(truth.ACTIVATIONS))
def test_backward_of_every_activation(activation, layout, way):
    for shape in EDGES:
        check_backward(Case(shape, layout), activation, add=True)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
@pytest.mark.parametrize("groups", [None, (2, 3, 2)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_of_types_and_ghosts(activation, groups, dtype, way):
    for layout in LAYOUTS:
        for shape in ((7, 3, 40, 40), (7, 20, 24, 24), (7, 50, 9, 11)):
            check_backward(Case(shape, layout, dtype, groups=groups), activation)


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_backward_is_as_exact_at_a_large_mean(mean, way):
    for layout in LAYOUTS:
        for shape in EDGES:
            check_backward(Case(shape, layout, mean=mean), "silu", add=True)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
@pytest.mark.parametrize("groups", [None, (2, 3, 2)], ids=str)
def test_masked_positions_get_no_gradient_through_the_statistics(groups, dtype, way):
    for layout in LAYOUTS:
        for shape in ((7, 3, 40, 40), (7, 20, 24, 24), (7, 50, 9, 11), (7, 5)):
            case = Case(shape, layout, dtype, groups=groups)
            draw = torch.Generator().manual_seed(1)
            mask = torch.rand(shape[:1] + shape[2:], generator=draw) > 0.4
            rows = (len(groups), shape[1]) if groups else (shape[1],)
            real = F64 if dtype == F64 else F32
            per_channel = [torch.randn(rows, generator=draw, dtype=real) for _ in range(5)]
            dx, g = cpu.apply_grad(
                case.grad, case.x, *per_channel, mask=mask, groups=groups, want_residual=True
            )
            assert g is case.grad
            values = [np.atleast_2d(seen(t)) for t in per_channel]
            parts = []
            tensors = (case.x, case.grad, mask)
            for k, (x, grad, valid) in enumerate(zip(*map(case.split, tensors), strict=True)):
                center, scale, _, slope, constant = (beside(v[k], x) for v in values)
                parts.append(scale * grad + valid[:, None] * (slope * (x - center) + constant))
            close(dx, np.concatenate(parts), "backward")


def test_a_nan_in_the_gradient_stays_in_its_channel(way):
    for layout in LAYOUTS:
        for shape in EDGES:
            case = Case(shape, layout)
            case.grad[0, 1].fill_(float("nan"))
            ones, zeros = torch.ones(shape[1]), torch.zeros(shape[1])
            factors = (ones, ones, zeros, zeros)
            dx, dresidual, *sums = cpu.normalize_grad(
                case.grad, case.x, zeros, ones, zeros, *factors, y=case.x, activation="relu",
                want_residual=True,
            )  # fmt: skip
            hurt = torch.zeros(shape[1], dtype=torch.bool)
            hurt[1] = True
            for t in sums:
                assert torch.equal(t.isnan(), hurt)
            assert dx[:, 1].isnan().all()
            assert dx[:, ~hurt].isfinite().all()
            blocked = case.x[0, 1] <= 0
            assert (dresidual[0, 1][blocked] == 0).all()  # not 0·NaN: as PyTorch's own relu
            assert dresidual[0, 1][~blocked].isnan().all()
