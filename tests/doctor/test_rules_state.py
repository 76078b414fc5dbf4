"""What the rules of state say besides their fixtures: other severities, messages and frameworks."""

from __future__ import annotations

import json
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.doctor.fixtures.small import small
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.doctor import Finding, Severity, diagnose


def found(target: Any, code: str, **given: Any) -> list[Finding]:
    return [f for f in diagnose(target, **given).findings if f.code == code]


def said(target: Any, code: str, **given: Any) -> list[tuple[str, str, str]]:
    return [(f.layer, str(f.severity), f.message) for f in found(target, code, **given)]


def norm(**values: Any) -> dict[str, Tensor]:
    """A state dict of one layer of four channels, `small`'s but for what is given."""
    held = {name: tensor.clone() for name, tensor in small()[1].state_dict().items()}
    for name, value in values.items():
        held[name] = torch.as_tensor(value, dtype=held[name].dtype)
    return held


FRESH = {"running_mean": [0.0] * 4, "running_var": [1.0] * 4}


# --- SN101 statistics never updated


@pytest.mark.parametrize(
    ("values", "severity", "why"),
    [
        ({"num_batches_tracked": 9}, "error", ", after 9 batches"),
        ({"num_batches_tracked": 0}, "error", ", but weight and bias were trained"),
        (
            {"num_batches_tracked": 0, "bias": [0.0] * 4},
            "info",
            "; nothing in this model was trained yet",
        ),
    ],
    ids=["counted", "trained", "fresh"],
)
def test_statistics_never_updated(values: dict[str, Any], severity: str, why: str) -> None:
    message = f"running_mean is 0 and running_var is 1 in all 4 channels{why}"
    assert said(norm(**FRESH, **values), "SN101") == [("", severity, message)]


BESIDE = (
    "running_mean is 0 and running_var is 1 in all 4 channels, but 1 of 2 layers have statistics"
)


@pytest.mark.parametrize(
    ("affine", "severity", "why"),
    [(True, "warning", "; nothing of this one was trained"), (False, "error", "")],
)
def test_statistics_never_updated_beside_layers_that_were(
    affine: bool, severity: str, why: str
) -> None:
    model = small()
    model[4] = nn.BatchNorm2d(4, affine=affine)
    assert said(model, "SN101") == [("4", severity, f"{BESIDE}{why}")]
    assert said(model.state_dict(), "SN101") == [("4", severity, f"{BESIDE}{why}")]


def test_a_layer_that_no_forward_reaches() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()
            self.body[4], self.head = nn.Identity(), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    assert said(Unused(), "SN101") == [("head", "info", f"{BESIDE}; no forward reaches this one")]


@pytest.mark.parametrize(
    ("weight", "severity"),
    [([1.0] * 4, "info"), ([0.0] * 4, "info"), ([0.9, 1.0, 1.1, 1.2], "error")],
)
def test_a_weight_without_a_bias_tells_of_training(weight: list[float], severity: str) -> None:
    held = norm(**FRESH, weight=weight, num_batches_tracked=0)
    del held["bias"]
    assert [f.severity.name.lower() for f in found(held, "SN101")] == [severity]


def test_random_weights_at_the_start_are_no_training() -> None:
    """Some libraries draw γ from a normal distribution; β still starts at 0."""
    held = norm(**FRESH, weight=[0.02, -0.01, 0.03, 0.01], bias=[0.0] * 4, num_batches_tracked=0)
    assert [f.severity.name for f in found(held, "SN101")] == ["INFO"]


# --- SN102 non-finite values


def test_trained_values_that_are_not_finite_have_no_line() -> None:
    (finding,) = found(norm(weight=[1.0, float("nan"), float("-inf"), 1.0]), "SN102")
    assert (
        finding.message == "weight is NaN in 1 of 4 channels; weight is infinite in 1 of 4 channels"
    )
    assert finding.evidence == {"channels": 4, "weight_nan": 1, "weight_infinite": 1}
    assert (finding.line, finding.safe) == ("", None)
    (finding,) = found(norm(running_mean=[1.0, float("inf"), 1.0, 1.0]), "SN102")
    assert (finding.line, finding.safe) == ("sn.calibrate(model, batches)", False)


# --- SN104 vanishing variance


@pytest.mark.parametrize(
    ("var", "severity", "message"),
    [
        (
            [0.0] * 4,
            "error",
            "running_var is 0 in all 4 channels: inference multiplies by 1/√eps = 316",
        ),
        ([1.0, 1.0, 1.0, 9e-6], "info", "running_var lies below eps = 1e-05 in 1 of 4 channels"),
        (
            [1.0, 1.0, 1.0, 0.0],
            "info",
            "running_var lies below eps = 1e-05 in 1 of 4 channels, below a tenth of it in 1",
        ),
        (
            [0.0, 9e-8, 1.1e-7, 1.0],
            "warning",
            "running_var lies below eps = 1e-05 in 3 of 4 channels, below a tenth of it in 3",
        ),
    ],
)
def test_vanishing_variance(var: list[float], severity: str, message: str) -> None:
    assert said(norm(running_var=var), "SN104") == [("", severity, message)]


def test_variance_is_judged_by_the_frameworks_eps() -> None:
    """A checkpoint does not say it: 1e-5 for torch, 1e-3 for Keras."""
    held = {k: np.full(4, v) for k, v in (("gamma", 1.0), ("beta", 0.1), ("moving_mean", 0.2))}
    keras = {f"a/{name}": array for name, array in held.items()}
    keras["a/moving_variance"] = np.full(4, 5e-4)
    assert [f.evidence["eps"] for f in found(keras, "SN104")] == [1e-3]
    assert found(norm(running_var=[5e-4] * 4), "SN104") == []


def test_eps_that_counts_beside_shrunk_weights() -> None:
    """Variances of 2.5 eps: a seventh is lost. Without small weights before it that is nothing."""
    model = small()
    with torch.no_grad():
        model[1].running_var.fill_(2.5e-5)
    assert found(model, "SN104") == []
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    (finding,) = found(model, "SN104")
    assert finding.severity is Severity.WARNING
    assert "running_var lies below 3 eps = 3e-05 in 4 of 4 channels; '0' before" in finding.message


# --- SN105 dead scale


@pytest.mark.parametrize(
    ("weight", "bias", "severity", "message"),
    [
        (
            [0.0, 1.0, 1.0, 2.0],
            [0.1] * 4,
            "info",
            "weight is at most a thousandth of the largest (2) in 1 of 4 channels",
        ),
        (
            [0.0] * 4,
            [0.0] * 4,
            "info",
            "weight and bias are 0 in all 4 channels: the layer gives 0",
        ),
        (
            [0.0] * 4,
            [0.1] * 4,
            "warning",
            "weight is 0 in all 4 channels: the layer gives its bias alone",
        ),
    ],
)
def test_dead_scale(weight: Any, bias: Any, severity: str, message: str) -> None:
    assert said(norm(weight=weight, bias=bias), "SN105") == [("", severity, message)]


def test_small_weights_alike_are_not_dead() -> None:
    """Where all are small, whatever follows has learned to scale them."""
    assert found(norm(weight=[1e-5, 2e-5, -1e-5, 3e-5]), "SN105") == []


# --- SN106 half overflow when folded


def test_half_overflow_by_the_scale_alone() -> None:
    """A checkpoint does not say which weights the scale multiplies."""
    held = norm(weight=[300.0, 1.0, 1.0, 1.0], running_var=[1e-9, 1.0, 1.0, 1.0])
    (finding,) = found(held, "SN106")
    scale = 300 / (1e-9 + 1e-5) ** 0.5
    assert finding.evidence["scale"] == pytest.approx(scale, rel=1e-6)
    assert "folded_weight" not in finding.evidence
    assert finding.message == (
        "past float16's largest number (65504) in 1 of 4 channels; channel 0: scale is 9.49e+04, "
        "shift is -9.49e+03"
    )


def test_what_float16_holds_when_folded() -> None:
    """The rule's numbers are those of a layer that was folded."""
    model = small()
    with torch.no_grad():
        model[1].running_var[2], model[1].running_mean[2] = 1e-6, 1000.0
    (finding,) = found(model, "SN106")
    folded, _ = sn.fold(model)
    largest = float(folded[0].weight.detach().abs().max())
    assert finding.evidence["folded_weight"] == pytest.approx(largest, rel=1e-4)
    assert finding.evidence["shift"] == pytest.approx(float(folded[0].bias[2].detach()), rel=1e-4)
    assert not bool(torch.isfinite(folded[0].bias.detach().half()).all())


def test_a_channel_without_a_scale_does_not_hide_the_worst() -> None:
    layer = nn.BatchNorm1d(3, eps=0.0)
    layer.running_var.copy_(torch.tensor([0.0, 1e-12, 1.0]))  # 1/0 has no value
    (finding,) = found(layer, "SN106")
    assert finding.evidence["worst_channel"] == 1
    assert finding.message.startswith("past float16's largest number (65504) in 1 of 3 channels")


def test_a_large_mean_that_a_bias_made_folds_to_nothing() -> None:
    model = small()
    model[0].register_parameter("bias", nn.Parameter(torch.full((4,), 1e6)))
    model[1].running_mean.add_(1e6)
    assert found(model, "SN106") == []
    model[0].bias.data.zero_()
    assert found(model, "SN106") != []


def test_a_large_scale_over_small_weights_fits() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight[0] = 1e-4
        model[1].weight[0], model[1].running_var[0], model[1].running_mean[0] = 300, 1e-9, 0
    assert found(model, "SN106") == []
    assert found(model.state_dict(), "SN106") != []


# --- SN107 momentum, SN108 eps of another framework


@pytest.mark.parametrize(
    ("momentum", "training", "severities"),
    [
        (0.99, True, ["warning"]),
        (0.997, False, ["info"]),
        (1.0, True, ["warning"]),
        (0.1, True, []),
        (0.5, True, []),
        (None, True, []),
    ],
)
def test_momentum(momentum: float | None, training: bool, severities: list[str]) -> None:
    model = small().train(training)
    model[1].momentum = momentum
    assert [str(f.severity) for f in found(model, "SN107")] == severities


def test_momentum_of_a_policy_that_has_none() -> None:
    model, _ = sn.convert(small().train(), statistics="steady")
    model[1].momentum = 0.99
    assert found(model, "SN107") == []


def test_the_line_for_momentum_does_what_it_says() -> None:
    model = small().train()
    model[4].momentum = 0.98
    (finding,) = found(model, "SN107")
    exec(finding.line, {"model": model})
    assert model[4].momentum == pytest.approx(0.02)
    assert found(model, "SN107") == []


def test_eps_is_information_where_momentum_was_carried_over_too() -> None:
    """As in a network that was converted rightly, whose variances are narrow."""
    model = small()
    model[4].eps = 1e-3
    model[4].running_var.mul_(1e-4)
    assert [str(f.severity) for f in found(model, "SN108")] == ["warning"]
    model[1].momentum = 0.01
    assert [str(f.severity) for f in found(model, "SN108")] == ["info"]


def test_eps_that_changes_nothing_is_left_alone() -> None:
    model = small()
    model[4].eps = 1e-3  # beside variances of 1 to 4
    assert found(model, "SN108") == []


def test_eps_and_momentum_of_torch_in_a_keras_model(tmp_path: Any) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for number, value in enumerate((1.0, 0.1, 0.2, 1e-4)):
            file[f"layers/bn/vars/{number}"] = np.full(4, value, np.float32)
    config = '{"class_name": "BatchNormalization", "config": {"momentum": 0.1, "epsilon": 1e-05}}'
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.write(tmp_path / "w.h5", "model.weights.h5")
        archive.writestr("config.json", config)
    (momentum,) = found(tmp_path / "a.keras", "SN107")
    assert momentum.message == (
        "momentum is 0.1: for keras a new batch weighs 0.9, so that the statistics know as much as "
        "1.22 batches; torch would mean 0.1"
    )
    (eps,) = found(tmp_path / "a.keras", "SN108")
    assert (eps.severity.name, eps.line) == ("INFO", "")
    assert eps.evidence["largest_factor"] == pytest.approx((1.1e-4 / 1.1e-3) ** 0.5, rel=1e-4)


# --- SN109 half-precision statistics


def test_a_network_cast_to_be_shipped_is_information() -> None:
    model = small().half()
    assert [str(f.severity) for f in found(model, "SN109")] == ["info", "info"]


def test_rounding_that_shifts_a_channel() -> None:
    """A mean of 100 standard deviations in bfloat16 is off by up to a fifth of one."""
    model = small()
    model[4].running_mean[0], model[4].running_var[0] = 101, 1
    model = model.bfloat16()
    layers = {f.layer: f for f in found(model, "SN109")}
    assert [str(layers[name].severity) for name in ("1", "4")] == ["info", "warning"]
    assert layers["4"].message == (
        "running statistics are kept in bfloat16; rounding shifts a channel by up to 0.39 of its "
        "standard deviation"
    )


def test_our_layers_keep_float32() -> None:
    model, _ = sn.convert(small().train())
    assert found(model.bfloat16(), "SN109") == []


# --- SN110 lost count


def test_a_lost_count_that_nothing_goes_by_is_information() -> None:
    model = small()
    model[1].num_batches_tracked.zero_()
    message = "num_batches_tracked is 0 beside trained statistics"
    for target in (model, model.state_dict(), sn.convert(model, statistics="steady")[0]):
        assert said(target, "SN110") == [("1", "info", message)]
    model[1].momentum = None
    averaging = sn.convert(model, statistics="running")[0]
    assert said(averaging, "SN110") == [("1", "info", message)]
    for quiet in (sn.freeze(model)[0], nn.Sequential(nn.BatchNorm1d(3, momentum=None))):
        assert said(quiet, "SN110") == []
    assert said(norm(**FRESH, num_batches_tracked=0), "SN110") == []


def test_time_steps_beyond_the_longest_sequence_are_left_alone() -> None:
    torch.manual_seed(0)
    layer = sn.BatchNormLSTM(3, 4, max_length=6)
    layer(torch.randn(4, 8, 3))  # four steps of six
    for target in (layer, layer.state_dict()):
        assert len(diagnose(target).evidence.layers) == 18
        assert found(target, "SN101") == []
    layer.cells[0].input_norm.steps[0].reset_running_stats()
    found_now = found(layer, "SN101")
    assert found_now[0].layer == "cells.0.input_norm.steps.0"


EXTREMES = [0.0, -0.0, 1.0, -1.0, 1e-6, 1e-30, 1e30, 3e38, -3e38, np.inf, -np.inf, np.nan, 1e-45]


@st.composite
def states(draw: st.DrawFn) -> dict[str, Tensor]:
    """Layers of any size and type that hold anything at all."""
    held = {}
    for layer in range(draw(st.integers(1, 3))):
        size = draw(st.integers(0, 5))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
        for name in ("weight", "bias", "running_mean", "running_var"):
            if name.startswith("running") or draw(st.booleans()):
                values = draw(st.lists(st.sampled_from(EXTREMES), min_size=size, max_size=size))
                held[f"{layer}.{name}"] = torch.tensor(values, dtype=torch.float64).to(dtype)
    return held


@settings(max_examples=200, deadline=None, derandomize=True)
@given(states())
def test_any_state_is_judged_without_a_warning(held: dict[str, Tensor]) -> None:
    report = diagnose(held)
    assert str(report)
    for finding in report.findings:
        assert all(isinstance(value, int | float | str) for value in finding.evidence.values())
        assert not any(isinstance(value, np.generic) for value in finding.evidence.values())
    json.loads(report.to_json())
    json.loads(report.to_sarif())
    broken = {
        name.partition(".")[0]
        for name, tensor in held.items()
        if not bool(torch.isfinite(tensor).all())
    }
    assert {f.layer for f in report.findings if f.code == "SN102"} == broken
