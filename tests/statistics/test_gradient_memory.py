"""The remembered part of the gradient, against regressions over all values in float64."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.statistics.test_statistics import LIBRARIES, library

from steadynorm.statistics import (
    Batch,
    GradientCoefficients,
    GradientMemory,
    Moments,
    Normalizer,
    Steady,
    coefficients,
    gradient_coefficients,
    gradient_factors,
    remember,
    with_memory,
)

EPS = 1e-5


class Step(NamedTuple):
    """A batch, what normalizes it, and the gradient at z; values along the first axis."""

    x: np.ndarray
    grad: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    share: float
    rate: float

    @property
    def rho(self) -> np.ndarray:
        return 1 / np.sqrt(self.var + EPS)

    @property
    def hat(self) -> np.ndarray:
        return (self.x - self.mean) * self.rho

    @property
    def left(self) -> np.ndarray:
        """h: the gradient less what flows through the share of this batch's own moments."""
        own = (self.x - self.x.mean(0)) * self.rho
        through = self.grad.mean(0) + own * (self.grad * self.hat).mean(0)
        return self.grad - self.share * through


def drawn(seed: int, values: int = 6, channels: int = 3, window: float = 16) -> Step:
    rng = np.random.default_rng(seed)
    size = (values, channels)
    return Step(
        rng.normal(2, 1.5, size) + rng.normal(0, 0.5, channels),
        rng.normal(0.3, 1, size),
        rng.normal(2, 0.2, channels),
        rng.uniform(0.5, 3, channels),
        float(rng.uniform(0.05, 0.9)),
        1 / (1 + window),
    )


def regressed(step: Step, memory: np.ndarray) -> np.ndarray:
    """(M, R) of least squares: the values weigh β in all, and the old memory 1 - β."""
    found = np.empty_like(memory)
    n = len(step.x)
    for c in range(step.x.shape[1]):
        weight = np.sqrt(step.rate / n)
        rows = np.stack([np.ones(n), step.hat[:, c]], 1) * weight
        rows = np.concatenate([rows, np.sqrt(1 - step.rate) * np.eye(2)])
        right = np.concatenate([step.left[:, c] * weight, np.sqrt(1 - step.rate) * memory[:, c]])
        found[:, c] = np.linalg.lstsq(rows, right, rcond=None)[0]
    return found


def taken(step: Step, make: Any = np.asarray) -> tuple[Any, ...]:
    """The arguments of `remember` from `rate` on, in any array library."""
    mean, var = step.x.mean(0), step.x.var(0)
    batch = Moments(len(step.x), make(mean), make(var), make(0 * mean))
    normalizer = Normalizer(make(step.mean), 0.0, make(step.var), 1.0, 0.0, step.share)
    sums = step.grad.sum(0), (step.grad * (step.x - step.mean)).sum(0)
    return step.rate, normalizer, batch, make(step.rho), *(make(s) for s in sums)


def zeros(channels: int, make: Any = np.asarray) -> GradientMemory:
    return GradientMemory(make(np.zeros(channels)), make(np.zeros(channels)))


@pytest.mark.parametrize("name", LIBRARIES)
def test_fifty_steps_on_every_library(name: str) -> None:
    xp, make = library(name)
    memory, right = zeros(3, make), np.zeros((2, 3))
    for seed in range(50):
        step = drawn(seed, values=1 + seed % 5)
        memory = remember(memory, *taken(step, make), xp=xp)
        right = regressed(step, right)
    np.testing.assert_allclose(np.stack([np.asarray(part) for part in memory]), right, atol=2e-6)


def test_fifty_steps_in_float64() -> None:
    memory, right = zeros(3), np.zeros((2, 3))
    for seed in range(50):
        step = drawn(seed, values=1 + seed % 5)
        memory = remember(memory, *taken(step), xp=np)
        right = regressed(step, right)
        np.testing.assert_allclose(np.stack(memory), right, atol=1e-13)


def test_the_map_takes_off_the_remembered_part() -> None:
    step, weight = drawn(1), np.array([0.7, -1.2, 2.0])
    memory = GradientMemory(np.array([0.3, -0.1, 0.2]), np.array([0.5, 0.4, -0.6]))
    _, normalizer, batch, _, *sums = taken(step)
    center, scale, _, rho = coefficients(normalizer, weight, None, EPS)
    flowing = gradient_coefficients(gradient_factors(normalizer, batch, scale, rho), *sums)
    slope, constant = with_memory(flowing, memory, normalizer, scale, rho)
    found = scale * step.grad + slope * (step.x - center) + constant
    right = weight * step.rho * (step.left - memory.constant - memory.slope * step.hat)
    np.testing.assert_allclose(found, right, atol=1e-13)


def test_a_mean_held_in_two_parts() -> None:
    """The part of the mean that float32 cannot hold counts in x̂, in the sums and in the map."""
    step = drawn(2)
    rate, normalizer, batch, rho, sum_grad, sum_grad_x = taken(step)
    low = 0.25
    split = normalizer._replace(mean=step.mean - low, mean_low=low)
    about_center = sum_grad_x + low * sum_grad
    whole = remember(zeros(3), rate, normalizer, batch, rho, sum_grad, sum_grad_x, xp=np)
    parts = remember(zeros(3), rate, split, batch, rho, sum_grad, about_center, xp=np)
    np.testing.assert_allclose(np.stack(parts), np.stack(whole), atol=1e-14)
    nothing = GradientCoefficients(np.zeros(3), np.zeros(3))
    one, other = (with_memory(nothing, whole, n, rho, rho) for n in (normalizer, split))
    np.testing.assert_allclose(
        one.slope * (step.x - step.mean) + one.constant,
        other.slope * (step.x - split.mean) + other.constant,
        atol=1e-14,
    )


def test_what_is_left_along_1_and_xhat_adds_up_to_the_change_of_the_memory() -> None:
    memory, total = zeros(3), np.zeros((2, 3))
    for seed in range(30):
        step = drawn(seed, values=1 + seed % 3)
        memory = remember(memory, *taken(step), xp=np)
        rest = step.left - memory.constant - memory.slope * step.hat
        odds = step.rate / (1 - step.rate)
        total += odds * np.stack([rest.mean(0), (rest * step.hat).mean(0)])
    np.testing.assert_allclose(total, np.stack(memory), atol=1e-13)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    values=st.integers(1, 8),
    window=st.floats(0.01, 1e4),
    outlier=st.floats(0, 1e3),
)
def test_no_gradient_turns_round(seed: int, values: int, window: float, outlier: float) -> None:
    """The map from h to what is passed on is symmetric and positive definite, at most 1."""
    step = drawn(seed, values, channels=1, window=window)
    step.x[0] += outlier
    basis = np.eye(values)
    passed = np.empty((values, values))
    for i in range(values):
        # With share 0, h is the gradient itself.
        unit = step._replace(grad=basis[:, i : i + 1], share=0.0)
        memory = remember(zeros(1), *taken(unit), xp=np)
        passed[:, i] = (unit.left - memory.constant - memory.slope * unit.hat)[:, 0]
    np.testing.assert_allclose(passed, passed.T, atol=1e-9)
    eigenvalues = np.linalg.eigvalsh((passed + passed.T) / 2)
    assert eigenvalues.min() > -1e-9
    assert eigenvalues.max() < 1 + 1e-9


def test_nothing_new_at_rate_0() -> None:
    memory = GradientMemory(np.array([0.3, -0.1, 0.2]), np.array([0.5, 0.4, -0.6]))
    after = remember(memory, *taken(drawn(0)._replace(rate=0.0)), xp=np)
    np.testing.assert_array_equal(np.stack(after), np.stack(memory))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_channel_that_is_not_finite_keeps_its_memory(poison: float) -> None:
    memory = GradientMemory(np.array([0.3, -0.1, 0.2]), np.array([0.5, 0.4, -0.6]))
    step = drawn(0)
    step.grad[2, 1] = poison
    after = remember(memory, *taken(step), xp=np)
    assert np.isfinite(np.stack(after)).all()
    right = regressed(drawn(0), np.stack(memory))
    right[:, 1] = np.stack(memory)[:, 1]
    np.testing.assert_allclose(np.stack(after), right, atol=1e-14)


def test_a_doubled_loss_scale_is_followed_within_a_few_windows() -> None:
    """A change of scale by c leaves the memory wrong by the factor c, and less each batch."""
    steps = [drawn(seed) for seed in range(600)]
    plain, scaled = zeros(3), zeros(3)
    apart = []
    for i, step in enumerate(steps):
        plain = remember(plain, *taken(step), xp=np)
        scale = 1.0 if i < 300 else 2.0
        scaled = remember(scaled, *taken(step._replace(grad=step.grad * scale)), xp=np)
        apart.append(np.abs(np.stack(scaled) / scale - np.stack(plain)).max())
    assert apart[299] == 0
    assert apart[300] > 0.01
    assert apart[300 + 16 * 8] < 1e-3 * apart[300]


def test_policies_with_and_without_a_memory() -> None:
    assert Steady().gradient_rate(16) == 0.5
    assert Steady(window=None).gradient_rate(16) is None
    assert repr(Steady(window=None)) == "Steady(prior=16, horizon=640, window=None)"
    assert Batch().one_way() == Batch()
    assert Steady(8, 320, 4).one_way() == Steady(8, 320, None)
