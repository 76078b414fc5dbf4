"""Dropping biases: the same inference, the same training, and what must stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.bias import drop_redundant_bias


def network(**norm: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        sn.BatchNorm2d(4, **norm),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        sn.BatchNorm2d(6, **norm),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
        sn.BatchNorm1d(5, **norm),
        nn.Linear(5, 2),
    )


X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("policy", ["batch", "renorm", "ghost"])
@pytest.mark.parametrize("inputs", [None, X])
def test_training_and_inference_stay_the_same(policy: str, inputs: Tensor | None) -> None:
    model = disturb(network(statistics=policy)).double()
    result, changes = drop_redundant_bias(model, inputs)
    assert [change.where for change in changes] == ["0.bias", "3.bias", "6.bias"]
    assert [layer.bias is None for layer in result if hasattr(layer, "stride")] == [True, True]
    assert result[8].bias is not None
    assert model[0].bias is not None
    for m in (model, result):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            y = m.train()(X + step)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            optimizer.step()
        m.outputs = m.eval()(X).detach()
    torch.testing.assert_close(result.outputs, model.outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result[0].weight, model[0].weight, rtol=1e-9, atol=1e-9)
    moved = model[1].running_mean - model[0].bias.detach()
    torch.testing.assert_close(result[1].running_mean, moved, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result[1].running_var, model[1].running_var)


def test_buffers_are_written_into_and_the_model_left() -> None:
    model = disturb(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    buffer, mean, bias = (
        model[1].running_mean,
        model[1].running_mean.clone(),
        model[0].bias.detach(),
    )
    drop_redundant_bias(model)
    assert torch.equal(model[1].running_mean, mean)
    drop_redundant_bias(model, inplace=True)
    assert model[1].running_mean is buffer
    torch.testing.assert_close(buffer, mean - bias)


def test_without_running_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    result, changes = drop_redundant_bias(model, X.flatten(1)[:, :3].float())
    assert changes.tally() == {"dropped": 1}
    assert result[0].bias is None


class Two(nn.Module):
    """One layer before two batch norms, or two layers before one."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.shared = shared
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.m, self.n = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.shared == "layer":
            y = self.a(x)
            return self.m(y) * self.n(y)
        if self.shared == "norm":
            return self.m(self.a(x)) * self.m(self.b(x))
        y = self.a(x)
        if self.shared == "training":
            return self.m(y) + (y if self.training else 0)
        return self.m(y) + y


@pytest.mark.parametrize(
    ("shared", "tally", "why"),
    [
        ("layer", {"dropped": 1}, "m, n subtract it; their running means moved along"),
        ("norm", {"left": 2}, "the batch norm after it is also called on something else"),
        ("output", {"left": 1}, "the output also goes to"),
        ("training", {"left": 1}, "the output also goes to"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_shared(shared: str, tally: dict[str, int], why: str, recorded: bool) -> None:
    model = disturb(Two(shared))
    x = torch.randn(5, 3)
    result, changes = drop_redundant_bias(model, x if recorded else None)
    assert changes.tally() == tally
    assert why in changes[0].why
    torch.testing.assert_close(result.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: setattr(m[1], "statistics", sn.Frozen()), "frozen, and subtracts a constant"),
        (
            lambda m: setattr(m[1], "statistics", sn.Steady()),
            "only in part, so the bias is trained",
        ),
        (
            lambda m: setattr(m[1], "statistics", sn.Running()),
            "only in part, so the bias is trained",
        ),
        (lambda m: m[1].eval(), "frozen, and subtracts a constant"),
        (lambda m: m[0].register_forward_hook(lambda *a: None), "forward hooks"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "parametrized"),
    ],
)
def test_left_with_the_reason(spoil: Any, why: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), sn.BatchNorm1d(4))
    spoil(model)
    result, changes = drop_redundant_bias(model)
    assert changes.tally() == {"left": 1}
    assert why in changes[0].why
    assert result[0].bias is not None


def test_statistics_read_elsewhere_and_a_hook_in_between_stay() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.linear(x)) + self.bn.running_mean.sum()

    _, changes = drop_redundant_bias(Reads())
    assert changes[0].why == "the running mean after it is also read outside it"
    hooked = nn.Sequential(nn.Linear(3, 4), nn.Identity(), nn.BatchNorm1d(4))
    hooked[1].register_forward_hook(lambda module, args, result: result * 2)
    assert drop_redundant_bias(hooked)[1] == []


def test_residual_that_is_not_the_input() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.n = nn.Linear(3, 4), nn.Linear(3, 4), sn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.a(x), residual=self.b(x))

    for inputs in (None, torch.randn(5, 3)):
        result, changes = drop_redundant_bias(Residual(), inputs)
        assert changes.tally() == {"dropped": 1, "left": 1}
        assert result.a.bias is None
        assert result.b.bias is not None


def test_modes_statistics_and_random_state_are_left_alone() -> None:
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    result, _ = drop_redundant_bias(model, X.float())
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in result.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert int(result[4].num_batches_tracked) == 0


def test_nothing_to_do_and_no_model() -> None:
    _, changes = drop_redundant_bias(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert changes == []
    with pytest.raises(TypeError, match="drop_redundant_bias: `model` must be"):
        drop_redundant_bias([])  # type: ignore[type-var]


class SharedStatistics(nn.Module):
    """Two batch norms, each on inputs of its own, that hold the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.norm_a, self.norm_b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.norm_b.running_mean = self.norm_a.running_mean
        self.norm_b.running_var = self.norm_a.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_b(self.b(self.norm_a(self.a(x)).relu()))


def test_a_bias_stays_where_two_layers_hold_the_same_statistics() -> None:
    model, x = SharedStatistics().eval(), torch.randn(8, 3)
    result, changes = drop_redundant_bias(model)
    assert torch.equal(result(x), model(x))
    assert [change.why for change in changes] == [
        "another layer holds the same running statistics"
    ] * 2
