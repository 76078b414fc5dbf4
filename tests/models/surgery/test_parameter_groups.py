"""Which parameters decay: every one in exactly one group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import steadynorm as sn
from steadynorm.models.groups import parameter_groups


def test_every_parameter_once_in_its_group() -> None:
    embedding = nn.Embedding(5, 4)
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "conv": nn.Conv2d(3, 4, 1),
            "ours": sn.BatchNorm2d(4),
            "theirs": nn.BatchNorm2d(4),
            "layer": nn.LayerNorm(4),
            "lstm": nn.LSTM(4, 4),
            "head": nn.Linear(4, 5),
        }
    )
    model["head"].weight = embedding.weight
    model["theirs"].weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decays, spared = (
        [names[id(p)] for p in group["params"]]
        for group in parameter_groups(model, weight_decay=0.01)
    )
    assert decays == ["embedding.weight", "conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert spared == [
        "conv.bias", "ours.weight", "ours.bias", "theirs.bias", "layer.weight", "layer.bias",
        "lstm.bias_ih_l0", "lstm.bias_hh_l0", "head.bias",
    ]  # fmt: skip


def test_attentions_biases() -> None:
    layer = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    layer.register_parameter("unbiased", nn.Parameter(torch.ones(2)))
    groups = parameter_groups(layer, weight_decay=0.1)
    names = {id(p): name for name, p in layer.named_parameters()}
    decays, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decays == {"in_proj_weight", "out_proj.weight", "unbiased"}
    assert spared == {"in_proj_bias", "out_proj.bias", "bias_k", "bias_v"}


def test_an_optimizer_decays_only_the_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 3), sn.BatchNorm1d(3))
    torch.nn.init.ones_(model[0].bias)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.5), lr=1.0)
    before = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before / 2)
    assert torch.equal(model[0].bias.detach(), torch.ones(3))
    assert torch.equal(model[1].weight.detach(), torch.ones(3))


def test_empty_groups_are_left_out() -> None:
    groups = parameter_groups(nn.BatchNorm1d(3), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_bad_weight_decay(value: float) -> None:
    with pytest.raises(ValueError, match="parameter_groups: `weight_decay` must be at least 0"):
        parameter_groups(nn.Linear(1, 1), weight_decay=value)


def test_no_model() -> None:
    with pytest.raises(TypeError, match="parameter_groups: `model` must be"):
        parameter_groups({}, weight_decay=0.1)  # type: ignore[arg-type]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_parametrized_biases_and_normalizations_do_not_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for layer, name in ((model[0], "bias"), (model[1], "weight")):
        parametrize.register_parametrization(layer, name, Doubled())
    decaying, others = parameter_groups(model, weight_decay=0.1)
    assert (len(decaying["params"]), len(others["params"])) == (1, 3)


def test_a_weight_decay_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`weight_decay` must be a number; got '0\.1'"):
        parameter_groups(nn.Linear(2, 3), weight_decay="0.1")
