"""What calibration must not change: everything after a failure, nearly everything after success."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.population import Population


class Counting(nn.Module):
    """Moves a buffer in every forward, by binding a new tensor, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("noise", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1
        self.noise.normal_()
        return x + random.random() + np.random.rand()  # noqa: NPY002  what loaders use


def model() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), Counting(),
        nn.Linear(5, 3), sn.BatchNorm1d(3, statistics="steady"), nn.Linear(3, 3),
        sn.BatchNorm1d(3, statistics="frozen"),
    )  # fmt: skip
    network[0].weight.requires_grad_(False)
    network[1].register_forward_pre_hook(lambda module, args: None)
    network.train()
    network[2].eval()
    network(torch.randn(8, 4))
    return network


def picture(network: nn.Module) -> dict[str, Any]:
    """Everything that could have changed, in a form that compares exactly."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "values": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        "identity": {name: id(tensor) for name, tensor in tensors.items()},
        "gradients": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "keys": list(network.state_dict()),
        "modes": [module.training for module in network.modules()],
        "hooks": [
            (list(module._forward_pre_hooks), list(module._forward_pre_hooks_with_kwargs),
             list(module._forward_hooks), sorted(vars(module)))
            for module in network.modules()
        ],
        "random": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tobytes(),  # noqa: NPY002
        ),
        "global": (torch.is_grad_enabled(), torch.get_default_dtype()),
    }  # fmt: skip


class Breaking:
    """Batches that raise at one index of one pass; readable again, and random."""

    def __init__(self, at: int, on_pass: int, error: BaseException) -> None:
        self.at, self.on_pass, self.error = at, on_pass, error
        self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for index in range(4):
            if (self.passes, index) == (self.on_pass, self.at):
                raise self.error
            random.random()
            yield torch.randn(3, 4)


CALLS: list[Callable[..., Any]] = [sn.calibrate, sn.adapt]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("broken"), SystemExit(3)])
@pytest.mark.parametrize("at", range(4))
@pytest.mark.parametrize(("passes", "on_pass"), [("one", 1), ("layerwise", 1), ("layerwise", 2)])
@pytest.mark.parametrize("call", CALLS)
def test_an_exception_at_any_batch_changes_nothing(
    call: Callable[..., Any], passes: str, on_pass: int, at: int, error: BaseException
) -> None:
    network = model()
    before = picture(network)
    with pytest.raises(type(error)):
        call(network, Breaking(at, on_pass, error), passes=passes, progress=False)
    assert picture(network) == before


@pytest.mark.parametrize("call", CALLS)
def test_an_exception_inside_the_model_changes_nothing(call: Callable[..., Any]) -> None:
    network = model()
    before = picture(network)
    batches = [torch.randn(3, 4), torch.randn(3, 9)]
    before["random"] = picture(network)["random"]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(network, batches, progress=False)
    assert picture(network) == before


def test_an_exception_while_writing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model()
    batches = [torch.randn(3, 4)]
    before = picture(network)
    final = Population._final

    def fail(self: Population, name: str) -> Any:
        if name == "5":
            raise KeyboardInterrupt
        return final(self, name)

    monkeypatch.setattr(Population, "_final", fail)
    with pytest.raises(KeyboardInterrupt):
        sn.calibrate(network, batches, progress=False)
    assert picture(network) == before


@pytest.mark.parametrize("passes", ["one", "layerwise"])
@pytest.mark.parametrize("call", CALLS)
def test_success_changes_the_running_statistics_and_nothing_else(
    call: Callable[..., Any], passes: str
) -> None:
    network = model()
    batches = [torch.randn(3, 4) * 5, torch.randn(1, 4)]
    before = picture(network)
    call(network, batches, passes=passes, progress=False)
    after = picture(network)
    moved = {key for key, value in after["values"].items() if value != before["values"][key]}
    expected = {f"{i}.{name}" for i in (1, 5) for name in ("running_mean", "running_var")}
    assert moved == expected | {"1.num_batches_tracked", "5.num_batches_tracked"}
    for key in moved:
        before["values"].pop(key), after["values"].pop(key)
    assert after == before


def test_the_picture_sees_what_may_change() -> None:
    network = model()
    before = picture(network)
    for change in (
        lambda: network[1].running_mean.add_(1e-7),
        lambda: setattr(network[2], "training", True),
        lambda: network[0].weight.requires_grad_(True),
        lambda: network[4].register_forward_pre_hook(lambda m, a: None),
        lambda: torch.rand(1),
        random.random,
        lambda: setattr(network[3], "noise", network[3].noise.clone()),
    ):
        change()
        after = picture(network)
        assert after != before
        before = after


def test_every_pass_of_a_shuffling_loader_sees_the_same_batches() -> None:
    seen: list[list[int]] = []

    def forward(network: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        seen.append(batch[1].tolist())
        network(batch[0])

    samples = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12))
    loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
    report = sn.calibrate(
        model(), loader, forward=forward, max_batches=2, passes="layerwise", progress=False
    )
    assert report.passes == 2
    assert report.batches == 2
    assert seen[:2] == seen[2:]
    assert len(seen) == 4
