"""The CPU kernels' forward against float64 NumPy: types, layouts, activations, ghosts, masks.

All tests run with fresh memory filled with NaN, so that an element left out cannot pass.
"""

import platform
import threading

import numba
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
    check_moments,
    laid,
    mean_of,
    seen,
)
from tests.tolerances import error, within_bar

from steadynorm.kernels.cpu import kernels
from steadynorm.kernels.cpu import runtime as cpu_runtime
from steadynorm.kernels.cpu import stages as cpu
from steadynorm.kernels.cpu.backend import CPU
from steadynorm.kernels.spec import Call
from steadynorm.statistics import Batch

pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape, layout, way):
    case = Case(shape, layout)
    check_moments(case, cpu.moments(case.x))


@pytest.mark.parametrize("groups", [(2, 1, 3), (6,), (1,) * 6], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_ghosts(groups, layout, way):
    for shape in ((6, 50, 9, 11), (6, 3, 30, 30), (6, 20, 24, 24)):
        case = Case(shape, layout, groups=groups)
        check_moments(case, cpu.moments(case.x, groups=groups))


@pytest.mark.parametrize("groups", [None, (2, 1, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids=str)
def test_masked_moments(layout, groups, dtype, way):
    for shape in ((6, 50, 9, 11), (6, 3, 30, 30), (6, 20, 24, 24), (6, 5)):
        case = Case(shape, layout, dtype, groups=groups)
        mask = torch.rand(shape[:1] + shape[2:], generator=torch.Generator().manual_seed(1)) > 0.4
        mask[2] = False  # one ghost without a valid position
        case.x.movedim(1, -1)[~mask] = float("nan")  # what stands there must not matter
        found = cpu.moments(case.x, mask=mask, groups=groups)
        valid = [
            truth.moments(x, m.astype(bool))
            for x, m in zip(case.split(case.x), case.split(mask), strict=True)
        ]
        assert np.asarray(found.count).reshape(-1).tolist() == [m.count for m in valid]
        assert error(mean_of(found), case.rows([m.mean for m in valid])) < 5e-7
        assert error(found.var, case.rows([m.var for m in valid])) < 5e-7


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, layout, way):
    check_forward(Case(shape, layout), "relu", add=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", list(truth.ACTIVATIONS))
def test_forward_of_every_activation(activation, layout, way):
    for shape in EDGES:
        check_forward(Case(shape, layout), activation, add=True)


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
@pytest.mark.parametrize("groups", [None, (1, 2, 1)], ids=str)
def test_forward_of_types_and_ghosts(groups, dtype, way):
    for layout in LAYOUTS:
        for shape in ((4, 3, 40, 40), (4, 20, 24, 24), (4, 50, 9, 11)):
            check_forward(Case(shape, layout, dtype, groups=groups))


@pytest.mark.parametrize("dtype", [F32, F64, *HALVES], ids=str)
def test_results_wherever_in_a_cache_line_they_begin(dtype, way):
    """What goes past the caches goes by lines: what is before and after must stay as it was."""
    for shape in ((3, 3, 40, 40), (6, 50, 9, 11), (3, 5)):
        for offset in (0, 1, 3, 8, 31, 33):
            case = Case(shape, dtype=dtype)
            room = torch.full((offset + case.x.numel() + 40,), 7.0, dtype=dtype)
            out = room[offset : offset + case.x.numel()].view(shape)
            kept = torch.ones(shape[1], dtype=case.weight.dtype)
            right = cpu.apply(case.x, kept, kept, kept, activation="relu")
            cpu.apply(case.x, kept, kept, kept, activation="relu", out=out)
            assert torch.equal(out, right)
            assert bool((room[:offset] == 7).all())
            assert bool((room[offset + case.x.numel() :] == 7).all())


@pytest.mark.parametrize("mean", [1e4, 1e6, -1e6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_keeps_to_the_bar_at_any_mean(mean, layout, way):
    for shape in (*SHAPES, (512, 300)):
        if np.prod(shape) // shape[1] < 8:
            continue  # too few values for a standard deviation near 1
        case = Case(shape, layout, mean=mean)
        y, _ = cpu.normalize(case.x, None, None, EPS)
        x, m = seen(case.x), truth.moments(seen(case.x))
        right = (x - beside(m.mean, x)) / beside(np.sqrt(m.var + EPS), x)
        within_bar(y, right, f"{shape} ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_keeps_to_the_bar_over_millions_of_values(layout):
    case = Case((8, 2, 400, 400), layout, mean=1e6)
    y, _ = cpu.normalize(case.x, None, None, EPS)
    x, m = seen(case.x), truth.moments(seen(case.x))
    within_bar(y, (x - beside(m.mean, x)) / beside(np.sqrt(m.var + EPS), x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pivot_far_from_the_mean_is_moved(layout, way):
    for shape in ((16, 2, 50, 50), (40, 6, 7, 7), (4000, 3)):
        case = Case(shape, layout)
        total = case.x.numel() // shape[1]
        flat = case.x.movedim(1, -1).reshape(total, shape[1])
        flat[torch.arange(16) * total // 16] += 1e4  # the very values that pivots are drawn from
        case.x = laid(flat.reshape(shape[:1] + shape[2:] + shape[1:2]).movedim(-1, 1), layout)
        check_moments(case, cpu.moments(case.x))
        _, moments = cpu.normalize(case.x, None, None, EPS)
        check_moments(case, moments)


@pytest.mark.parametrize("value", [0.0, 1e6, -3.7e-5])
def test_a_constant_has_no_variance(value, way):
    for shape in SHAPES:
        x = torch.full(shape, value)
        y, moments = cpu.normalize(x, None, None, EPS)
        assert (moments.mean == x.flatten()[0]).all()
        assert (moments.var == 0).all()
        assert (y == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_channel(layout, way):
    for shape in ((3, 4, 40, 40), (6, 50, 9, 11)):
        for activation in (None, "relu"):
            case = Case(shape, layout)
            clean, _ = cpu.normalize(case.x, None, None, EPS, activation=activation)
            flat = case.x.movedim(1, 0)
            flat[0, 0], flat[2, -1, ..., -1] = float("nan"), float("inf")
            y, moments = cpu.normalize(case.x, None, None, EPS, activation=activation)
            assert moments.mean[0].isnan()
            assert moments.mean[2] == float("inf")
            assert moments.mean_low.isfinite().all()
            assert moments.var[[0, 2]].isnan().all()
            assert y[:, [0, 2]].isnan().all()
            rest = [c for c in range(shape[1]) if c not in (0, 2)]
            assert torch.equal(y[:, rest], clean[:, rest])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_rounds_to_nearest_even_and_keeps_nan(dtype):
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.reshape(256, 256)
    zero = torch.zeros(256)
    y = cpu.apply(x, zero, zero + 1 / 3, zero)
    right = (x.float() * (zero + 1 / 3)).to(dtype)
    assert torch.equal(y.isnan(), right.isnan())
    assert torch.equal(y.nan_to_num(), right.nan_to_num())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="F16C is x86's")
def test_float16_is_taken_where_the_compiled_code_may_convert_it(monkeypatch):
    """Else LLVM would call a library function that the process does not have."""
    for features, taken in (("", False), ("+avx2,+f16c", True), ("+avx2,-f16c", False)):
        monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
        assert kernels.converts_float16() is taken


# Memory, types, layouts -----------------------------------------------------------------------


def test_results_go_where_they_are_asked_to():
    case = Case((4, 5, 6, 7))
    y, moments, scale, shift = check_forward(case, "relu", add=True)
    out = torch.empty_like(y)
    again, _ = cpu.normalize(
        case.x, case.weight, case.bias, EPS, residual=case.residual, activation="relu", out=out
    )
    assert again is out
    assert torch.equal(out, y)
    pair = torch.empty_like(y), torch.empty_like(y)
    zeros = torch.zeros(5)
    options = {"y": y, "activation": "relu", "want_residual": True}
    at = (moments.mean, scale, shift)
    dx, dresidual = cpu.apply_grad(case.grad, case.x, *at, zeros, zeros, out=pair, **options)
    assert (dx, dresidual) == pair
    assert torch.equal(dresidual, case.grad * (y > 0))


def test_other_strides_of_the_companions_are_brought_in_line():
    case = Case((4, 5, 6, 7), "last")
    right, _ = cpu.normalize(case.x, None, None, EPS, residual=case.residual)
    y, _ = cpu.normalize(case.x, None, None, EPS, residual=case.residual.contiguous())
    assert torch.equal(y, right)
    one = torch.ones(5)
    expanded = torch.ones(()).expand(case.x.shape)
    total, _ = cpu.reduce_grad(expanded, case.x, one, one, one)
    assert (total == 4 * 6 * 7).all()


TAKEN = [str(dtype).removeprefix("torch.") for dtype in kernels.SCALARS]
REFUSED = {
    f"the input is int32, not {', '.join(TAKEN[:-1])} or {TAKEN[-1]}": lambda x: x.int(),
    "the input is empty": lambda x: x[:0],
    "the input is contiguous neither channels-first nor channels-last": lambda x: x[:, ::2],
    "`x` is on meta, not on cpu": lambda x: x.to("meta"),
}


def refusal(x, residual=None):
    return CPU.supports(Call(x, None, None, residual, policy=Batch(), momentum=0.1))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_and_why(reason):
    assert refusal(REFUSED[reason](torch.randn(4, 6, 5, 5))) == reason


def test_what_is_taken():
    x = torch.randn(4, 6, 5, 5)
    taken = [
        x.to(memory_format=torch.channels_last),
        x[1:],
        *(x.to(dtype) for dtype in kernels.SCALARS),
    ]
    assert [refusal(t) for t in taken] == [None] * len(taken)
    assert refusal(x[..., 0]) is not None
    assert refusal(x, x.half()) == "the residual is float16, the input float32"


def test_shapes_that_do_not_fit_are_named():
    x = torch.randn(4, 6)
    one = torch.ones(6)
    with pytest.raises(ValueError, match=r"^`residual` must have x's shape \(4, 6\); got \(4, 5\)"):
        cpu.apply(x, one, one, one, residual=torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"must have shape \(C,\), C = 6; got \(5,\)"):
        cpu.apply(x, one[1:], one, one)
    with pytest.raises(ValueError, match=r"`groups` must sum to 4, x's samples; got \(2, 1\)"):
        cpu.moments(x, groups=(2, 1))
    with pytest.raises(ValueError, match="`x` must be contiguous"):
        cpu.moments(x[:, ::2])
    with pytest.raises(ValueError, match="`out` must have x's type and strides"):
        cpu.apply(x, one, one, one, out=x.t().contiguous().t())
    with pytest.raises(ValueError, match="`y` must be the output, for the gradient of tanh"):
        cpu.reduce_grad(x, x, one, one, one, activation="tanh")


# Threads --------------------------------------------------------------------------------------


def parallel_case():
    case = Case((16, 24, 30, 30))
    return case, cpu.normalize(case.x, case.weight, case.bias, EPS)[0]


def test_every_number_of_threads_gives_the_same(way):
    case, right = parallel_case()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y, _ = cpu.normalize(case.x, case.weight, case.bias, EPS)
        assert error(y, right) < 5e-7


def test_several_python_threads_at_once(way):
    case, right = parallel_case()
    wrong = []

    def work():
        for _ in range(40):
            y, _ = cpu.normalize(case.x, case.weight, case.bias, EPS)
            if not torch.equal(y, right):
                wrong.append(y)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_pool_of_python_threads_where_openmp_is_not_gnus(way, monkeypatch):
    case, right = parallel_case()
    ran = []
    pool = cpu_runtime.python_team()

    def team():
        ran.append(True)
        return pool

    monkeypatch.setattr(cpu_runtime, "team", team)
    y, _ = cpu.normalize(case.x, case.weight, case.bias, EPS)
    assert torch.equal(y, right)
    assert ran


@pytest.mark.parametrize("activation", list(truth.ACTIVATIONS))
def test_activations_over_all_that_float32_holds(activation):
    """Tails, overflow and denormals, where a polynomial could go wrong and random input is rare."""
    reach = torch.logspace(-45, 38, 4000, dtype=F64).float()
    z = torch.cat((reach, -reach, torch.linspace(-110, 110, 4001), torch.zeros(1)))
    zero = torch.zeros(len(z))
    y = cpu.apply(z[None], zero, zero + 1, zero, activation=activation)
    forward, derivative = truth.ACTIVATIONS[activation]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        right, slope = forward(seen(z)), derivative(seen(z))
    right = np.where(np.isfinite(right), right, np.where(seen(z) > 0, seen(z), 0.0))
    slope = np.where(np.isfinite(slope), slope, seen(z) > 0)
    wrong = np.abs(seen(y[0]) - right) / np.maximum(1.0, np.abs(right))
    assert wrong.max() < 5e-7, z[wrong.argmax()]
    ones = torch.ones(1, len(z))
    dx, _ = cpu.apply_grad(
        ones, z[None], zero, zero + 1, zero, zero, zero, y=y, activation=activation
    )
    wrong = np.abs(seen(dx[0]) - slope)
    assert wrong.max() < 2e-6, z[wrong.argmax()]
    for special in (float("nan"), float("inf"), -float("inf")):
        value = torch.full((1, 1), special)
        found = cpu.apply(value, *torch.tensor([[0.0], [1.0], [0.0]]), activation=activation)
        plain = {None: lambda t: t}.get(activation) or getattr(torch.nn.functional, activation)
        torch.testing.assert_close(found, plain(value), equal_nan=True)
