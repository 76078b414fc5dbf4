"""What the experiments from a batch of one to the cost measure; each of them from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("altair", reason="charts need the extra lab")

from tests.evidence.lab.checks import runs_from_end_to_end

import steadynorm as sn
from steadynorm.evidence.digits import Digits, load
from steadynorm.evidence.lab.experiments import (
    before_or_after,
    bias,
    cost,
    get,
    recurrent,
    running_average_in_training,
    shifted_data,
    small_batches,
    training_against_inference,
)
from steadynorm.evidence.lab.runs import FinishedRun, Runs
from steadynorm.evidence.networks import normalization_1d, normalization_2d
from steadynorm.models.fuse import Fused

SHORT: dict[str, dict[str, Any]] = {
    "batch_of_one": {"samples": 64, "networks": 1},
    "steady_parts": {"samples": 64, "networks": 1},
    "training_against_inference": {"samples": 512},
    "shifted_data": {"samples": 128},
    "bias": {"steps": 5},
    "running_average_in_training": {"samples": 128},
    "before_or_after": {"samples": 128},
    "recurrent": {"steps": 2},
    "cost": {"rounds": 1, "batch": 8, "width": 16, "size": 6},
}


@pytest.fixture(scope="module")
def digits() -> Digits:
    pytest.importorskip("sklearn", reason="the lab needs the extra lab")
    return load(None)


@pytest.mark.parametrize("name", SHORT)
def test_each_runs_from_end_to_end(name: str, digits: Digits, tmp_path: Path) -> None:
    experiment = get(name)
    assert len(experiment.settings["quick"]) <= len(experiment.settings["full"])
    wanted = [{**setting, **SHORT[name]} for setting in experiment.settings["quick"]]
    runs_from_end_to_end(experiment, wanted, digits, tmp_path)


def test_every_setting_of_small_batches_can_be_built() -> None:
    for setting in small_batches.SETTINGS["full"]:
        plane = setting["network"] == "convolutional"
        normalization = normalization_2d if plane else normalization_1d
        made = normalization(small_batches.statistics(setting))
        assert (made is None) is ("none" in setting.values())
        if made is not None:
            x = torch.randn(3, 8, 2, 2) if plane else torch.randn(3, 8)
            y = made(8).eval()(x)
            assert y.shape == x.shape
            assert y.isfinite().all()


def test_what_was_not_measured_is_none_and_no_number(digits: Digits) -> None:
    """Test digits that fill no batch; a network whose loss is not finite at once."""
    few = digits._replace(test_images=digits.test_images[:32], test_labels=digits.test_labels[:32])
    setting = {"statistics": "batch", "batch": 64, "samples": 128}
    result = running_average_in_training.run(setting, 0, few, lambda steps: None)
    assert result["error_in_training"] is None
    result = training_against_inference.run(setting, 0, few, lambda steps: None)
    assert result["training"] == [None, None]
    assert result["training at the end"] is None
    broken = digits._replace(train_images=digits.train_images * float("nan"))
    setting = {"placement": "before", "activation": "relu", "depth": 1, "samples": 64}
    result = before_or_after.run(setting, 0, broken, lambda steps: None)
    assert result["stopped"] == "the loss was nan at step 0"
    assert result["mean_loss"] is None


# Small batches --------------------------------------------------------------------------------


def test_a_frozen_tail_freezes_once() -> None:
    setting = {"network": "convolutional", "batch": 2, "policy": "frozen tail"}
    setting |= {"samples": 80, "clip": None}
    freeze = small_batches.frozen_tail(setting)
    network = nn.Sequential(sn.BatchNorm2d(3), nn.ReLU())
    policies = []
    for step in range(29, 32):
        freeze(step, network)
        policies.append(network[0].statistics)
    assert policies == [sn.Batch(), sn.Frozen(), sn.Frozen()]


# The others -----------------------------------------------------------------------------------


def test_networks_with_and_without_a_bias_differ_in_it_alone(digits: Digits) -> None:
    for kind in ("fully connected", "convolutional"):
        setting = {"network": kind, "statistics": "batch", "type": "float64", "steps": 1}
        without, with_it = (bias.build(setting, digits, 3, bias=b) for b in (False, True))
        own, other = without.state_dict(), with_it.state_dict()
        extra = other.keys() - own.keys()
        assert len(extra) == 3
        assert all(float(other[name].abs().min()) > 0 for name in extra)
        torch.testing.assert_close(own, {name: other[name] for name in own}, rtol=0, atol=0)
        moved = bias.perturbed(bias.build(setting, digits, 3, bias=False)).state_dict()
        changed = [name for name in own if not torch.equal(own[name], moved[name])]
        assert changed == [next(iter(dict(without.named_parameters())))]
        torch.testing.assert_close(moved[changed[0]], own[changed[0]], rtol=3e-16, atol=0)


def test_where_the_normalization_stands() -> None:
    kinds = {
        "before": ["Linear", "BatchNorm1d", "Tanh"],
        "after": ["Linear", "Tanh", "BatchNorm1d"],
        "none": ["Linear", "Tanh"],
    }
    for placement, names in kinds.items():
        made = before_or_after.build(4, placement, "tanh", depth=2)
        found = [type(module).__name__ for module in made]  # type: ignore[attr-defined]
        assert found == ["Flatten", *names, *names, "Linear"]


def test_shifts_do_what_they_are_called() -> None:
    torch.manual_seed(0)
    images = torch.randn(40, 1, 8, 8)
    noisy = shifted_data.shifted(images, "noise", seed=1) - images
    assert float(noisy.std()) == pytest.approx(0.8, rel=0.05)
    flat = shifted_data.shifted(images, "contrast", seed=1)
    assert float(flat.std() / images.std()) == pytest.approx(0.25)
    assert float(flat.mean()) == pytest.approx(float(images.mean()), abs=1e-6)
    torch.testing.assert_close(shifted_data.shifted(images, "brightness", seed=1) - images,
                               torch.full_like(images, 1.5))  # fmt: skip
    blurred = shifted_data.shifted(images, "blur", seed=1)
    assert float(blurred[3, 0, 4, 5]) == pytest.approx(float(images[3, 0, 3:6, 4:7].mean()))
    corner = (4 * images[0, 0, 0, 0] + 2 * images[0, 0, 0, 1] + 2 * images[0, 0, 1, 0]
              + images[0, 0, 1, 1]) / 9  # fmt: skip
    assert float(blurred[0, 0, 0, 0]) == pytest.approx(float(corner))
    assert torch.equal(shifted_data.shifted(images, "none", seed=1), images)


def test_the_share_of_a_gap_that_is_closed() -> None:
    ends = [(10.0, 6.0, 5.0), (8.0, 8.0, 6.0), (4.0, 5.0, 5.0)]  # the last has no gap
    names = ("running at the end", "calibrated at the end", "population at the end")
    runs = Runs(
        FinishedRun({"batch": 2}, seed, dict(zip(names, row, strict=True)))
        for seed, row in enumerate(ends)
    )
    assert training_against_inference.closed(runs, 2) == pytest.approx([0.8, 0.0, 0.0])


def test_a_reader_reads_every_pixel_once_in_one_order() -> None:
    images = torch.arange(16.0).reshape(1, 1, 4, 4)
    read: list[torch.Tensor] = []
    for task in recurrent.TASKS:
        reader = recurrent.Reader(task, "lstm", 4, 4)
        reader.reader.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        reader(images)
    rows, pixels, permuted = read
    assert torch.equal(rows[:, 0], images[0, 0])
    assert torch.equal(pixels[:, 0, 0], torch.arange(16.0))
    assert not torch.equal(permuted, pixels)
    assert torch.equal(permuted.flatten().sort().values, torch.arange(16.0))
    other = recurrent.Reader("permuted", "0.1", 4, 4)
    assert torch.equal(other.order, reader.order)
    norm = other.reader.cells[0].hidden_norm  # type: ignore[index, union-attr]
    assert bool((norm.weight == 0.1).all())
    assert len(norm.steps) == 16


def test_calibration_leaves_the_network_in_training_alone() -> None:
    torch.manual_seed(0)
    network = recurrent.Reader("rows", "1", 4, 4)
    images = torch.randn(20, 1, 4, 4)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    other = recurrent.calibrated(network, images)
    assert other is not network
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    step = other.reader.cells[0].input_norm.steps[2]  # type: ignore[index, union-attr]
    assert int(step.num_batches_tracked) == 1
    plain_one = recurrent.Reader("rows", "lstm", 4, 4)
    assert recurrent.calibrated(plain_one, images) is plain_one


def test_what_is_timed_computes_the_same() -> None:
    for setting in cost.SETTINGS["quick"]:
        small = {**setting, "batch": 4, "width": 8, "size": 8}
        x = torch.randn(4, 1, 8, 8)
        answers = {kind: cost.build(small, kind).train()(x) for kind in cost.KINDS}
        for kind in ("apart", "fused"):
            torch.testing.assert_close(answers[kind], answers["torch"], rtol=1e-4, atol=1e-4)
        for kind in ("none", "folded"):  # new statistics, 0 and 1, leave nothing but the weights
            assert not torch.allclose(answers[kind], answers["torch"], atol=1e-2)
            torch.testing.assert_close(answers[kind], answers["none"], rtol=1e-3, atol=1e-3)
        assert any(isinstance(m, Fused) for m in cost.build(small, "fused").modules())
        assert not any(isinstance(m, Fused) for m in cost.build(small, "apart").modules())
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm)
                       for m in cost.build(small, "folded").modules())  # fmt: skip
