"""Training small networks: the recipe, what is measured, and that measuring leaves no trace."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from steadynorm.evidence.digits import Digits, batches, tensors
from steadynorm.evidence.estimates import mean
from steadynorm.evidence.networks import (
    build,
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
    renorm_for,
    residual,
)
from steadynorm.evidence.training import (
    Recipe,
    accuracy_in_training,
    inference_accuracy,
    train,
)


@pytest.fixture(scope="module")
def digits():
    """Ten classes that differ in which column is bright: easy, and made here."""
    rng = np.random.default_rng(0)

    def some(count):
        labels = np.arange(count) % 10
        images = rng.normal(0, 0.1, (count, 4, 10)).astype(np.float32)
        images[np.arange(count), :, labels] += 1
        return images, labels.astype(np.int64)

    return Digits("columns", *some(200), *some(50))


def network_of(statistics, seed=0):
    network = fully_connected(40, normalization_1d(statistics), widths=(16, 16))
    initialize(network, seed)
    return network


def test_the_rate_rises_and_falls_in_one_cycle():
    recipe = Recipe(batch_size=32, samples=3200, rate=0.1)
    rates = [recipe.rate_at(step) for step in range(recipe.steps)]
    assert recipe.steps == 100
    assert rates[0] == pytest.approx(0.05 / 25)
    assert rates[30] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.05)
    assert rates[15] == pytest.approx((0.05 + 0.05 / 25) / 2)
    assert rates[65] == pytest.approx(0.025)
    assert 0 <= rates[99] < 1e-4
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)


def test_recipe_names_the_field_that_is_wrong():
    with pytest.raises(ValueError, match=r"^Recipe: `batch_size` must be at least 1; got 0\.$"):
        Recipe(batch_size=0, samples=10)


def test_every_digit_is_seen_once_an_epoch():
    order = batches(10, 3, seed=1)
    seen = torch.cat([next(order) for _ in range(10)])
    for epoch in seen.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    again = batches(10, 3, seed=1)
    assert torch.equal(seen, torch.cat([next(again) for _ in range(10)]))


@pytest.mark.parametrize("statistics", [None, "torch", "batch", "steady"])
def test_it_learns(digits, statistics):
    result = train(network_of(statistics), digits, Recipe(8, 2400), seed=0)
    assert result.stopped is None
    assert result.accuracy > 0.9
    assert result.points[-1].step == 300
    assert result.points[-1].loss < result.points[0].loss


def test_torchs_layer_and_ours_train_alike(digits):
    theirs, ours = (
        train(network_of(kind), digits, Recipe(8, 400), seed=0) for kind in ("torch", "batch")
    )
    for one, other in zip(theirs.points, ours.points, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)


def test_the_same_seed_gives_the_same_run(digits):
    one, other = (train(network_of("steady"), digits, Recipe(2, 200), seed=3) for _ in range(2))
    assert one == other
    assert one != train(network_of("steady"), digits, Recipe(2, 200), seed=4)


def test_a_layer_that_refuses_ends_the_run(digits):
    result = train(network_of("batch"), digits, Recipe(1, 100), seed=0)
    assert "more than one value per channel" in result.stopped
    assert result.points == []
    assert result.accuracy_in_training is None


def test_a_loss_that_is_not_finite_ends_the_run(digits):
    network = network_of(None)
    with torch.no_grad():
        network[-1].bias[0] = math.nan
    assert train(network, digits, Recipe(8, 80), seed=0).stopped == "the loss was nan at step 0"


def test_ticks_add_up_to_the_steps(digits):
    told = []
    train(network_of(None), digits, Recipe(8, 360), seed=0, tick=told.append)
    assert sum(told) == 45


@pytest.mark.parametrize("statistics", ["torch", "steady", "running"])
def test_measuring_leaves_the_network_as_it_was(digits, statistics):
    network = network_of(statistics)
    train(network, digits, Recipe(8, 160), seed=0)
    network[1].requires_grad_(False)
    network[2].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    images, labels, *_ = tensors(digits)
    inference_accuracy(network, images, labels)
    accuracy_in_training(network, images, labels, 4)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert modes == [module.training for module in network.modules()]
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_accuracies_against_a_count_by_hand(digits):
    network = network_of("torch")
    train(network, digits, Recipe(8, 400), seed=0)
    _, _, images, labels = tensors(digits)
    train_mode = copy.deepcopy(network).train()
    right = 0
    for start in range(0, 48, 4):
        answers = copy.deepcopy(train_mode)(images[start : start + 4]).argmax(1)
        right += int((answers == labels[start : start + 4]).sum())
    assert accuracy_in_training(network, images, labels, 4) == right / 48
    answers = network.eval()(images).argmax(1)
    assert inference_accuracy(network, images, labels) == float((answers == labels).double().mean())


def test_test_digits_that_fill_no_batch_have_no_accuracy_in_training(digits):
    result = train(network_of("batch"), digits, Recipe(64, 640), seed=0)
    assert result.stopped is None
    assert (result.accuracy_in_training, result.error_in_training) == (None, None)


def test_networks_start_alike_whatever_normalizes_them():
    plain, normalized = network_of(None, seed=7), network_of("batch", seed=7)
    mine = [module.weight for module in plain if isinstance(module, nn.Linear)]
    theirs = [module.weight for module in normalized if isinstance(module, nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert normalized[1].bias is None
    assert torch.equal(plain[1].bias, torch.zeros(16))


@pytest.mark.parametrize("make", [convolutional, residual])
def test_the_convolutional_networks_take_any_size(make):
    network = make(normalization_2d("torch"))
    for size in (8, 14):
        assert network(torch.zeros(2, 1, size, size)).shape == (2, 10)


def test_the_residual_network_is_14_layers_deep():
    network = residual(normalization_2d("torch"))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    shortcuts = [m for m in layers if getattr(m, "kernel_size", None) == (1, 1)]
    assert (len(layers) - len(shortcuts), len(shortcuts)) == (14, 2)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15
    bare = [m for m in residual(None).modules() if isinstance(m, nn.BatchNorm2d | nn.Conv2d)]
    assert len(bare) == 15
    assert all(conv.bias is not None for conv in bare)


def test_every_width_but_the_first_halves_the_size():
    network = residual(None, widths=(8, 16, 8), blocks=1)
    assert network[:-3](torch.zeros(1, 1, 16, 16)).shape == (1, 8, 4, 4)


def test_an_unknown_kind_of_network_is_refused(digits):
    with pytest.raises(
        ValueError, match=r"^build: `kind` must be one of fully connected, .*; got "
    ):
        build("convolutionl", "batch", digits, 0)


def test_renorms_schedule_fits_the_run():
    policy = renorm_for(3000)
    assert policy.bounds(0) == (1.0, 0.0)
    assert policy.bounds(93) == (1.0, 0.0)
    assert policy.bounds(750) == (3.0, 5.0)


def test_interval_of_five():
    # mean 3, standard deviation sqrt(2.5); t(0.975, 4) = 2.7764
    found = mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.value == 3.0
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), rel=1e-3)
    assert found.plus_minus == "3.0 ± 2.0"
    assert mean([2.0]).plus_minus == "2.0"
    with pytest.raises(ValueError, match=r"^mean: `values` must hold at least one run; got none"):
        mean([])
