"""Freezing: still under train(), nothing moved, and an exact way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.models.surgery.test_convert import BatchNormAct2d, FrozenBatchNorm2d
from tests.models.surgery.zoo import disturb
from torch import nn

import steadynorm as sn
from steadynorm.models.freeze import freeze, unfreeze


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        sn.BatchNorm2d(4, statistics=sn.Steady(prior=5), activation="relu"),
        nn.SyncBatchNorm(4),
    )
    model[2].bias.requires_grad_(False)
    return disturb(model)


def test_still_under_train() -> None:
    model = network()
    result, changes = freeze(model)
    assert result is model
    assert changes.tally() == {"frozen": 3}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    x = torch.randn(6, 3, 2, 2)
    in_training = model.train()(x)
    in_training.sum().backward()
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    torch.testing.assert_close(model.eval()(x), in_training)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["0.weight", "0.bias"]


def test_answers_as_inference_did() -> None:
    model = network().eval()
    x = torch.randn(6, 3, 2, 2)
    before = model(x)
    freeze(model)
    torch.testing.assert_close(model.train()(x), before, rtol=1e-5, atol=1e-5)


def test_exact_way_back() -> None:
    model = network()
    before = [(type(m), dict(vars(m)), m) for m in model.modules()]
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    parameters = list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    freeze(model)
    _, changes = unfreeze(model)
    assert changes.tally() == {"unfrozen": 3}
    assert [(type(m), dict(vars(m)), m) for m in model.modules()] == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model[2].statistics == sn.Steady(prior=5)


def test_way_back_from_a_copy() -> None:
    model, _ = freeze(network())
    twin = copy.deepcopy(model)
    unfreeze(twin)
    assert [type(m) for m in twin] == [nn.Conv2d, nn.BatchNorm2d, sn.BatchNorm2d, nn.SyncBatchNorm]
    assert model[1].statistics == sn.Frozen()


def test_twice_is_once() -> None:
    model, _ = freeze(network())
    _, changes = freeze(model)
    assert changes == []
    unfreeze(model)
    assert type(model[1]) is nn.BatchNorm2d


def test_statistics_only() -> None:
    model, changes = freeze(nn.Sequential(nn.BatchNorm1d(3)), affine=False)
    assert changes[0].why == "statistics"
    assert model[0].weight.requires_grad
    model.train()(torch.randn(4, 3)).pow(2).sum().backward()
    assert model[0].weight.grad is not None
    assert int(model[0].num_batches_tracked) == 0


def test_weight_and_bias_after_the_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    freeze(model, affine=False)
    _, changes = freeze(model)
    assert [(c.what, c.why) for c in changes] == [("frozen", "weight, bias")]
    assert not any(p.requires_grad for p in model.parameters())
    _, changes = freeze(model)
    assert changes == []
    unfreeze(model)
    assert type(model[0]) is nn.BatchNorm1d
    assert all(p.requires_grad for p in model.parameters())


def test_unfreeze_keeps_what_was_set_since_freeze() -> None:
    model, _ = freeze(nn.Sequential(nn.BatchNorm1d(3), sn.BatchNorm1d(3, statistics="running")))
    for layer in model:
        layer.statistics = "steady"
    _, changes = unfreeze(model)
    assert {(c.what, c.why) for c in changes} == {("unfrozen", "keeps the policy set since freeze")}
    assert changes[0].after == f"BatchNorm1d(3), {sn.Steady()!r}"
    assert all(layer.statistics == sn.Steady() for layer in model)
    assert all(p.requires_grad for p in model.parameters())
    before = int(model[0].num_batches_tracked)
    model.train()(torch.randn(4, 3))
    assert int(model[0].num_batches_tracked) == before + 1
    assert unfreeze(model)[1] == []


def test_freeze_again_after_another_policy() -> None:
    model, _ = freeze(nn.Sequential(nn.BatchNorm1d(3)))
    model[0].statistics = "steady"
    _, changes = freeze(model)
    assert [(c.what, c.why) for c in changes] == [("frozen", "statistics")]
    assert model[0].statistics == sn.Frozen()
    unfreeze(model)
    assert model[0].statistics == sn.Steady()
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("affine", [True, False])
def test_a_recurrent_layer(affine: bool) -> None:
    """All four of its norms' parameters, and every step's statistics; the LSTM itself trains."""
    lstm = sn.BatchNormLSTM(2, 3, max_length=2)
    _, changes = freeze(lstm, affine=affine)
    still = {f"{norm}_norm.weight" for norm in ("input", "hidden", "cell")} | {"cell_norm.bias"}
    cell = lstm.cells[0]
    held = {name for name, p in cell.named_parameters() if not p.requires_grad}
    assert held == (still if affine else set())
    rows = [(c.where, c.why) for c in changes if c.why != "statistics"]
    assert rows == (
        [("cells.0.input_norm", "weight"), ("cells.0.hidden_norm", "weight"),
         ("cells.0.cell_norm", "weight, bias")] if affine else []
    )  # fmt: skip
    before = copy.deepcopy(lstm.state_dict())
    lstm.train()(torch.randn(2, 4, 2))[0].pow(2).sum().backward()
    assert {n for n, p in cell.named_parameters() if p.grad is None} == held
    torch.testing.assert_close(lstm.state_dict(), before)
    _, changes = freeze(lstm)
    assert (changes == []) is affine
    unfreeze(lstm)
    assert all(p.requires_grad for p in lstm.parameters())
    assert cell.cell_norm.steps[0].statistics == sn.Batch()
    assert not any(hasattr(module, "before_freeze") for module in lstm.modules())


def test_layers_built_frozen() -> None:
    model = nn.Sequential(sn.BatchNorm1d(3, statistics="frozen"), FrozenBatchNorm2d(3))
    _, changes = freeze(model)
    assert [(c.what, c.where, c.why) for c in changes] == [("frozen", "0", "weight, bias")]
    unfreeze(model)
    assert model[0].statistics == sn.Frozen()
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), "keeps no running statistics"),
        (nn.LazyBatchNorm1d(), "lazy and has not seen an input"),
        (BatchNormAct2d(3), "has its own forward; convert the model first"),
    ],
)
def test_left_with_the_reason(layer: nn.Module, why: str) -> None:
    kind = type(layer)
    _, changes = freeze(nn.Sequential(layer))
    assert changes.tally() == {"left": 1}
    assert why in changes[0].why
    assert type(layer) is kind


def test_a_forward_of_the_object_itself_stays() -> None:
    """It may call torch's forward, which would go on moving the statistics."""
    layer = nn.BatchNorm1d(3)
    forward = layer.forward
    layer.forward = forward  # type: ignore[method-assign]
    for changes in (freeze(nn.Sequential(layer))[1], sn.convert(nn.Sequential(layer))[1]):
        assert [(c.what, c.why) for c in changes] == [("left", "its forward has been replaced")]


def test_no_model() -> None:
    with pytest.raises(TypeError, match="unfreeze: `model` must be a"):
        unfreeze(None)  # type: ignore[type-var]


def test_an_optimizer_with_gradients_from_before_holds_frozen_parameters_still() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()
    weight = model[1].weight.detach().clone()
    freeze(model)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.equal(model[1].weight, weight)


class Delegating(nn.Module):
    """A wrapper whose attributes are those of what it wraps, as torch.compile's are."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str):
        modules = vars(self)["_modules"]
        return modules[name] if name in modules else getattr(modules["wrapped"], name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wrapped(x)


@pytest.mark.parametrize("wrap", [Delegating, torch.compile])
def test_a_wrapper_that_hands_on_attributes_is_not_taken_for_the_layer(wrap) -> None:
    model = nn.Sequential(nn.Linear(2, 3), wrap(nn.BatchNorm1d(3)))
    _, frozen = freeze(model)
    _, unfrozen = unfreeze(model)
    assert (frozen.tally(), unfrozen.tally()) == ({"frozen": 1}, {"unfrozen": 1})
    assert "before_freeze" not in {name for part in model.modules() for name in vars(part)}


@pytest.mark.parametrize("how", ["freeze", "convert", "layer"])
def test_update_bn_leaves_frozen_statistics(how: str) -> None:
    """It resets every batch norm before its pass, which fills the frozen ones no more."""
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model(torch.randn(16, 4) + 3)
    if how == "freeze":
        sn.freeze(model[1:2])
    elif how == "convert":
        model[1], _ = sn.convert(model[1], "frozen")
    else:
        layer = sn.BatchNorm1d(3, statistics="frozen")
        layer.load_state_dict(model[1].state_dict())
        model[1] = layer
    kept = {name: t.clone() for name, t in model[1].state_dict().items()}
    batches = [torch.randn(8, 4) for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, model)
    for name, value in model[1].state_dict().items():
        assert value.equal(kept[name]), name
    assert model[1].momentum == 0.1
    assert model[2].num_batches_tracked == 3
    model[1].reset_parameters()
    assert model[1].running_mean.tolist() == [0.0] * 3
    assert model[1].running_var.tolist() == [1.0] * 3
    assert model[1].num_batches_tracked == 0
