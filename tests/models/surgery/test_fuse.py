"""Fusing: which calls are merged, which must not be, and that nothing else is felt."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.models.sources import block
from tests.models.surgery.test_convert import same
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.models import rewrite
from steadynorm.models.convert import convert
from steadynorm.models.fuse import Fused
from steadynorm.nn.batchnorm import SteadyNorm


class Block(nn.Module):
    """A residual block as torchvision writes it: one shared ReLU, a sum in place."""

    def __init__(self, down: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if down else None
        self.label = "kept"

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.down is not None:
            identity = self.down(x)
        out += identity
        out = self.relu(out)
        return out  # noqa: RET504  as torchvision has it


def merged_calls(model: nn.Module, *x: Any) -> list[dict[str, Any]]:
    """What our layers were given besides their input, call by call."""
    seen = []
    forward = SteadyNorm.forward

    def watched(self: Any, input: Tensor, **given: Any) -> Tensor:
        seen.append({key: value for key, value in given.items() if value is not None})
        return forward(self, input, **given)

    SteadyNorm.forward = watched  # type: ignore[method-assign]
    try:
        model(*x)
    finally:
        SteadyNorm.forward = forward  # type: ignore[method-assign]
    return seen


def fused(model: nn.Module, x: Tensor, count: int) -> tuple[nn.Module, Any]:
    """Converts, checks how many were fused and that nothing else is felt."""
    disturb(model)
    result, changes = convert(model, example_inputs=x)
    assert changes.tally().get("fused", 0) == count, changes
    assert list(result.state_dict()) == list(model.state_dict())
    assert sum(1 for given in merged_calls(copy.deepcopy(result), x) if given) == count
    same(model, result, x)
    return result, changes


X = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
X4 = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU(), nn.SiLU(), nn.GELU(),
        nn.Hardswish(), nn.ELU(), nn.Sigmoid(), nn.Tanh(),
    ],
    ids=str,
)  # fmt: skip
def test_activation_modules(act: nn.Module) -> None:
    result, changes = fused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act), X, 1)
    # The layers stay what they are, each right by itself.
    assert result[1].activation is None
    assert type(result[2]) is type(act)
    assert changes[-1].why == "by (model)"


@pytest.mark.parametrize(
    "act",
    ["F.relu", "F.relu6", "F.leaky_relu", "F.silu", "F.gelu", "F.hardswish", "F.elu", "torch.relu",
     "torch.sigmoid", "torch.tanh", "self.relu"],
)  # fmt: skip
def test_activations_in_code(act: str) -> None:
    fused(block(f"return {act}(self.bn(self.conv(x)))"), X, 1)
    fused(block(f"y = self.conv(x)\ny = self.bn(y)\ny = {act}(y)\nreturn y"), X, 1)


MERGED = {
    "inplace": ("return F.relu(self.bn(self.conv(x)), inplace=True)", 1),
    "another name": ("y = self.bn(self.conv(x))\nz = self.relu(y)\nreturn z", 1),
    "returned": ("y = self.bn(self.conv(x))\nreturn self.relu(y)", 1),
    "sum": ("y = self.conv(x)\nreturn self.relu(self.bn(y) + y)", 1),
    "sum the other way": ("y = self.conv(x)\nreturn self.relu(y + self.bn(y))", 1),
    "sum alone": ("y = self.conv(x)\nreturn self.bn(y) + y", 1),
    "sum in place": ("z = self.conv(x)\ny = self.bn(z)\ny += z\nreturn self.relu(y)", 1),
    "sum as a statement": ("z = x[:, :1].expand(-1, 4, -1, -1)\ny = self.bn(self.conv(x))\n"
                           "y = z + y\ny = self.relu(y)\nreturn y", 1),
    "after another call": ("y = self.bn(self.conv(x))\ny += self.conv2(x)\nreturn y", 1),
    "both optional": ("x = self.conv(x)\nif self.bn is not None:\n    x = self.bn(x)\n"
                      "if self.relu:\n    x = self.relu(x)\nreturn x", 1),
    "of a sequence": ("return self.relu(self.tail(x))", 1),
    "in a branch": ("if len(x) > 1:\n    x = self.relu(self.bn(self.conv(x)))\nreturn x", 1),
}  # fmt: skip


@pytest.mark.parametrize(("body", "count"), MERGED.values(), ids=MERGED)
def test_calls_that_are_merged(body: str, count: int) -> None:
    layers = {"conv2": nn.Conv2d(3, 4, 1)}
    if "tail" in body:
        layers["tail"] = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Identity())
    fused(block(body, **layers), X, count)


APART = {
    "used twice": "y = self.bn(self.conv(x))\nreturn self.relu(y) * y",
    "used later": "y = self.bn(self.conv(x))\nz = self.relu(y)\nreturn z + y",
    "added to itself": "y = self.bn(self.conv(x))\ny += y\nreturn y",
    "a number added": "return self.bn(self.conv(x)) + 1.0",
    "a sum that broadcasts": "return self.bn(self.conv(x)) + self.one",
    "other settings": "return F.leaky_relu(self.bn(self.conv(x)), negative_slope=0.3)",
    "an axis": "return F.softmax(self.bn(self.conv(x)), 1)",
    "a weight": "return torch.add(self.bn(self.conv(x)), x[:, :1], alpha=2)",
    "into the other": "z = self.conv(x) * 1\nz += self.bn(self.conv(x))\nreturn z",
    "its input changed in between": "x = self.conv(x)\ny = self.bn(x)\nx = self.spoil(x)\ny += x\n"
                                    "return y",
    "an early return": "y = self.bn(self.conv(x))\nif self.training:\n    return x\n"
                       "y += self.conv(x)\nreturn y",
    "called in between": "y = self.bn(self.conv(x))\nz = self.both(x)\ny += z\nreturn y",
}  # fmt: skip


class Spoil(nn.Module):
    """Writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("body", APART.values(), ids=APART)
def test_calls_that_stay_apart(body: str) -> None:
    conv, bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    layers = {"conv": conv, "bn": bn, "spoil": Spoil(), "both": nn.Sequential(conv, bn)}
    model = disturb(block(body, **layers, one=nn.Parameter(torch.ones(1, 1, 1, 1))))
    result, _ = convert(model)
    assert not any(merged_calls(copy.deepcopy(result), X))
    with torch.no_grad():
        model.eval(), result.eval()
        torch.testing.assert_close(result(X.clone()), model(X.clone()), rtol=1e-5, atol=1e-5)


UNREADABLE = {
    "super": ("return super().extra_repr() or self.relu(self.bn(self.conv(x)))", "super()"),
    "try": ("try:\n    y = self.relu(self.bn(self.conv(x)))\nfinally:\n    pass\nreturn y",
            "code that is not followed"),
    "lambda": ("f = lambda: self.relu(self.bn(self.conv(x)))\nreturn f()", "is not followed"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_code_that_is_not_followed_is_named(body: str, why: str) -> None:
    _, changes = fused(block(body), X, 0)
    assert why in changes.left[0].why


def test_source_that_is_not_what_runs() -> None:
    model = block("return self.relu(self.bn(self.conv(x)))")
    other = block("return torch.tanh(self.bn(self.conv(x)))")
    type(model).forward.__code__ = type(other).forward.__code__.replace(
        co_filename=type(model).forward.__code__.co_filename
    )
    _, changes = fused(model, X, 0)
    assert changes.left[0].why == "the source of its forward is not what runs"


@pytest.mark.parametrize(
    "act",
    [
        nn.PReLU(), nn.LeakyReLU(0.3), nn.GELU(approximate="tanh"), nn.ELU(2.0), nn.Softplus(),
    ],
    ids=str,
)  # fmt: skip
def test_other_activations_are_left_and_named(act: nn.Module) -> None:
    for model in (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act),
        block("return self.relu(self.bn(self.conv(x)))", relu=act),
    ):
        _, changes = fused(model, X, 0)
        assert changes.left[0].before == f"{act} after it"
        assert changes.left[0].why == "it is not one of our activations"


class Wrapped(nn.Module):
    """As transformers' `SiLUActivation`."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(input)


class Twice(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(nn.functional.silu(input))


class Flagged(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.silu(input) if self.training else input


@pytest.mark.parametrize(("act", "count"), [(Wrapped(), 1), (Twice(), 0), (Flagged(), 0)])
def test_activations_of_other_people(act: nn.Module, count: int) -> None:
    fused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act), X, count)
    fused(block("return self.relu(self.bn(self.conv(x)))", relu=act), X, count)


@pytest.mark.parametrize("down", [True, False])
def test_residual_block(down: bool) -> None:
    result, changes = fused(nn.Sequential(Block(down), Block(not down)), X4, 4)
    first = result[0]
    given = merged_calls(first, X4)
    assert given[0] == {"activation": "relu"}
    assert sorted(given[-1]) == ["activation", "residual"]  # after the other branch's batch norm
    assert [c.before for c in changes if c.what == "fused"][:2] == [
        "relu after it",
        "residual and relu after it",
    ]
    assert isinstance(first, Block)
    assert type(first).__name__ == "Block"
    assert first.label == "kept"


DLA = """
residual = self.conv(x)
if shortcut is None:
    shortcut = residual
y = self.bn(residual)
y += shortcut
return self.relu(y)
"""


def test_defaults_and_branches_stay_open() -> None:
    """A block as DLA's: traced, the default was taken as given."""
    model = disturb(block(DLA, "x, shortcut=None"))
    result, changes = convert(model)
    assert changes.tally()["fused"] == 1
    for other in ((), (torch.randn(3, 4, 4, 4),), (torch.ones(()),)):
        torch.testing.assert_close(result(X, *other), model(X, *other), rtol=1e-5, atol=1e-5)


def test_flags_may_change_later() -> None:
    body = "y = self.bn(self.conv(x))\nif self.add:\n    y = y + x.sum()\nreturn self.relu(y)"
    model = disturb(block("if self.deployed:\n    return self.one(x)\n" + body))
    model.deployed, model.add, model.one = False, False, nn.Conv2d(3, 4, 1)
    result, _ = convert(model)
    for deployed, add in ((False, True), (True, False), (False, False)):
        for network in (model, result):
            network.deployed, network.add = deployed, add
        torch.testing.assert_close(result(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_difference_in_training_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Fused._call_fused

    def wrong(*given: Any) -> Any:
        return right(*given) * 1.001

    monkeypatch.setattr(Fused, "_call_fused", staticmethod(wrong))
    result, changes = convert(nn.Sequential(Block(True), Block(False)), example_inputs=X4)
    assert not any(isinstance(module, Fused) for module in result.modules())
    assert changes.tally() == {"converted": 5, "left": 4}
    assert changes.left[0].why.startswith("a step in training differed by ")


def test_block_converted_a_second_time() -> None:
    model = disturb(Block(True))
    first, _ = convert(model)
    second, changes = convert(first, "steady")
    assert changes.tally() == {"converted": 3}
    same(model, convert(second, "batch")[0], X4)


def test_trained_after_fusing() -> None:
    model = disturb(nn.Sequential(Block(True), nn.Flatten(), nn.Linear(100, 2)))
    result, _ = convert(model)
    for m in (model, result):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (m(X4) ** 2).mean().backward()
            optimizer.step()
    theirs, ours = model.state_dict(), result.state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


def test_fuse_false() -> None:
    _, changes = convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse=False)
    assert changes.tally() == {"converted": 1}


def test_our_own_activation_is_not_taken_for_ours_to_move() -> None:
    model = nn.Sequential(sn.BatchNorm2d(3, activation="relu"), nn.Tanh())
    result, changes = convert(model)
    assert changes == []
    assert type(result) is nn.Sequential


def test_a_model_that_cannot_run_in_training_is_compared_in_inference() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 5), nn.BatchNorm2d(4), nn.ReLU()).eval()
    small = torch.randn(1, 4, 5, 5)  # one value per channel
    result, changes = convert(model, example_inputs=small)
    assert changes.tally() == {"converted": 1, "fused": 1}
    torch.testing.assert_close(result(small), model(small))


def test_places_are_found_by_the_syntax_alone() -> None:
    found = rewrite.sites(Block.forward)
    assert rewrite.Site("bn2", "self.relu", True, "conv2", ("down",)) in found
    assert rewrite.Site("bn1", "self.relu", False) in found
    assert F.relu is torch.nn.functional.relu
