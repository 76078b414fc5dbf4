"""What the readings of a run have in common, by independent figures."""

import numpy as np
import pytest
import torch
from tests.doctor.fixtures.watched import network, train

from steadynorm.doctor.evidence.training import ChannelReading, trend

EPS = 1e-5


def test_a_trend_is_what_is_left_when_scatter_cancels():
    chance = np.random.default_rng(0)
    means, variances = chance.normal(0.5, 0.1, (40, 3)), chance.uniform(1, 2, (40, 3))
    running_mean, running_var = chance.normal(size=3), chance.uniform(1, 2, 3)
    dead = chance.random((40, 3)) < [0.0, 0.9, 1.0]
    looks = [
        ChannelReading(
            step, 16, means[step], variances[step], running_mean, running_var, EPS, dead[step]
        )
        for step in range(40)
    ]
    found = trend(looks, steps=40)
    shifts = (means[20:] - running_mean) / np.sqrt(running_var + EPS)
    assert found.readings == 20
    assert found.values == 320
    np.testing.assert_allclose(found.lag, shifts.mean(0))
    np.testing.assert_allclose(found.error, shifts.std(0, ddof=1) / np.sqrt(20))
    unbiased = variances[20:].mean(0) * 16 / 15
    np.testing.assert_allclose(found.ratio, np.sqrt((unbiased + EPS) / (running_var + EPS)))
    assert found.dead.tolist() == dead[20:].all(0).tolist()
    assert trend([], steps=40) is None


def test_means_that_move_steadily_are_no_scatter_and_few_samples_are_few():
    """`alike` of mixed batches is 1 whatever the drift; `independent` is no more than the samples
    are worth, where a norm before holds the batches' means together.
    """
    chance = np.random.default_rng(0)

    def looks(drift, scatter):
        means = drift * np.arange(200)[:, None] + chance.normal(0, scatter, (200, 400))
        ones, zeros = np.ones(400), np.zeros(400)
        return [
            ChannelReading(
                step, 16, mean, ones, zeros, ones, EPS, zeros == 1, 16, np.full(400, 15 / 16)
            )
            for step, mean in enumerate(means)
        ]

    for drift in (0.0, 0.5):
        assert trend(looks(drift, 0.25), steps=200).alike == pytest.approx(1, rel=0.05)
    assert trend(looks(0.0, 0.75), steps=200).alike == pytest.approx(9, rel=0.05)
    assert trend(looks(0.0, 0.25), steps=200).independent == pytest.approx(16, rel=0.1)
    assert trend(looks(0.0, 0.01), steps=200).independent == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(("samples", "named"), [(5, True), (7, True), (8, False)])
def test_batches_of_few_values_are_counted_in_a_run(samples, named):
    """Their scatter alone would tell with certainty from 4 on."""

    def found(model):
        report = train(model, batch=lambda _: torch.randn(samples, 4))
        return [f for f in report.findings if f.code == "SN405"]

    findings = found(network())
    assert bool(findings) is named
    if named:
        assert findings[0].evidence["samples"] == samples
        assert 4 < findings[0].evidence["independent_values"] <= samples
