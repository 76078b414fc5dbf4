"""Folding: against float64, where PyTorch's helpers fail, and everything it must refuse."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn
from torch.nn.utils import fusion

import steadynorm as sn
from steadynorm.models.fold import fold

NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def in_float64(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def check(model: nn.Module, x: Tensor, *, folded: int, by: str = "both") -> nn.Module:
    """Folds with and without example inputs; both must answer as the model in float64 does."""
    disturb(model).eval()
    before = copy.deepcopy(model.state_dict())
    expected = in_float64(model, x)
    assert float(expected.std()) > 0  # a constant would hide a wrong scale
    for inputs in {"both": (None, x), "record": (x,), "fx": (None,)}[by]:
        result, changes = fold(model, inputs)
        assert changes.tally().get("folded", 0) == folded, changes
        torch.testing.assert_close(result(x).double(), expected, rtol=2e-5, atol=2e-5)
        remaining = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in result.modules())
        assert remaining == len(changes) - folded
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


class Forward(nn.Module):
    """Layers `conv`, `bn` and what is given, called by a function given."""

    def __init__(self, function: Any, **layers: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_convolution(axes: int, groups: int, bias: bool, affine: bool) -> None:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    conv = kind(4, 8, 3, padding=1, dilation=2, groups=groups, bias=bias)
    check(
        nn.Sequential(conv, NORM[axes](8, affine=affine)), torch.randn(2, 4, *[7] * axes), folded=1
    )


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolution(axes: int, groups: int, bias: bool) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    conv = kind(4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    check(nn.Sequential(conv, NORM[axes](8)), torch.randn(2, 4, *[5] * axes), folded=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_linear(bias: bool, affine: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6, affine=affine))
    check(model, torch.randn(7, 5), folded=1)


def test_depthwise_and_one_channel() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), nn.Conv2d(6, 1, 1), nn.BatchNorm2d(1)
    )
    check(model, torch.randn(2, 6, 5, 5), folded=2)


@pytest.mark.parametrize(
    "after",
    [
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 6, 3, bias=False, stride=2),
        nn.Conv2d(4, 6, 3, padding="valid"),
        nn.Conv2d(4, 6, 1, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    ],
)
def test_before_an_unpadded_convolution(after: nn.Module) -> None:
    check(nn.Sequential(nn.BatchNorm2d(4), after), torch.randn(2, 4, 6, 6), folded=1)


def test_before_a_linear_layer() -> None:
    check(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(5, 4), folded=1)


def test_batch_norm_after_batch_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4))
    result = check(model, torch.randn(2, 4, 3, 3), folded=1)
    assert isinstance(result[1], nn.Identity)


def test_chain_of_batch_norms_folds_whole() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4)
    )
    check(model, torch.randn(2, 3, 3, 3), folded=3)


class Several(nn.Module):
    """One batch norm before several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return self.first(y) * self.second(y)


def test_into_several_consumers() -> None:
    check(Several(), torch.randn(5, 4), folded=1)


# Refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), "pads with zeros"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="same")), "pads with zeros"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 4, 3)), "at the borders"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)), "relu, not to a linear"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "keeps no running statistics",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
            "relu, not from a linear",
        ),
    ],
)
def test_left_with_the_reason(model: nn.Module, why: str) -> None:
    x = torch.randn(2, 3, 5, 5)
    _, changes = fold(disturb(model).eval(), x)
    assert changes.tally() == {"left": 1}
    assert why in changes[0].why
    check(model, x, folded=0)


def test_hooks_and_parametrizations_are_respected() -> None:
    x = torch.randn(2, 3, 5, 5)
    for spoil, why in (
        (lambda m: m[0].register_forward_hook(lambda *a: None), "forward hooks"),
        (lambda m: m[1].register_forward_hook(lambda *a: None), "forward hooks"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "parametrized"),
    ):
        model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
        spoil(model)
        _, changes = fold(model, x)
        assert why in changes.left[0].why


class Standardized(nn.Conv2d):
    """Standardizes its weights, so scaling them does nothing."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight / weight.norm(), self.bias)


def test_subclass_with_its_own_forward_stays() -> None:
    model = nn.Sequential(Standardized(3, 4, 3), nn.BatchNorm2d(4))
    check(model, torch.randn(2, 3, 5, 5), folded=0)


@pytest.mark.parametrize("at", [0, 1])
def test_a_forward_of_the_object_itself_stays(at: int) -> None:
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    layer = model[at]
    layer.forward = lambda x: type(layer).forward(layer, x) * 2 + 1
    for inputs in (None, torch.randn(2, 3, 4, 4)):
        _, changes = fold(model, inputs)
        assert "its forward has been replaced" in changes.left[0].why


def test_weights_that_half_precision_cannot_hold_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(300)
        model[1].running_var.fill_(1e-6)
    _, changes = fold(model.half())
    assert "float16 cannot hold the weights" in changes.left[0].why
    assert fold(model.bfloat16())[1].tally() == {"folded": 1}


def test_a_model_without_values_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval().to("meta")
    with pytest.raises(ValueError, match=r"must hold values .* on the meta device"):
        fold(model)


def test_compiled_by_jit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    scripted = torch.jit.script(model)
    for compiled in (scripted, nn.Sequential(scripted)):
        for call in (
            sn.fold,
            sn.convert,
            sn.drop_redundant_bias,
            lambda m: sn.calibrate(m, [torch.randn(4, 3)]),
            lambda m: sn.parameter_groups(m, weight_decay=0.1),
        ):
            with pytest.raises(TypeError, match=r"`model` must not be compiled by torch.jit"):
                call(compiled)  # type: ignore[operator]


def test_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fold: `model` must be in inference.*model.eval\(\)"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))


def test_one_batch_norm_in_training_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    _, changes = fold(model)
    assert changes.left[0].why == "it is in training"


def test_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fold: `model` must be a torch.nn.Module; got str"):
        fold("model")  # type: ignore[type-var]


def test_nothing_to_do() -> None:
    model = nn.Linear(2, 2).eval()
    _, changes = fold(model)
    assert changes == []
    assert str(changes) == "nothing to do"


def test_a_wrong_result_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    folding = sys.modules["steadynorm.models.fold"]
    monkeypatch.setattr(folding, "scale_output", lambda layer, scale, shift: None)
    with pytest.raises(RuntimeError, match="fold: output 0 of the changed model differs by"):
        fold(model, torch.randn(2, 3, 4, 4))


# Manners ---------------------------------------------------------------------------------------


def test_original_is_left_and_inplace_is_not() -> None:
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    result, _ = fold(model)
    assert result is not model
    assert isinstance(model[1], nn.BatchNorm2d)
    result, _ = fold(model, inplace=True)
    assert result is model
    assert isinstance(model[1], nn.Identity)


def test_modes_random_state_and_buffers_are_left_alone() -> None:
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))).eval()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result, _ = fold(model, torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in result.modules())


def test_requires_grad_type_and_memory_format_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).to(
        memory_format=torch.channels_last
    )
    disturb(model).eval().requires_grad_(False)
    result, _ = fold(model.bfloat16())
    weight = result[0].weight
    assert weight.dtype is torch.bfloat16
    assert not weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_other_inputs_by_name_and_nested() -> None:
    model = disturb(Forward(lambda m, x: m.bn(m.conv(x["image"][0])))).eval()
    batch = {"x": {"image": [torch.randn(2, 3, 4, 4)]}}
    result, changes = fold(model, batch)
    assert changes.tally() == {"folded": 1}
    torch.testing.assert_close(result(**batch), model(**batch), rtol=1e-5, atol=1e-5)


# Our layers -------------------------------------------------------------------------------------


def test_activation_inside_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), sn.BatchNorm2d(4, activation="relu"))
    result = check(model, torch.randn(2, 3, 4, 4), folded=1)
    assert isinstance(result[1], nn.ReLU)


def test_activation_inside_keeps_it_from_the_layer_after() -> None:
    model = nn.Sequential(sn.BatchNorm1d(3, activation="tanh"), nn.Linear(3, 2))
    check(model, torch.randn(5, 3), folded=0)


@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm", "ghost", "frozen"])
def test_every_policy_and_no_bias(policy: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.BatchNorm1d(4, statistics=policy))
    check(model, torch.randn(5, 3), folded=1)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), sn.BatchNorm1d(4, bias=False))
    model[1].running_mean.normal_()
    result, _ = fold(model.eval())
    x = torch.randn(5, 3)
    torch.testing.assert_close(result(x), model(x), rtol=1e-5, atol=1e-5)


def test_residual_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x), residual=x[:, :1].expand(-1, 4, -1, -1))

    model = Forward(forward)
    model.bn = sn.BatchNorm2d(4, activation="relu")
    check(model, torch.randn(2, 3, 4, 4), folded=0)


# Where PyTorch's own helpers fail ----------------------------------------------------------------


def test_grouped_transposed_where_torch_raises() -> None:
    model = disturb(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8))).eval()
    with pytest.raises(RuntimeError):
        fusion.fuse_conv_bn_eval(model[0], model[1], transpose=True)
    check(model, torch.randn(2, 4, 5, 5), folded=1)


def test_transposed_without_flag_where_torch_is_silently_wrong() -> None:
    model = disturb(nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))).eval()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        wrong = fusion.fuse_conv_bn_eval(model[0], model[1])(x)
        assert float((wrong - model(x)).abs().max()) > 0.1
    check(model, x, folded=1)


def test_linear_without_affine_where_torch_raises() -> None:
    model = disturb(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))).eval()
    with pytest.raises(TypeError):
        fusion.fuse_linear_bn_eval(model[0], model[1])
    check(model, torch.randn(5, 3), folded=1)


def test_half_precision_where_torch_loses_more() -> None:
    model = disturb(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))).eval()
    with torch.no_grad():
        model[1].running_mean.mul_(300)
        model[0].bias.copy_(model[1].running_mean)
    x = torch.randn(32, 64)
    expected = in_float64(model, x)
    half = copy.deepcopy(model).half()
    ours, _ = fold(half)
    theirs = fusion.fuse_linear_bn_eval(half[0], half[1])
    error = {
        name: float((in_float64(m, x) - expected).abs().mean())
        for name, m in (("ours", ours), ("theirs", theirs))
    }
    assert error["ours"] <= error["theirs"]


@pytest.mark.parametrize("host", [nn.Linear(3, 3), nn.ConvTranspose1d(3, 3, 1)])
def test_weights_that_half_precision_rounds_to_zero_stay(host: nn.Module) -> None:
    model = nn.Sequential(host, nn.BatchNorm1d(3)).eval()
    with torch.no_grad():
        host.weight.copy_(torch.randn_like(host.weight) * 1e-4)
        model[1].running_var.fill_(60_000)
    _, changes = fold(model.half())
    assert "float16 cannot tell the weights that it would get from zero" in changes.left[0].why


def test_batch_norms_in_half_precision_fold_into_one_another() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    folded, changes = fold(model.eval().half())
    assert [change.where for change in changes if change.what == "folded"] == ["3"]
    assert all(parameter.dtype == torch.float16 for parameter in folded.parameters())
