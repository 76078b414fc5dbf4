"""What chance makes of batches, against SciPy and by many sets of mixed batches."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from steadynorm.doctor.evidence.inputs import SEVERAL
from steadynorm.doctor.evidence.resampling import class_scatter


def dealt(
    batches: int, size: int, classes: int, *, own: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Labels in batches that each have a class of their own, for a share of the samples."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(classes, size=(batches, size))
    theirs = np.arange(batches)[:, None] % classes
    return list(np.where(chance.random(labels.shape) < own, theirs, labels))


def test_it_is_chi_square_over_its_mean() -> None:
    batches = dealt(12, 16, 5, own=0.3)
    table = np.stack([np.bincount(labels, minlength=5) for labels in batches])
    statistic, _, freedom, _ = chi2_contingency(table, correction=False)
    found = class_scatter(batches)
    assert found is not None
    assert found.samples == 16
    assert found.ratio == pytest.approx(statistic / freedom * (12 * 16 - 1) / (12 * 16))


def test_mixed_batches_are_below_the_limit_and_sorted_ones_above() -> None:
    ratios = []
    for seed in range(20):
        found = class_scatter(dealt(32, 16, 10, seed=seed))
        assert found is not None
        assert found.ratio < found.limit
        ratios.append(found.ratio)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    alike = class_scatter(dealt(32, 16, 10, own=0.3))
    assert alike is not None
    assert alike.ratio > 2 * alike.limit / 1.4 > 1.5


def test_classes_that_are_rare_are_no_scatter() -> None:
    """A thousand classes, of which most are met once or not at all."""
    for seed in range(10):
        found = class_scatter(dealt(32, 16, 1000, seed=seed))
        assert found is not None
        assert found.ratio < min(found.limit, 1.5)


def test_what_cannot_be_told() -> None:
    batches = dealt(SEVERAL, 16, 10)
    assert class_scatter(batches) is not None
    assert class_scatter([*batches, batches[0][:3]]) == class_scatter(batches)
    for few in ([], batches[1:], dealt(SEVERAL, 16, 1), dealt(SEVERAL, 1, 10)):
        assert class_scatter(few) is None
