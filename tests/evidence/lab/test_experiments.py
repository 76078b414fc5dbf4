"""What the experiments measure, against independent figures; each of them from end to end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("altair", reason="charts need the extra lab")

from tests.evidence.lab.checks import runs_from_end_to_end

import steadynorm as sn
from steadynorm.evidence.digits import Digits, load
from steadynorm.evidence.lab import ladder
from steadynorm.evidence.lab.experiments import (
    covariate_shift,
    depth_and_saturation,
    get,
    learning_rate_range,
    regularization_by_noise,
    smoothness,
    steady_parts,
)
from steadynorm.evidence.lab.runs import FinishedRun, Runs
from steadynorm.evidence.networks import fully_connected, initialize, normalization_1d
from steadynorm.statistics import Context, GradientMemory, Moments, RunningStatistics

NAMES = (
    "convergence",
    "learning_rate_range",
    "initialization",
    "depth_and_saturation",
    "covariate_shift",
    "smoothness",
    "regularization_by_noise",
    "small_batches",
)


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="the lab needs the extra lab")
    return load(None)


def short(setting):
    """A setting with few steps: enough for every measure to be taken."""
    batch = setting.get("batch", 32)
    return {**setting, "samples": 40 * batch if "network" in setting and batch == 32 else 2 * batch}


@pytest.mark.parametrize("name", NAMES)
def test_each_runs_from_end_to_end(name, digits, tmp_path):
    experiment = get(name)
    wanted = [short(setting) for setting in experiment.settings["quick"]]
    if name == "depth_and_saturation":
        wanted = [setting for setting in wanted if setting["depth"] <= 10]
    runs_from_end_to_end(experiment, wanted, digits, tmp_path)


def test_the_band_of_rates_by_hand():
    accuracies = {"none": (0.95, 0.5, 0.1), "batch": (0.95, 0.91, 0.9)}
    runs = Runs(
        FinishedRun({"depth": 3, "normalization": kind, "rate": rate}, 0, {"accuracy": accuracy})
        for kind, row in accuracies.items()
        for rate, accuracy in zip((0.01, 0.1, 1.0), row, strict=True)
    )
    assert ladder.widths(runs, "rate", 3, "none") == pytest.approx([1.0])
    assert ladder.widths(runs, "rate", 3, "batch") == pytest.approx([3.0])
    assert learning_rate_range.largest(runs, 3, "none") == [0.01]
    assert learning_rate_range.largest(runs, 3, "batch") == [1.0]


def test_the_gradient_of_every_layer(digits):
    torch.manual_seed(0)
    network = fully_connected(64, normalization_1d("batch"), widths=(8, 8), activation=nn.Tanh)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = depth_and_saturation.gradient_norms(network, digits)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    x = digits.train_images
    x = torch.from_numpy((x - x.mean()) / x.std())[:256].flatten(1).double()
    layers = [module for module in network if isinstance(module, nn.Linear)]
    weights = [layer.weight.detach().double().requires_grad_() for layer in layers]
    for weight in weights[:-1]:
        z = x @ weight.T
        x = torch.tanh((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt())
    logits = x @ weights[-1].T + layers[-1].bias.detach().double()
    loss = F.cross_entropy(logits, torch.from_numpy(digits.train_labels[:256]))
    gradients = torch.autograd.grad(loss, weights)
    np.testing.assert_allclose(found, [np.log10(float(g.norm())) for g in gradients], atol=1e-4)


def test_the_injected_shift_is_the_one_described():
    shift = covariate_shift.InjectedShift(3, seed=0)
    x = torch.zeros(4000, 3)
    moved, again = shift(x), shift(x)
    means = torch.stack([shift(x).mean(0) for _ in range(300)])
    assert not torch.allclose(moved.mean(0), again.mean(0), atol=1e-2), "anew at every step"
    assert means.abs().max() < 0.51
    assert means.std() == pytest.approx(1 / 12**0.5, rel=0.1)  # of a uniform from -0.5 to 0.5
    assert float((moved - moved.mean(0)).abs().max()) < 0.11
    scales = torch.stack([shift(x + 100).mean(0) for _ in range(300)]) / 100
    assert 0.99 < scales.min() < scales.max() < 1.26
    assert torch.equal(shift.eval()(x), x)


def test_movement_by_hand():
    path = torch.tensor(
        [  # two units: low, median, high at three moments
            [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]],
            [[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]],
            [[0.0, 0.0], [2.0, 4.0], [4.0, 8.0]],
        ]
    )
    # Unit 1 moves by 1/2 and 0/4 of its spread, unit 2 by 0 and 2/4; torch's median is the lower.
    assert covariate_shift.movement(path) == pytest.approx(0.25)


def test_percentiles_are_those_of_the_place_and_leave_no_trace():
    torch.manual_seed(0)
    setting = {"network": "sigmoid, small weights", "normalization": "batch, shifted"}
    empty = (np.zeros((1, 2, 3), np.float32), np.zeros(1, np.int64))
    network = covariate_shift.build(setting, Digits("six pixels", *empty, *empty), seed=3)
    shifts = [m for m in network.modules() if isinstance(m, covariate_shift.InjectedShift)]
    images = torch.randn(50, 6)
    before = [value.clone() for value in network.state_dict().values()]
    states = [shift.generator.get_state() for shift in shifts]
    found = covariate_shift.percentiles(network, network[-3], images)
    assert all(map(torch.equal, network.state_dict().values(), before))
    assert all(map(torch.equal, [shift.generator.get_state() for shift in shifts], states))
    network.train()
    values = network[:-2](images).detach().double().numpy()
    np.testing.assert_allclose(found, np.percentile(values, [15, 50, 85], axis=0), atol=1e-5)


def test_along_the_gradient_of_a_quadratic():
    network = nn.Linear(3, 2)
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3), torch.randint(0, 2, (16,))
    before = [parameter.clone() for parameter in network.parameters()]
    found = smoothness.along(network, images, labels, rate=0.1)
    assert all(map(torch.equal, network.parameters(), before))
    weight, bias = (p.detach().double().requires_grad_() for p in network.parameters())

    def at(w, b):
        loss = F.cross_entropy(images.double() @ w.T + b, labels)
        parts = torch.autograd.grad(loss, (w, b))
        return float(loss.detach()), torch.cat([part.flatten() for part in parts])

    _, start = at(weight, bias)
    losses, turns, ratios = [], [], []
    for length in smoothness.LENGTHS:
        walked = length * 0.1 * start
        loss, gradient = at(weight - walked[:6].view(2, 3), bias - walked[6:])
        losses.append(loss)
        turns.append(float((gradient - start).norm()))
        ratios.append(turns[-1] / float(walked.norm()))
    assert found == pytest.approx(
        {"lowest": min(losses), "highest": max(losses), "turn": max(turns),
         "smoothness": max(ratios)},
        rel=1e-4,
    )  # fmt: skip


def test_with_the_population_the_statistics_are_the_populations(digits):
    network = fully_connected(4, normalization_1d("batch"), widths=(5,), activation=nn.Identity)
    initialize(network, 0)
    torch.manual_seed(0)
    population, batch = torch.randn(200, 4), torch.randn(2, 4)
    together = regularization_by_noise.WithPopulation(network, population)
    together.train()
    found = together(batch).detach()
    z = (torch.cat([batch, population]) @ network[1].weight.T).detach().double()
    normalized = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()
    expected = normalized[:2] @ network[-1].weight.double().T + network[-1].bias.double()
    np.testing.assert_allclose(found, expected.detach(), atol=1e-5)
    together.eval()
    assert torch.equal(together(batch), network(batch))


def test_steady_without_a_part():
    """What is taken off and what is remembered, from the values of one batch of five."""
    random = np.random.default_rng(0)
    x, g = random.normal(1, 2, (5, 3)), random.normal(size=(5, 3))
    running = RunningStatistics(random.normal(size=3), random.uniform(0.5, 2, 3), 9)
    policy, old = sn.Steady(prior=16, window=16), random.normal(size=(2, 3))
    batch = Moments(5, x.mean(0), x.var(0), np.zeros(3))
    decided = policy.normalizer(batch, running, Context(5, 0.1, 1e-5, np))
    rho, centered = (decided.var + 1e-5) ** -0.5, x - decided.mean
    sums = (g.sum(0), (g * centered).sum(0))

    def followed(layer):
        made = layer(3, policy, 5)
        return made.follow(GradientMemory(*old), 5 / 21, decided, batch, rho, *sums)

    whole, taken_off = followed(steady_parts.MicroBatchNorm)
    np.testing.assert_array_equal(whole, taken_off)
    for layer, expected in (
        (steady_parts.WithoutConstant, (0 * whole.constant, whole.slope)),
        (steady_parts.WithoutSlope, (whole.constant, 0 * whole.slope)),
        (steady_parts.WithoutPresent, old),
    ):
        after, taken_off = followed(layer)
        np.testing.assert_array_equal(after, whole)
        np.testing.assert_array_equal(taken_off, expected)
    after, taken_off = followed(steady_parts.Averages)
    means = np.stack([g.mean(0), (g * centered * rho).mean(0)])
    np.testing.assert_allclose(after, old * 16 / 21 + means * 5 / 21)
    np.testing.assert_allclose(taken_off, np.stack(after) * 16 / 21)


def test_a_share_that_counts_positions():
    batch = Moments(12, np.ones(1), np.ones(1), np.zeros(1))
    running, context = RunningStatistics(np.zeros(1), np.ones(1), 9), Context(3, 0.1, 1e-5, np)
    made = steady_parts.CountsPositions(prior=4, window=16)
    assert made.normalizer(batch, running, context).share == 12 / 16
    assert made.gradient_rate(3) == 3 / 19


def test_the_rule_of_choice():
    networks = dict(zip(steady_parts.NETWORKS, (4.0, 2.0, 8.0), strict=True))
    cells = [("batch", 64, (16, 640, 16), 0.0), ("whole", 1, (16, 640, 16), 1.0)]
    cells.append(("whole", 1, (4, 640, 16), 0.5))
    runs = Runs(
        FinishedRun(
            {"network": network, "part": part, "batch": batch}
            | dict(zip(("prior", "horizon", "window"), values, strict=True)),
            seed,
            {"error": goal + more + (10 if seed == 1 and goal + more == 8.5 else 0)},
        )
        for network, goal in networks.items()
        for part, batch, values, more in cells
        for seed in (0, 1)
    )
    assert steady_parts.score(runs, (16, 640, 16)) == (1.5, steady_parts.NETWORKS[1], 0)
    assert steady_parts.score(runs, (4, 640, 16)) == (13.5 / 8, steady_parts.NETWORKS[2], 0)
    lost = steady_parts.is_lost
    assert (lost(18.5, 8), lost(19.5, 8), lost(7.5, 2)) == (False, True, True)
