"""Layers whose statistics stay as they are, each named with its reason."""

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.freeze import freeze


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 write it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None]


class Own(nn.Module):
    """A network in which every layer but `plain` must be left."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm2d(2)
        self.policy = sn.BatchNorm2d(2, statistics="frozen")
        self.called, _ = freeze(nn.BatchNorm2d(2))
        self.lookalike = FrozenBatchNorm2d(2)
        self.untracked = nn.BatchNorm2d(2, track_running_stats=False)
        self.never = nn.BatchNorm2d(2)
        self.held = nn.BatchNorm2d(2).eval()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.plain, self.policy, self.called, self.lookalike, self.untracked):
            x = layer(x)
        return self.held(x)


REASONS = {
    "policy": "frozen",
    "called": "frozen",
    "lookalike": "frozen",
    "untracked": "keeps no running statistics",
    "never": "no value reached it",
    "held": "held in inference mode while the model is in training mode",
}


@pytest.mark.parametrize("passes", ["one", "layerwise"])
def test_layers_are_left_and_named(passes: str) -> None:
    model = Own()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(4, 2, 3, 3) + 5
    report = sn.calibrate(model, [x], passes=passes, progress=False)
    assert {layer.name: layer.reason for layer in report.left} == REASONS
    assert [layer.name for layer in report.moved] == ["plain"]
    changed = {
        key for key, value in model.state_dict().items() if not torch.equal(value, before[key])
    }
    assert changed == {f"plain.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}


def test_a_model_in_inference_holds_nothing() -> None:
    report = sn.calibrate(Own().eval(), [torch.randn(4, 2, 3, 3)], progress=False)
    assert [layer.name for layer in report.moved] == ["plain", "held"]


def test_frozen_weights_do_not_hold_statistics() -> None:
    layer = nn.BatchNorm1d(2).requires_grad_(False)
    assert sn.calibrate(layer, [torch.randn(4, 2)], progress=False).moved


def test_frozen_layers_normalize_with_their_own_statistics() -> None:
    frozen = sn.BatchNorm1d(2, statistics="frozen")
    frozen.running_mean.fill_(3.0)
    frozen.running_var.fill_(4.0)
    last = nn.BatchNorm1d(2)
    x = torch.randn(50, 2)
    sn.calibrate(nn.Sequential(frozen, last), [x], progress=False)
    torch.testing.assert_close(last.running_mean, ((x - 3) / (4 + 1e-5) ** 0.5).mean(0))


def test_nothing_to_do_is_said_and_no_batch_is_read() -> None:
    def unread():
        raise AssertionError("read")
        yield

    report = sn.calibrate(nn.Linear(2, 2), unread(), progress=False)
    assert report.layers == ()
    assert str(report) == "nothing to calibrate: the model has no batch norms"
    only_frozen = sn.BatchNorm1d(2, statistics="frozen")
    assert "left: frozen" in str(sn.calibrate(only_frozen, unread(), progress=False))


def test_a_lazy_model_is_refused_whole() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError) as refusal:
        sn.calibrate(model, [torch.randn(4, 2)], progress=False)
    assert str(refusal.value) == (
        "calibrate: every part of `model` must have its parameters; '0' is lazy and has not seen "
        "an input yet. Run the model on one batch first."
    )
    assert isinstance(model[1], nn.LazyBatchNorm1d)


def test_subclasses_with_their_own_forward_are_calibrated() -> None:
    class WithActivation(nn.BatchNorm2d):  # timm's BatchNormAct2d in shape
        def forward(self, x: Tensor) -> Tensor:
            mean, var = (None, None) if self.training else (self.running_mean, self.running_var)
            return nn.functional.batch_norm(
                x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps
            ).relu()

    first, second = WithActivation(2), nn.SyncBatchNorm(2)
    x = torch.randn(6, 2, 3, 3) * 3 + 1
    sn.calibrate(nn.Sequential(first, second), x.split(3), passes="layerwise", progress=False)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True).add(1e-5).sqrt()
    torch.testing.assert_close(first.running_mean, mean.flatten())
    torch.testing.assert_close(second.running_mean, ((x - mean) / std).relu().mean((0, 2, 3)))


def test_layers_that_hold_the_same_statistics_are_left() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].running_mean, model[1].running_var = model[0].running_mean, model[0].running_var
    report = sn.calibrate(model, [torch.randn(8, 3) + 1])
    assert [layer.reason for layer in report.left] == [
        "another layer holds the same running statistics"
    ] * 2
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert [layer.name for layer in report.moved] == ["2"]
