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

NAMES = (
    "convergence",
    "learning_rate_range",
    "initialization",
    "depth_and_saturation",
    "covariate_shift",
    "smoothness",
    "regularization_by_noise",
    "small_batches",
    "steady_parts",
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


@pytest.mark.parametrize("part", ["gradient", "horizon", "spread"])
def test_steady_without_a_part(part):
    prior, horizon = 4.0, 640.0
    torch.manual_seed(0)
    x = torch.randn(6, 3) * 2 + 1
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    layer = sn.BatchNorm1d(3, statistics=steady_parts.POLICIES[part](prior, horizon))
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(var)
    layer.num_batches_tracked.fill_(1000)
    given = x.clone().requires_grad_()
    upstream = torch.randn_like(x)
    output = layer(given)
    output.backward(upstream)

    live = x.double().requires_grad_()
    own = live.detach() if part == "gradient" else live
    mu, v = own.mean(0), own.var(0, correction=0)
    spread = 0.0 if part == "spread" else (mu.detach() - mean) ** 2
    k = 6 / (6 + prior)
    expected = (live - (mean + k * (mu - mean))) / (
        (1 - k) * var + k * v + k * (1 - k) * spread + layer.eps
    ).sqrt()
    expected.backward(upstream.double())
    same = dict(rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(output, expected, **same)
    torch.testing.assert_close(given.grad, live.grad, **same)
    a = 0.1 if part == "horizon" else 6 / (6 + horizon)
    mu, v = mu.detach(), v.detach()
    torch.testing.assert_close(layer.running_mean, mean + a * (mu - mean), **same)
    torch.testing.assert_close(
        layer.running_var, (1 - a) * var + a * v + a * (1 - a) * spread, **same
    )
