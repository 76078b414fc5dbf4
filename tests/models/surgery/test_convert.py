"""Converting: every kind of batch norm, look-alikes by structure, and the way back."""

from __future__ import annotations

import copy
from threading import Lock
from typing import Any

import pytest
import torch
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.models.convert import BatchNorm, convert

# Look-alikes, made of the parts that the originals are made of


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: an activation inside, as a submodule, and a place for a dropout."""

    def __init__(self, size: int, act: nn.Module | None = None) -> None:
        super().__init__(size)
        self.drop = nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        if self.training:
            self.num_batches_tracked.add_(1)
        return self.act(self.drop(x))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's and detectron2's: four buffers and eps."""

    def __init__(self, size: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.num_features, self.eps = size, eps
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class HiddenEpsFrozenBatchNorm2d(FrozenBatchNorm2d):
    """DETR's: eps is written into its forward."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-5)
        del self.eps


HiddenEpsFrozenBatchNorm2d.eps_in_forward = 1e-5  # type: ignore[attr-defined]


def _hidden_forward(self: Any, x: Tensor) -> Tensor:
    scale = self.weight * (self.running_var + 1e-5).rsqrt()
    return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


HiddenEpsFrozenBatchNorm2d.forward = _hidden_forward  # type: ignore[method-assign]


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's frozen one, with an activation."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class SyncBatchNorm(nn.Module):
    """mmcv's: no subclass of torch's; parameters, buffers, and a group that is no torch group."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = size, 1e-5, 0.3
        self.affine = self.track_running_stats = True
        self.group, self.stats_mode = 0, "default"
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class PlainSubclass(nn.BatchNorm2d):
    """A wrapper that adds nothing to the forward."""


def same(model: nn.Module, converted: nn.Module, x: Tensor, rtol: float = 1e-5) -> None:
    """Outputs, gradients and buffers agree in training and in inference."""
    for training in (True, False):
        results = []
        for m in (copy.deepcopy(model), copy.deepcopy(converted)):
            m.train(training)
            given = x.clone().requires_grad_()
            y = m(given)
            generator = torch.Generator().manual_seed(7)
            (y * torch.randn(y.shape, generator=generator).to(y)).sum().backward()
            grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            results.append({"y": y.detach(), "x": given.grad, **grads, **m.state_dict()})
        theirs, ours = results
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_torch_layers(axes: int, affine: bool, momentum: float | None) -> None:
    kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
    ours = (sn.BatchNorm1d, sn.BatchNorm2d, sn.BatchNorm3d)[axes - 1]
    model = disturb(nn.Sequential(kind(4, eps=1e-2, momentum=momentum, affine=affine)))
    result, changes = convert(model)
    assert type(result[0]) is ours
    assert (result[0].eps, result[0].momentum, result[0].affine) == (1e-2, momentum, affine)
    assert changes.tally() == {"converted": 1}
    assert list(result.state_dict()) == list(model.state_dict())
    same(model, result, torch.randn(5, 4, *[3] * axes))


def test_without_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    result, _ = convert(model)
    same(model, result, torch.randn(3, 4, 2, 2))
    result, changes = convert(model, "steady")
    assert "needs running statistics" in changes[0].why
    same(model, result, torch.randn(3, 4, 2, 2))


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(eps=0.1))
    result, _ = convert(model, "steady")
    assert type(result[0]) is sn.LazyBatchNorm2d
    result(torch.randn(2, 4, 3, 3))
    assert type(result[0]) is sn.BatchNorm2d
    assert (result[0].eps, result[0].num_features) == (0.1, 4)
    assert isinstance(result[0].statistics, sn.Steady)


def test_sync_batch_norm_keeps_its_group_and_takes_any_axes() -> None:
    model = disturb(nn.Sequential(nn.SyncBatchNorm(4)))
    result, _ = convert(model)
    assert type(result[0]) is BatchNorm
    assert result[0].synchronize is True
    for shape in ((3, 4), (3, 4, 2), (3, 4, 2, 2), (3, 4, 2, 2, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(result.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 axes"):
        result(torch.randn(4))
    alone, _ = convert(model, synchronize=False)
    assert alone[0].synchronize is False
    back, changes = convert(result, to="torch")
    assert type(back[0]) is nn.SyncBatchNorm
    assert changes[0].why == "nothing lost"


def test_synchronize_for_all() -> None:
    result, changes = convert(nn.Sequential(nn.BatchNorm1d(3)), synchronize=True)
    assert result[0].synchronize is True
    assert changes[0].why == "Batch(), synchronized"


@pytest.mark.parametrize("make", [PlainSubclass, BatchNormAct2d])
def test_subclasses(make: Any) -> None:
    model = disturb(nn.Sequential(make(4)))
    result, _ = convert(model)
    assert type(result[0]) is sn.BatchNorm2d
    assert result[0].activation == ("relu" if make is BatchNormAct2d else None)
    assert list(result.state_dict()) == list(model.state_dict())
    same(model, result, torch.randn(3, 4, 2, 2))


@pytest.mark.parametrize(
    "make", [FrozenBatchNorm2d, HiddenEpsFrozenBatchNorm2d, FrozenBatchNormAct2d]
)
@pytest.mark.parametrize("statistics", [None, "steady"])
def test_frozen_look_alikes_stay_frozen(make: Any, statistics: str | None) -> None:
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), make(4)))
    result, changes = convert(model, statistics)
    layer = result[1]
    assert type(layer) is sn.BatchNorm2d
    assert layer.statistics == sn.Frozen()
    assert isinstance(layer.weight, nn.Parameter)
    assert not layer.weight.requires_grad
    assert "became parameters without gradient; gained num_batches_tracked" in changes[0].why
    assert ("stays frozen" in changes[0].why) == (statistics is not None)
    assert set(model.state_dict()) <= set(result.state_dict())
    result.load_state_dict(model.state_dict(), strict=False)
    same(model, result, torch.randn(3, 3, 2, 2))


def test_mmcv_look_alike() -> None:
    model = disturb(nn.Sequential(SyncBatchNorm(4)))
    result, _ = convert(model)
    assert type(result[0]) is BatchNorm
    assert (result[0].synchronize, result[0].momentum) == (True, 0.3)
    x = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(result.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_other_norms_are_not_touched() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True), nn.GroupNorm(1, 3)
    )
    _, changes = convert(model)
    assert changes == []


def test_everything_about_a_layer_is_kept() -> None:
    layer = nn.BatchNorm2d(4, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    calls: list[str] = []
    layer.register_forward_hook(lambda *a: calls.append("forward"))
    layer.note = "mine"  # type: ignore[assignment]
    model = nn.ModuleDict({"a": layer, "b": layer}).eval()
    result, changes = convert(model, inplace=True)
    assert result is model
    assert result["a"] is result["b"] is layer
    assert len(changes) == 1
    assert (layer.note, layer.training, layer.weight.dtype) == ("mine", False, torch.float64)
    assert not layer.weight.requires_grad
    layer(torch.randn(2, 4, 1, 1, dtype=torch.float64))
    assert calls == ["forward"]


def test_copy_shares_nothing_and_keeps_sharing_inside() -> None:
    layer = nn.BatchNorm1d(3)
    model = nn.Sequential(layer, nn.Linear(3, 3), layer)
    result, _ = convert(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert result[0] is result[2]
    assert result[0].weight.data_ptr() != layer.weight.data_ptr()


def test_half_precision_statistics_become_float32() -> None:
    model = disturb(nn.Sequential(nn.BatchNorm1d(3))).bfloat16()
    result, changes = convert(model)
    assert result[0].running_mean.dtype is torch.float32
    assert result[0].weight.dtype is torch.bfloat16
    assert "running statistics are float32 now" in changes[0].why


def test_the_model_itself() -> None:
    result, changes = convert(nn.BatchNorm1d(3))
    assert type(result) is sn.BatchNorm1d
    assert changes[0].where == "(model)"


def test_convert_twice_changes_nothing() -> None:
    model, _ = convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), "steady")
    again, changes = convert(model)
    assert changes == []
    assert isinstance(again[0].statistics, sn.Steady)
    again, changes = convert(model, "batch")
    assert changes.tally() == {"converted": 1}
    assert again[0].statistics == sn.Batch()


def test_back_to_torch() -> None:
    original = disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    ours, _ = convert(original)
    back, changes = convert(ours, to="torch")
    assert type(back[1]) is nn.BatchNorm2d
    assert type(back[2]) is nn.ReLU
    assert vars(back[1]).keys() == vars(original[1]).keys()
    assert changes.tally() == {"unfused": 1, "converted": 1}
    same(original, back, torch.randn(2, 3, 4, 4))


def test_back_to_torch_names_what_is_lost() -> None:
    model = nn.Sequential(
        sn.BatchNorm1d(3, statistics=sn.Steady(), nonfinite="skip"),
        sn.BatchNorm1d(3, statistics="frozen"),
        sn.BatchNorm1d(3, activation="relu"),
    )
    result, changes = convert(model, to="torch")
    assert changes[0].why == (
        "Steady(prior=16, horizon=640, window=16) is lost: torch normalizes with the batch; "
        "nonfinite='skip' is lost"
    )
    assert changes[1].why == "Frozen() is lost: torch will update the statistics in training"
    assert changes[2].why == "torch's layer has no place for its activation, relu"
    kinds = [type(layer) for layer in result]
    assert kinds == [nn.BatchNorm1d, nn.BatchNorm1d, sn.BatchNorm1d]


def test_bad_arguments() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="`to` must be 'steadynorm' or 'torch'; got 'keras'"):
        convert(model, to="keras")
    with pytest.raises(ValueError, match="statistics must be one of"):
        convert(model, "median")
    with pytest.raises(TypeError, match=r"convert: `model` must be a torch.nn.Module; got int"):
        convert(3)  # type: ignore[type-var]


def test_a_model_that_keeps_activations() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.kept = [model(torch.randn(4, 3))]  # type: ignore[assignment]
    result, _ = convert(model)
    assert model.kept[0].grad_fn is not None
    assert torch.equal(result.kept[0], model.kept[0])


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.lock = Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"convert: .*Pass inplace=True"):
        convert(model)
    result, _ = convert(model, inplace=True)
    assert type(result[0]) is sn.BatchNorm1d


def test_models_are_compared_in_float32_itself_and_the_settings_come_back():
    """On a GPU two algorithms of one convolution differ by TF32's 11 bits otherwise."""
    flags = torch.backends.cudnn
    seen = []

    class Net(nn.Sequential):
        def forward(self, x):
            seen.append((flags.allow_tf32, flags.benchmark, flags.deterministic))
            return super().forward(x)

    with flags.flags(flags.enabled, benchmark=True, deterministic=False, allow_tf32=True):
        net = Net(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        sn.convert(net, example_inputs=torch.randn(2, 1, 5, 5))
        assert (flags.allow_tf32, flags.benchmark, flags.deterministic) == (True, True, False)
    assert seen
    assert set(seen) == {(False, False, True)}


def test_frozen_layers_say_that_they_stay_frozen() -> None:
    model, _ = sn.freeze(nn.Sequential(nn.BatchNorm1d(3), sn.BatchNorm1d(3, statistics="frozen")))
    _, changes = convert(model, statistics="steady")
    assert [(c.what, c.where, c.why) for c in changes] == [
        ("left", "0", "stays frozen; to change that, sn.unfreeze first"),
        ("left", "1", "stays frozen; to change that, sn.unfreeze first"),
    ]
    built = nn.Sequential(sn.BatchNorm1d(3, statistics="frozen"))
    _, changes = convert(built, statistics="steady")
    assert [c.why for c in changes] == ["stays frozen; to change that, set `statistics`"]
    assert convert(model, statistics="frozen")[1] == []


def test_time_steps_of_a_recurrent_layer_are_not_pooled() -> None:
    """Replicas may differ in their number of time steps, and would wait for one another."""
    lstm = sn.BatchNormLSTM(2, 3, max_length=2)
    same, changes = convert(lstm, synchronize=True)
    assert changes.tally() == {"left": 6}
    why = "not synchronized: replicas may differ in their number of time steps"
    assert {c.why for c in changes} == {why}
    steady, changes = convert(lstm, statistics="steady", synchronize=True)
    assert changes.tally() == {"converted": 6}
    assert all(c.why.endswith(why) for c in changes)
    for network in (same, steady):
        norms = [m for m in network.modules() if isinstance(m, sn.BatchNorm1d)]
        assert [m.synchronize for m in norms] == [False] * 6
    assert convert(lstm, synchronize=False)[1] == []


def test_a_recurrent_layer_has_no_way_to_torch() -> None:
    model = nn.ModuleList([sn.BatchNormLSTM(2, 3, max_length=2), sn.BatchNorm1d(3)])
    back, changes = convert(model, to="torch")
    assert changes.tally() == {"left": 6, "converted": 1}
    assert {c.why for c in changes.left} == {
        "a time step of a batch-normalized LSTM, which torch does not have"
    }
    assert type(back[1]) is nn.BatchNorm1d
    x = torch.randn(2, 4, 2)
    torch.testing.assert_close(back[0](x), model[0](x), rtol=0, atol=0)
