"""Folding: which calls allow it, found in the graph by tracing and by running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.surgery.test_fold import Forward, check
from tests.models.surgery.zoo import disturb
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.fold import fold


class SharedNorm(nn.Module):
    """One batch norm after two layers; `extra` also feeds it something that cannot take it."""

    def __init__(self, extra: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.a(x)).relu() + self.bn(self.b(x))
        return self.bn(y) if self.extra else y


def test_shared_batch_norm_goes_into_every_layer_before_it() -> None:
    check(SharedNorm(extra=False), torch.randn(2, 3, 4, 4), folded=1)


def test_shared_batch_norm_with_a_stranger_stays() -> None:
    check(SharedNorm(extra=True), torch.randn(2, 3, 4, 4), folded=0)


class SharedConv(nn.Module):
    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        for turn in range(2):
            x = self.norms[turn % len(self.norms)](self.conv(x)).relu()
        return x


def test_layer_called_twice_before_one_batch_norm() -> None:
    check(SharedConv(norms=1), torch.randn(2, 4, 3, 3), folded=1)


def test_layer_called_before_different_batch_norms_stays() -> None:
    check(SharedConv(norms=2), torch.randn(2, 4, 3, 3), folded=0)


def test_output_used_elsewhere_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y).relu() + y

    check(Forward(forward), torch.randn(2, 3, 4, 4), folded=0)


def test_output_returned_too_stays() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return {"features": [y], "out": m.bn(y)}

    model = disturb(Forward(forward)).eval()
    x = torch.randn(2, 3, 4, 4)
    for inputs in (None, x):
        result, changes = fold(model, inputs)
        assert changes.tally() == {"left": 1}
        torch.testing.assert_close(result(x)["features"][0], model.conv(x))


def test_output_kept_by_the_model_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        m.kept = y
        return m.bn(y)

    model = disturb(Forward(forward)).eval()
    _, changes = fold(model, torch.randn(2, 3, 4, 4))
    assert changes.left[0].why.startswith("conv before it cannot take it: its output also goes to")


def test_output_written_into_between_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, :, 0].mul_(2)
        return m.bn(y)

    check(Forward(forward), torch.randn(2, 3, 4, 4), folded=0)


def test_weight_read_elsewhere_stays() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) * m.conv.weight.norm()

    check(Forward(forward), torch.randn(2, 3, 4, 4), folded=0)


def test_shape_of_the_output_may_be_read() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y).reshape(y.shape[0], -1)

    check(Forward(forward), torch.randn(2, 3, 4, 4), folded=1)


def test_tied_weight_elsewhere_keeps_its_value() -> None:
    other = nn.Conv2d(3, 4, 1, bias=False)
    model = Forward(lambda m, x: m.bn(m.conv(x)) + m.other(x), other=other)
    model.conv.weight = other.weight
    result = check(model, torch.randn(2, 3, 4, 4), folded=1)
    assert torch.equal(result.other.weight, model.other.weight)


def test_code_that_only_running_can_follow() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x)) if float(x.mean()) < 1e9 else x

    model = Forward(forward)
    check(model, torch.randn(2, 3, 4, 4), folded=1, by="record")
    with pytest.raises(ValueError, match=r"torch.fx cannot follow Forward .*example_inputs"):
        fold(model)


def test_an_operator_nobody_announced_is_seen() -> None:
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + Hidden.apply(y)

    check(Forward(forward), torch.randn(2, 3, 4, 4), folded=0, by="record")


def test_what_samples_or_branches_in_training_mode_inside_a_model_in_inference() -> None:
    """Monte Carlo dropout: taken for nothing, it made the folded model differ by 1.2."""

    class Mode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3 + 1 if self.training else x

    x = torch.randn(6, 3)
    for between in (nn.Dropout(0.5), Mode()):
        for layers in (
            (nn.Linear(3, 4), between, nn.BatchNorm1d(4)),
            (nn.BatchNorm1d(3), between, nn.Linear(3, 4)),
        ):
            model = disturb(nn.Sequential(*layers)).eval()
            between.train()
            for inputs in (None, x):
                assert fold(model, inputs)[1].tally() == {"left": 1}
            between.eval()
            assert fold(model)[1].tally() == {"folded": 1}


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout()])
def test_a_hook_on_what_does_nothing_is_seen(between: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), between, nn.BatchNorm2d(4))
    between.register_forward_hook(lambda module, args, result: result * 2 + 1)
    check(model, torch.randn(2, 3, 4, 4), folded=0)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.__iadd__(1),
        lambda x: nn.functional.relu(x, inplace=True),
        lambda x: torch.mul(x, 2, out=x),
    ],
)
def test_an_input_written_into_before_the_layer_after_stays(write: Any) -> None:
    """Folded, the layer would be given that input itself, and see what was written."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 2
        y = m.bn(x)
        write(x)
        return m.conv(y) + x.mean()

    model = Forward(forward)
    model.conv, model.bn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(4)
    check(model, torch.randn(2, 4, 3, 3), folded=0)


def test_statistics_read_elsewhere_stay() -> None:
    for name in ("weight", "running_mean"):
        model = Forward(lambda m, x, name=name: m.bn(m.conv(x)) + getattr(m.bn, name).sum())
        check(model, torch.randn(2, 3, 4, 4), folded=0)


def test_layers_called_by_a_plain_list_stay() -> None:
    """The list would go on calling the batch norm, behind folded weights."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.steps = {"all": [self.conv, self.bn]}

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps["all"]:
                x = step(x)
            return x

    check(Listed(), torch.randn(2, 3, 4, 4), folded=0)


# Axes ------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Linear on the last axis; batch norm over it (`right`) or over the sequence."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.bn, self.how = nn.Linear(6, 5), nn.BatchNorm1d(5), how

    def forward(self, x: Tensor) -> Tensor:  # x: (N, 5, 6)
        y = self.linear(x)
        if self.how == "flatten":
            return self.bn(y.flatten(0, 1)).reshape_as(y)
        if self.how == "transpose":
            return self.bn(y.transpose(1, 2)).transpose(1, 2)
        if self.how == "permute":
            return self.bn(y.permute(0, -1, 1).contiguous())
        return self.bn(y)  # over the sequence, whose length is 5 too


@pytest.mark.parametrize("how", ["flatten", "transpose", "permute"])
def test_channels_are_followed_through_rearranging(how: str) -> None:
    check(Tokens(how), torch.randn(3, 5, 6), folded=1, by="record")


def test_batch_norm_over_another_axis_stays() -> None:
    _, changes = fold(disturb(Tokens("wrong")).eval(), torch.randn(3, 5, 6))
    assert "acts on another axis" in changes.left[0].why


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 3)),
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Linear(4, 4), sn.BatchNorm3d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm1d(4)),  # of one image without a batch axis
    ],
)
def test_numbers_of_axes_tell_channels_apart_without_inputs(model: nn.Module) -> None:
    """Width or batch is 4 as well: only the layers' kinds say that these are not the channels."""
    ranks = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, sn.BatchNorm3d: 5}
    rank = next(ranks[type(layer)] for layer in model if type(layer) in ranks)
    check(model, torch.randn(*([4] * rank)), folded=0)
    _, changes = fold(model)
    assert "acts on another axis" in changes.left[0].why


def test_recording_a_run_leaves_no_global_hook():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).eval()
    fold(network, torch.randn(4, 3))
    assert not torch.nn.modules.module._has_any_global_hook()


def test_a_compiled_batch_norm_goes_with_its_wrapper() -> None:
    compiled: Any = torch.compile(nn.BatchNorm2d(4), backend="eager")
    model = disturb(nn.Sequential(nn.Conv2d(3, 4, 3), compiled, nn.ReLU())).eval()
    x = torch.randn(2, 3, 6, 6)
    folded, changes = fold(model, x)
    assert changes.tally() == {"folded": 1}
    assert type(folded[1]) is nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_stands_before_is_named_as_written() -> None:
    """Not by its address, nor by the copying of the example inputs."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).eval()
    _, changes = fold(model, torch.randn(2, 3, 6, 6))
    assert "its input comes from outside the model, not from" in changes[0].why
    added = Forward(lambda self, x: self.bn(x + x)).eval()
    _, changes = fold(added)
    assert "its input comes from add(), not from" in changes[0].why


def test_what_is_taken_for_granted_without_example_inputs_is_said() -> None:
    """Over (N, L, C) a `BatchNorm1d` after `nn.Linear` acts on L; without inputs nobody knows."""
    said = "; inputs are taken to be (N, C), since no example inputs were given"
    linear = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU()).eval()
    convolution = nn.Sequential(nn.Conv1d(5, 7, 1), nn.BatchNorm1d(7), nn.ReLU()).eval()
    for tool, why in ((fold, "into 0"), (sn.drop_redundant_bias, "1 subtracts it; its running ")):
        for model, inputs, expected in (
            (linear, None, True),
            (linear, torch.randn(4, 5), False),
            (convolution, None, False),
        ):
            (change,) = tool(model, inputs)[1]
            assert change.why.startswith(why)
            assert change.why.endswith(said) is expected
