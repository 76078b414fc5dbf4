"""Fusing: what moves into a batch norm, what must not, and that nothing else is felt."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tests.models.surgery.test_convert import same
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.models.surgery import convert, fold


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
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


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


def fused(model: nn.Module, x: Tensor, count: int) -> tuple[nn.Module, Any]:
    """Converts, checks how many were fused and that nothing else is felt."""
    disturb(model)
    result, changes = convert(model, example_inputs=x)
    assert changes.tally().get("fused", 0) == count, changes
    assert list(result.state_dict()) == list(model.state_dict())
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
    result, _ = fused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act), X, 1)
    assert result[1].activation is not None
    assert isinstance(result[2], nn.Identity)
    assert str(act) in repr(result[2])


@pytest.mark.parametrize(
    "act",
    [
        F.relu, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish, F.elu,
        torch.relu, torch.sigmoid, torch.tanh,
        lambda t: t.relu(), lambda t: t.relu_(), lambda t: t.tanh(),
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_activation_functions(act: Any) -> None:
    model = Forward(lambda m, x: act(m.bn(m.conv(x))))
    result, changes = fused(model, X, 1)
    assert changes[-1].why == "(model) has a generated forward"
    assert isinstance(result, Forward)


@pytest.mark.parametrize(
    "act",
    [
        nn.PReLU(), nn.LeakyReLU(0.3), nn.GELU(approximate="tanh"), nn.ELU(2.0), nn.Softplus(),
        nn.Mish(),
    ],
    ids=str,
)  # fmt: skip
def test_other_activations_are_left_and_named(act: nn.Module) -> None:
    _, changes = fused(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act), X, 0)
    assert changes.left[0].before == f"{act} after it"


@pytest.mark.parametrize("act", [
    lambda t: F.leaky_relu(t, 0.3), lambda t: F.leaky_relu(t, negative_slope=0.3),
    lambda t: F.gelu(t, approximate="tanh"), lambda t: F.elu(t, 2.0), lambda t: F.softmax(t, 1),
])  # fmt: skip
def test_functions_with_other_settings_stay(act: Any) -> None:
    fused(Forward(lambda m, x: act(m.bn(m.conv(x)))), X, 0)


@pytest.mark.parametrize("down", [True, False])
def test_residual_block(down: bool) -> None:
    result, changes = fused(nn.Sequential(Block(down), Block(not down)), X4, 4)
    block = result[0]
    # With two batch norms in the sum, the one that runs last finds the other's output ready.
    last = block.down[1] if down else block.bn2
    assert (block.bn1.activation, last.activation) == ("relu", "relu")
    assert [c.before for c in changes if c.what == "fused"][:2] == [
        "relu after it",
        "residual and relu after it",
    ]
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert block.label == "kept"
    assert isinstance(block.relu, nn.ReLU)


def test_residual_reaches_the_layer() -> None:
    result, _ = fused(Block(down=False), X4, 2)
    seen = []
    result.bn2.register_forward_hook(
        lambda m, args, kwargs, y: seen.append(sorted(kwargs)), with_kwargs=True
    )
    result(X4)
    assert seen == [["residual"]]


def test_two_batch_norms_in_one_sum() -> None:
    model = Forward(
        lambda m, x: torch.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))),
        conv2=nn.Conv2d(3, 4, 1), bn2=nn.BatchNorm2d(4),
    )  # fmt: skip
    fused(model, X, 1)


def test_sum_that_broadcasts() -> None:
    fused(Forward(lambda m, x: torch.relu(m.bn(m.conv(x)) + x.mean((1, 2, 3), keepdim=True))), X, 1)


def test_residual_alone_and_activation_before_the_sum() -> None:
    fused(Forward(lambda m, x: (m.bn(m.conv(x)) + x[:, :1]) * 2), X, 1)
    fused(Forward(lambda m, x: F.relu(m.bn(m.conv(x))) + x[:, :1]), X, 1)


def uses_it_twice(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return y.relu() * y


def adds_it_to_itself(m: Any, x: Tensor) -> Tensor:
    y = m.bn(m.conv(x))
    return y + y


@pytest.mark.parametrize(
    "function",
    [
        uses_it_twice,
        lambda m, x: [m.bn(m.conv(x)), x][0].relu() + m.bn(m.conv(x)),
        lambda m, x: torch.add(m.bn(m.conv(x)), x[:, :1], alpha=2),
        lambda m, x: m.bn(m.conv(x)) + 1.0,
        adds_it_to_itself,
    ],
)
def test_what_must_stay(function: Any) -> None:
    fused(Forward(function), X, 0)


def test_input_that_changes_before_the_sum() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = m.bn3(x)
        x.mul_(2)  # autograd refuses this in training, inference does not
        return torch.relu(y + x)

    _, changes = convert(disturb(Forward(forward, bn3=nn.BatchNorm2d(3))), example_inputs=X)
    assert changes.left[0].why == "the sum cannot be moved safely"


def test_residual_that_comes_later_waits() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        z = x[:, :1] * 2
        z += 1
        return torch.relu(y + z)

    fused(Forward(forward), X, 1)


def test_sum_written_into_the_other() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        other = x[:, :1].expand(-1, 4, -1, -1).clone()
        y = other
        y += m.bn(m.conv(x))
        return torch.relu(y) * other

    fused(Forward(forward), X, 0)


def test_forward_that_differs_in_training_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.dropout(F.relu(m.bn(m.conv(x))), 0.5, m.training)

    model = disturb(Forward(forward))
    result, changes = convert(model)
    assert "differs between training and inference" in changes.left[0].why
    assert type(result) is Forward
    assert result.bn.activation is None


def test_module_fuses_even_where_training_differs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.dropout(m.act(m.bn(m.conv(x))), 0.5, m.training)

    result, _ = convert(disturb(Forward(forward, act=nn.ReLU())))
    assert result.bn.activation == "relu"


def test_activation_shared_with_another_place() -> None:
    act = nn.ReLU()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act), nn.Conv2d(4, 4, 1), act
    )
    result, _ = fused(model, X, 0)
    assert result[2] is result[0][2]
    assert isinstance(result[2], nn.ReLU)


@pytest.mark.parametrize("place", ["bn", "act"])
def test_hooked_layers_stay(place: str) -> None:
    model = nn.Sequential()
    for name, layer in (
        ("conv", nn.Conv2d(3, 4, 1)),
        ("bn", nn.BatchNorm2d(4)),
        ("act", nn.ReLU()),
    ):
        model.add_module(name, layer)
    getattr(model, place).register_forward_hook(lambda *args: None)
    fused(model, X, 0)


def test_code_that_fx_cannot_follow_is_named() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.relu(m.bn(m.conv(x))) if float(x.mean()) < 1e9 else x

    _, changes = convert(Forward(forward))
    assert changes.left[0].before == "what follows it"
    assert changes.left[0].why.startswith("torch.fx cannot follow Forward (")


def test_fuse_false() -> None:
    _, changes = convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse=False)
    assert changes.tally() == {"converted": 1}


def test_slices_of_a_sequence_still_work() -> None:
    model = disturb(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    )
    result, _ = convert(model)
    torch.testing.assert_close(result[:3](X), model[:3](X), rtol=1e-5, atol=1e-5)


def test_rewritten_blocks_are_copied_pickled_and_unfused() -> None:
    model = disturb(nn.Sequential(Block(True), Block(False)))
    result, _ = convert(model)
    same(model, copy.deepcopy(result), X4)
    same(model, pickle.loads(pickle.dumps(result)), X4)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    same(model, torch.load(file, weights_only=False), X4)
    back, changes = convert(result, to="torch")
    assert type(back[0]) is Block
    assert changes.tally() == {"unfused": 4, "converted": 5}
    same(model, back, X4)


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


def test_fused_models_fold() -> None:
    model, _ = convert(
        disturb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    )
    result, changes = fold(model, X)
    assert changes.tally() == {"folded": 1}
    assert isinstance(result[1], nn.ReLU)


def test_our_own_activation_is_not_taken_for_ours_to_move() -> None:
    model = nn.Sequential(sn.BatchNorm2d(3, activation="relu"), nn.Tanh())
    result, changes = convert(model)
    assert changes == []
    assert isinstance(result[1], nn.Tanh)


LARGE = torch.randn(3, 4, 11, 11, generator=torch.Generator().manual_seed(0))


class Sized(nn.Module):
    """Pads by the size it sees, which torch.fx cannot follow: Hugging Face's MobileNetV2 does."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU6()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (int(x.shape[-1]) % 2, 1, 1, 1))
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.act1(x) if self.shared else x


def test_a_run_shows_what_fx_cannot_follow() -> None:
    model = Sized(shared=False)
    _, changes = convert(model)
    assert changes.tally() == {"converted": 3, "left": 3}
    result, changes = convert(model, example_inputs=LARGE)
    # What follows bn2 is a convolution; bn3's relu is a function, which only a new forward removes.
    assert changes.tally() == {"converted": 3, "fused": 1, "left": 1}
    assert [change.where for change in changes if change.what == "left"] == ["bn3"]
    assert (result.bn1.activation, result.bn2.activation) == ("relu6", None)
    assert "act1 is an identity now, by a run on the example inputs" in str(changes)
    same(model, result, LARGE)


def test_an_activation_that_a_run_shows_elsewhere_too_stays() -> None:
    model = Sized(shared=True)
    result, changes = convert(model, example_inputs=LARGE)
    assert changes.tally() == {"converted": 3, "left": 2}
    same(model, result, LARGE)


def test_a_model_that_cannot_run_in_training_is_left_as_it_is() -> None:
    model = Sized(shared=False).eval()
    small = torch.randn(1, 4, 5, 5)  # one value per channel behind the last convolution
    result, changes = convert(model, example_inputs=small)
    assert changes.tally() == {"converted": 3, "left": 3}
    assert "and it cannot be run in training (" in changes.left[0].why
    assert torch.equal(result(small), model(small))
