"""The same functions on every array library, against the truth; and what must always hold."""

import math
import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import truth

import steadynorm.statistics as stats
from steadynorm.statistics import Context, Moments, RunningStatistics

POLICIES = {
    "batch": stats.Batch(),
    "steady": stats.Steady(prior=9.0, horizon=20.0),
    "running": stats.Running(),
    "renorm": stats.Renorm(warmup=0, r_ramp=10, d_ramp=10),
    "renorm_clipped": stats.Renorm(r_max=1.1, d_max=0.1, warmup=2, r_ramp=5, d_ramp=5),
    "frozen": stats.Frozen(),
}
LIBRARIES = ("numpy", "torch", "jax", "keras")


def library(name: str) -> tuple[ModuleType, Any]:
    """The array namespace, and how to make a float32 array of it."""
    if name == "numpy":
        return np, np.float32
    if name == "torch":
        torch = pytest.importorskip("torch", reason="torch is not installed")
        return torch, lambda a: torch.tensor(np.asarray(a), dtype=torch.float32)
    if name == "jax":
        jnp = pytest.importorskip("jax.numpy", reason="jax is not installed")
        return jnp, lambda a: jnp.asarray(a, dtype="float32")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    return keras.ops, lambda a: keras.ops.convert_to_tensor(np.asarray(a, dtype=np.float32))


def data(seed: int = 0, mean: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 2, (7, 4, 5)).astype(np.float32)


def measured(x: np.ndarray, make: Any = np.float64, count: Any = None) -> Moments:
    """What a kernel would measure: the mean rounded to float32, and what that lost."""
    batch = truth.moments(x)
    high = batch.mean.astype(np.float32)
    n = batch.count if count is None else count
    return Moments(n, make(high), make(batch.var), make(batch.mean - high))


@pytest.mark.parametrize("counted", ["number", "array"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_step_on_every_library(name: str, policy: Any, counted: str) -> None:
    xp, make = library(name)
    x, before = data(), truth.Running(np.linspace(1, 4, 4), np.linspace(2, 5, 4), 6)
    count = None if counted == "number" else make([35.0])
    running = RunningStatistics(make(before.mean), make(before.var), 6)
    context = Context(7, 0.2, 1e-5, xp)
    found, after = stats.step(policy, measured(x, make, count), running, context)
    setting = truth.Setting(momentum=0.2)
    batch = truth.moments(x)
    right = truth.normal(policy, batch, before, 7, setting)
    for part, expected in (
        (found.mean + found.mean_low, right.m),
        (found.var, right.u),
        (found.gain, right.r),
        (found.offset, right.d),
        (found.share, right.share),
    ):
        np.testing.assert_allclose(
            np.asarray(part), expected + 0 * np.asarray(part), rtol=1e-6, atol=1e-6
        )
    kept = truth.updated(policy, batch, before, 7, setting)
    np.testing.assert_allclose(np.asarray(after.mean), kept.mean, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(after.var), kept.var, rtol=1e-6)
    assert int(after.batches) == kept.batches


@pytest.mark.parametrize("name", LIBRARIES)
def test_merging_and_pooling_on_every_library(name: str) -> None:
    xp, make = library(name)
    x = data(mean=1e4)
    parts = [measured(x[:2], make), measured(x[2:], make)]
    whole = truth.moments(x)
    rows = Moments(
        make([[10.0], [0.0], [25.0]]),
        *(xp.stack([a, a * 0, b]) for a, b in zip(parts[0][1:], parts[1][1:], strict=True)),
    )
    for merged in (stats.merge(*parts), stats.pool(rows, xp=xp)):
        mean = np.float64(np.asarray(merged.mean)) + np.float64(np.asarray(merged.mean_low))
        np.testing.assert_allclose(mean, whole.mean, rtol=1e-10)  # float32 alone: 3e-8
        np.testing.assert_allclose(np.asarray(merged.var), whole.var, rtol=2e-6)
        assert int(np.asarray(merged.count).reshape(-1)[0]) == whole.count


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_closed_form_on_every_library(name: str, policy: Any) -> None:
    xp, make = library(name)
    x, grad = data(), data(1, 0.0)
    before = truth.Running(np.linspace(1, 4, 4), np.linspace(2, 5, 4), 6)
    setting = truth.Setting(np.linspace(-1, 2, 4), np.linspace(0, 1, 4), momentum=0.2)
    expected = truth.train(x, policy, before, setting, grad=grad)
    running = RunningStatistics(make(before.mean), make(before.var), 6)
    batch = measured(x, make)
    normalizer, _ = stats.step(policy, batch, running, Context(7, 0.2, 1e-5, xp))
    known = stats.coefficients(normalizer, make(setting.weight), make(setting.bias), 1e-5)
    center, scale, shift = (truth.beside(np.float64(np.asarray(v)), 3) for v in known[:3])
    np.testing.assert_allclose((x - center) * scale + shift, expected.y, atol=3e-6)
    sums = make(grad.sum((0, 2))), make((grad * (x - center)).sum((0, 2)))
    dweight, dbias = stats.parameter_gradients(normalizer, known.rho, *sums)
    np.testing.assert_allclose(np.asarray(dweight), expected.dweight, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(np.asarray(dbias), expected.dbias, rtol=1e-5, atol=1e-4)
    factors = stats.gradient_factors(normalizer, batch, known.scale, known.rho)
    terms = stats.gradient_coefficients(factors, *sums)
    slope, constant = (truth.beside(np.float64(np.asarray(v)) + np.zeros(4), 3) for v in terms)
    np.testing.assert_allclose(
        scale * grad + slope * (x - center) + constant, expected.dx, atol=1e-5
    )


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("std", [1e-13, 1e15])
def test_the_closed_form_at_any_scale(name: str, std: float) -> None:
    """ρ³ is outside float32; no factor, product or sum of the closed form is."""
    _, make = library(name)
    x, grad = np.float64(np.float32(data() * std)), data(1, 0.0)
    setting = truth.Setting(eps=1e-30)
    expected = truth.train(x, stats.Batch(), None, setting, grad=grad)
    batch = measured(x, make)
    normalizer = stats.of_batch(batch)
    known = stats.coefficients(normalizer, None, None, 1e-30)
    center, scale, _ = (truth.beside(np.float64(np.asarray(v)), 3) for v in known[:3])
    sums = make(grad.sum((0, 2))), make((grad * (x - center)).sum((0, 2)))
    factors = stats.gradient_factors(normalizer, batch, known.scale, known.rho)
    terms = stats.gradient_coefficients(factors, *sums)
    slope, constant = (truth.beside(np.float64(np.asarray(v)), 3) for v in terms)
    found = scale * grad + slope * (x - center) + constant
    np.testing.assert_allclose(found * std, expected.dx * std, atol=1e-5)


def test_fold() -> None:
    x = data()
    running = truth.Running(np.linspace(1, 4, 4), np.linspace(2, 5, 4))
    setting = truth.Setting(np.linspace(-1, 2, 4), np.linspace(0, 1, 4))
    for weight, bias in ((setting.weight, setting.bias), (None, None), (setting.weight, None)):
        scale, shift = stats.fold(running.mean, running.var, weight, bias, 1e-5)
        found = truth.beside(scale, 3) * x + truth.beside(shift, 3)
        right = truth.infer(x, running, truth.Setting(weight, bias)).y
        np.testing.assert_allclose(found, right, atol=1e-13)


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("counted", ["number", "array"])
def test_a_count_of_zero_beside_trained_statistics_reads_as_many(name: str, counted: str) -> None:
    xp, make = library(name)

    def seen(mean: list[float], var: list[float], batches: int) -> int:
        count = batches if counted == "number" else make(batches)
        running = RunningStatistics(make(mean), make(var), count)
        return int(stats.batches_seen(running, xp=xp))

    assert seen([0, 0], [1, 1], 0) == 0
    assert seen([0, 3], [1, 1], 0) == seen([0, 0], [1, 2], 0) == stats.MANY_BATCHES
    assert seen([0, 3], [1, 2], 5) == 5
    assert stats.batches_seen(RunningStatistics(make([3.0]), make([2.0]), None), xp=xp) is None


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("policy", [stats.Steady(), stats.Running(), stats.Batch()], ids=repr)
def test_pretrained_statistics_survive_the_first_batch(policy: Any, momentum: float | None) -> None:
    """The first batch weighs what a later one weighs, instead of replacing the statistics."""
    running = RunningStatistics(np.full(4, 10.0), np.full(4, 4.0), 0)
    running = running._replace(batches=stats.batches_seen(running, xp=np))
    context = Context(7, momentum, 1e-5, np)
    found, after = stats.step(policy, measured(data()), running, context)
    known = truth.Running(running.mean, running.var, 10**9)
    setting, batch = truth.Setting(momentum=momentum), truth.moments(data())
    kept = truth.updated(policy, batch, known, 7, setting)
    np.testing.assert_allclose(after.mean, kept.mean, rtol=1e-6)
    np.testing.assert_allclose(after.var, kept.var, rtol=1e-6)
    right = truth.normal(policy, batch, known, 7, setting)
    np.testing.assert_allclose(found.mean + found.mean_low, right.m, rtol=1e-6)
    assert (np.abs(after.mean - 10) < 1).all()  # the batch's mean is 3


# Conventions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", stats.CONVENTIONS)
def test_conventions_and_back(framework: str) -> None:
    assert stats.convert_momentum(
        stats.convert_momentum(0.25, "torch", framework), framework, "torch"
    ) == pytest.approx(0.25)
    there = stats.convert_variance(np.array([3.0]), 5, "torch", framework, xp=np)
    keeps = stats.CONVENTIONS[framework].keeps
    np.testing.assert_allclose(there, 3.0 if keeps == "unbiased" else 3.0 * 4 / 5)
    np.testing.assert_allclose(stats.convert_variance(there, 5, framework, "torch", xp=np), 3.0)
    one = stats.convert_variance(np.array([3.0]), 1, "torch", framework, xp=np)
    np.testing.assert_allclose(one, 3.0)  # no division by zero


def test_the_table_of_conventions() -> None:
    """The rows of docs/semantics.md."""
    assert stats.convert_momentum(0.1, "torch", "keras") == 0.9
    assert stats.convert_momentum(0.1, "torch", "mlx") == 0.1
    table = {name: tuple(row) for name, row in stats.CONVENTIONS.items()}
    assert table == {
        "torch": ("new", 0.1, 1e-5, "unbiased"),
        "keras": ("old", 0.99, 1e-3, "biased"),
        "flax": ("old", 0.99, 1e-5, "biased"),
        "equinox": ("old", 0.99, 1e-5, "biased"),
        "mlx": ("new", 0.1, 1e-5, "unbiased"),
    }
    with pytest.raises(ValueError, match="convention must be one of torch, keras"):
        stats.convert_momentum(0.1, "torch", "caffe")
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]; got 2"):
        stats.convert_momentum(2, "torch", "keras")


@pytest.mark.parametrize("samples", range(1, 40))
@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_ghost_lengths(samples: int, size: int) -> None:
    assert list(stats.Ghost(size).lengths(samples)) == truth.ghost_lengths(samples, size)


# What must always hold ----------------------------------------------------------------------------

values = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12)


def moments_of(sample: list[float]) -> Moments:
    a = np.asarray(sample, dtype=np.float64)
    return Moments(len(a), a.mean(keepdims=True), a.var(keepdims=True), np.zeros(1))


def assert_same(found: Moments, right: Moments, scale: float) -> None:
    assert found.count == right.count
    np.testing.assert_allclose(
        found.mean + found.mean_low, right.mean + right.mean_low, atol=1e-12 * scale
    )
    np.testing.assert_allclose(found.var, right.var, atol=1e-12 * scale**2)
    assert (found.var >= 0).all()


@settings(deadline=None)
@given(values, values, values)
def test_merging_in_any_order(a: list[float], b: list[float], c: list[float]) -> None:
    whole, scale = moments_of(a + b + c), max(1, *map(abs, a + b + c))
    one, two, three = map(moments_of, (a, b, c))
    assert_same(stats.merge(stats.merge(one, two), three), whole, scale)
    assert_same(stats.merge(one, stats.merge(three, two)), whole, scale)
    empty = Moments(0, np.zeros(1), np.zeros(1), np.zeros(1))
    assert_same(stats.merge(empty, one), one, scale)
    assert_same(stats.merge(one, empty), one, scale)
    assert stats.merge(empty, empty).count == 0


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=6))
def test_pooling_any_split(parts: list[list[float]]) -> None:
    each = [moments_of(part) for part in parts]
    rows = Moments(
        np.array([[m.count] for m in each]), *map(np.stack, list(zip(*each, strict=True))[1:])
    )
    whole = [value for part in parts for value in part]
    assert_same(stats.pool(rows, xp=np), moments_of(whole), max(1, *map(abs, whole)))


@settings(deadline=None)
@given(values, st.floats(-100, 100), st.floats(0.1, 10))
def test_shift_and_scale(sample: list[float], shift: float, scale: float) -> None:
    """a·x + b has mean a·μ + b and variance a²·v, through a merge too."""
    moved = [scale * v + shift for v in sample]
    found = stats.merge(moments_of(moved), moments_of(moved[:1]))
    plain = stats.merge(moments_of(sample), moments_of(sample[:1]))
    np.testing.assert_allclose(found.mean, scale * plain.mean + shift, atol=1e-8)
    np.testing.assert_allclose(found.var, scale**2 * plain.var, rtol=1e-6, atol=1e-6)


@settings(deadline=None)
@given(st.sampled_from(sorted(POLICIES)), values.filter(lambda v: len(v) > 1), st.integers(0, 20))
def test_nothing_finite_becomes_nan_or_negative(
    name: str, sample: list[float], batches: int
) -> None:
    running = RunningStatistics(np.zeros(1), np.ones(1), batches)
    context = Context(len(sample), 0.1, 1e-5, np)
    found, after = stats.step(POLICIES[name], moments_of(sample), running, context)
    for part in (*found, after.mean, after.var):
        assert np.isfinite(part).all()
    assert (np.asarray(found.var) >= 0).all()
    assert (after.var >= 0).all()
    assert 0 <= float(np.asarray(found.share)) <= 1
    assert math.isclose(float(running.var[0]), 1.0)  # pure: what came in is untouched


def test_an_empty_batch_changes_nothing() -> None:
    running = RunningStatistics(np.array([2.0]), np.array([3.0]), 4)
    context = Context(0, 0.1, 1e-5, np)
    for count in (0, np.zeros(1)):
        empty = Moments(count, np.zeros(1), np.zeros(1), np.zeros(1))
        for policy in POLICIES.values():
            found, after = stats.step(policy, empty, running, context)
            assert (float(found.mean[0]), float(found.var[0])) == (2.0, 3.0)
            assert (float(after.mean[0]), float(after.var[0]), int(after.batches)) == (2.0, 3.0, 4)
