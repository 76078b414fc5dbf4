"""Pretrained statistics whose count of batches was lost: the first batch must not replace them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.evidence.digits import load, tensors
from steadynorm.statistics import MANY_BATCHES


def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((network.eval()(x).argmax(1) == y).float().mean())


@pytest.fixture(scope="module")
def pretrained() -> tuple[Any, tuple[Tensor, ...]]:
    """A network of torch's own layers, trained on digits; its file holds no counts."""
    pytest.importorskip("sklearn", reason="an optional extra")
    torch.manual_seed(0)
    x, y, x_test, y_test = tensors(load())
    x, x_test = x.flatten(1), x_test.flatten(1)
    network = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
    for name, buffer in network.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return network, (x, x_test, y_test)


@pytest.mark.parametrize("policy", [sn.Steady(), sn.Running()], ids=repr)
def test_accuracy_survives_one_batch_of_two(policy: Any, pretrained: Any) -> None:
    network, (x, x_test, y_test) = pretrained
    before = accuracy(network, x_test, y_test)
    converted, changes = sn.convert(network, statistics=policy)
    assert before > 0.9
    notes = [change.why for change in changes if change.what == "converted"]
    said = "num_batches_tracked is 0 beside trained statistics: read as many batches"
    assert all(said in note for note in notes)
    assert len(notes) == 2
    converted.train()(x[:2])
    assert accuracy(converted, x_test, y_test) > before - 0.05
    assert all(int(converted[i].num_batches_tracked) == MANY_BATCHES + 1 for i in (1, 4))


def layer(policy: str, momentum: float | None, *, trained: bool, count: int = 0) -> Any:
    made = sn.BatchNorm1d(3, statistics=policy, momentum=momentum)
    made.num_batches_tracked.fill_(count)
    if trained:
        made.running_mean.fill_(10)
        made.running_var.fill_(4)
    return made


SETTINGS = pytest.mark.parametrize(
    ("policy", "momentum"), [("steady", 0.1), ("running", 0.1), ("running", None), ("steady", None)]
)


@SETTINGS
def test_the_first_batch_weighs_what_a_later_one_does(policy: str, momentum: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    found = layer(policy, momentum, trained=True)
    expected = layer(policy, momentum, trained=True, count=MANY_BATCHES)
    for _ in range(2):  # the second must not either
        torch.testing.assert_close(found(x), expected(x))
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(dict(found.named_buffers())[name], buffer)
    assert (found.running_mean > 9).all() or policy == "running"


@SETTINGS
def test_a_new_layer_still_starts_with_its_first_batch(policy: str, momentum: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3) + 5
    made = layer(policy, momentum, trained=False)
    made(x)
    torch.testing.assert_close(made.running_mean, x.mean(0))
    assert int(made.num_batches_tracked) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_does_as_torch_does(momentum: float | None) -> None:
    """A drop-in: with momentum=None torch's average starts anew at a count of 0."""
    made = layer("batch", momentum, trained=True)
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum)
    theirs.load_state_dict(made.state_dict())
    x = torch.randn(6, 3)
    torch.testing.assert_close(made(x), theirs(x))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(dict(made.named_buffers())[name], buffer)


@SETTINGS
@pytest.mark.filterwarnings("ignore:.*in training for ever")
@pytest.mark.parametrize("trained", [True, False])
def test_compiled_and_exported_too(policy: str, momentum: float | None, trained: bool) -> None:
    """Where the count is a tensor that nobody may wait for."""
    torch.manual_seed(0)
    x = torch.randn(6, 3)
    eager = layer(policy, momentum, trained=trained)
    copies = [copy.deepcopy(eager) for _ in range(3)]
    expected = eager(x)
    programs = (
        torch.compile(copies[0], backend="eager", fullgraph=True),
        torch.export.export(copies[1], (x,)).module(),
    )
    for program in programs:
        torch.testing.assert_close(program(x), expected)
        found = {k.split(".")[-1]: v for k, v in program.named_buffers()}
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(found[name], buffer)


@pytest.mark.parametrize("joined", [True, False])
def test_time_steps_of_a_recurrent_layer(joined: bool) -> None:
    """Each step has a count of its own; here the first two lost theirs, the last is new."""

    def made(count: int) -> Any:
        torch.manual_seed(0)
        network = sn.BatchNormLSTM(2, 3, statistics="running", max_length=3)
        for norm in (network.cells[0].input_norm, network.cells[0].hidden_norm):
            for step in norm.steps[:2]:
                step.running_mean.fill_(1)
                step.num_batches_tracked.fill_(count)
            if not joined:
                norm.steps[0].register_forward_hook(lambda *_: None)
        return network

    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1))
    found, expected = made(0), made(MANY_BATCHES)
    for network in (found, expected):
        network(x)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(dict(found.named_buffers())[name], buffer, msg=name)
    counts = [int(step.num_batches_tracked) for step in found.cells[0].input_norm.steps]
    assert [count >= MANY_BATCHES for count in counts] == [True, True, False]
