"""What a batch may be, and what is said about one that cannot be used."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.models.batches import moved


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(x)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


X, Y = torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch",
    [
        X,
        (X, Y),
        [X, Y],
        (X,),
        Pair(X, Y),
        {"x": X},
        {"x": X, "labels": Y},
        UserDict(x=X),
        ({"x": X}, Y),
    ],
    ids=["tensor", "tuple", "list", "single", "named", "dict", "labels", "mapping", "nested"],
)
def test_usual_batches(batch: Any) -> None:
    model = Model()
    report = sn.calibrate(model, [batch], progress=False)
    assert model.norm.running_mean.tolist() == [2.0, 4.0]
    assert (report.batches, report.layers[0].values) == (1, 2)


def test_forward_calls_whatever_it_wants() -> None:
    model = Model()
    sn.calibrate(
        model, [{"image": X, "mask": None}], forward=lambda m, b: m(b["image"] * 2), progress=False
    )
    assert model.norm.running_mean.tolist() == [4.0, 8.0]


def test_a_generator_serves_one_pass() -> None:
    model = Model()
    sn.calibrate(model, (part for part in X.split(1)), progress=False)
    assert model.norm.running_mean.tolist() == [2.0, 4.0]


def test_max_batches_reads_no_further() -> None:
    read = []

    def endless():
        while True:
            read.append(1)
            yield X

    assert sn.calibrate(Model(), endless(), max_batches=3, progress=False).batches == 3
    assert len(read) == 3


@pytest.mark.parametrize("kind", [dict, UserDict, OrderedDict])
def test_mappings_of_every_kind_move_and_keep_their_kind(kind: Any) -> None:
    batch = kind(x=X, labels=None)
    there = moved(batch, torch.device("meta"))
    assert type(there) is kind
    assert there["x"].is_meta
    assert not batch["x"].is_meta


def test_batches_move_to_the_device() -> None:
    target = torch.device("meta")
    batch = {"x": X, "more": [X, (Y, "text", 3)], "pair": Pair(X, Y), "packed": UserDict()}
    there = moved(batch, target)
    assert there["x"].is_meta
    assert there["more"][0].is_meta
    assert there["more"][1][0].is_meta
    assert there["more"][1][1:] == ("text", 3)
    assert isinstance(there["pair"], Pair)
    assert there["pair"].y.is_meta
    assert there["packed"] is batch["packed"]


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"model": Model(), "batches": [X], "progress": False} | changes
    return sn.calibrate(arguments.pop("model"), arguments.pop("batches"), **arguments)


ITERABLE = (
    "calibrate: `batches` must be an iterable of batches, such as a DataLoader or a list; got {}. "
    "For a single batch pass [batch]."
)
ELEMENT = (
    "batches: each must be a tensor, a mapping of keyword arguments, or a tuple or list whose "
    "first element is one of these; got {}. Say how to call the model: "
    "forward=lambda model, batch: model(...)."
)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batches": X}, TypeError, ITERABLE.format("Tensor")),
        ({"batches": {"x": X}}, TypeError, ITERABLE.format("dict")),
        ({"batches": 3}, TypeError, ITERABLE.format("int")),
        ({"batches": [3]}, TypeError, ELEMENT.format("int")),
        ({"batches": [((X, X), Y)]}, TypeError, ELEMENT.format("tuple")),
        ({"batches": [()]}, TypeError, ELEMENT.format("tuple")),
        (
            {"batches": []},
            ValueError,
            "calibrate: `batches` must hold at least one batch; got none.",
        ),
        (
            {"batches": iter([X]), "passes": "layerwise"},
            TypeError,
            "calibrate: passes='layerwise' reads `batches` once per layer; got list_iterator, "
            "which can be read only once. Pass a list or a DataLoader, or passes='one'.",
        ),
        (
            {"passes": "two"},
            ValueError,
            "calibrate: `passes` must be 'one' or 'layerwise'; got 'two'.",
        ),
        (
            {"forward": 1},
            TypeError,
            "calibrate: `forward` must be callable as (model, batch); got 1.",
        ),
        (
            {"max_batches": 0},
            ValueError,
            "calibrate: `max_batches` must be at least 1; got 0.",
        ),
        (
            {"max_batches": 1.5},
            TypeError,
            "calibrate: `max_batches` must be an int or None; got 1.5.",
        ),
        (
            {"model": X},
            TypeError,
            "calibrate: `model` must be a torch.nn.Module; got Tensor.",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refusal:
        call(**changes)
    assert str(refusal.value) == message


def test_the_layer_itself_says_what_is_wrong_with_its_input() -> None:
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        sn.calibrate(Model(), [torch.randn(2, 2, 3, 3)], progress=False)
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements"):
        sn.calibrate(Model(), [torch.randn(4, 3)], progress=False)


def test_a_packed_sequence_moves_as_it_knows_how() -> None:
    """Its lengths stay on the CPU."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    there = moved({"x": packed}, torch.device("meta"))["x"]
    assert there.data.is_meta
    assert not there.batch_sizes.is_meta


@dataclass
class Sample:
    x: Tensor


@pytest.mark.parametrize("passes", ["one", "layerwise"])
def test_a_model_that_writes_into_its_input_changes_no_batch(passes: Any) -> None:
    """Each pass would otherwise begin with what the last one left."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 2)
            self.second = nn.BatchNorm1d(2)

        def forward(self, batch: Sample) -> Tensor:
            found: Tensor = self.second(self.linear(self.first(batch.x.sub_(1).mul_(3))).relu())
            return found

    torch.manual_seed(0)
    model = Writes()
    batches = [Sample(torch.randn(8, 2)) for _ in range(3)]
    before = [batch.x.clone() for batch in batches]
    sn.calibrate(model, batches, forward=lambda m, b: m(b), passes=passes, progress=False)
    assert all(torch.equal(a.x, b) for a, b in zip(batches, before, strict=True))
    x = 3 * (torch.cat(before) - 1)
    torch.testing.assert_close(model.first.running_mean, x.mean(0))
    if passes == "layerwise":
        hidden = model.linear(model.first.eval()(x)).relu()
        torch.testing.assert_close(model.second.running_mean, hidden.mean(0))
