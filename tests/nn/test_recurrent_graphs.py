"""The batch-normalized LSTM as one graph: compiled, and exported for any batch size."""

import copy
from typing import Any

import pytest
import torch
from tests.nn.recurrent_truth import HIDDEN, SAMPLES, made, sequences

import steadynorm as sn

POLICIES = {"batch": sn.Batch(), "steady": sn.Steady(prior=3, window=None)}
DIRECTIONS: dict[str, Any] = {"one": {}, "two": {"bidirectional": True, "num_layers": 2}}


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_compiles_in_one_graph(name: str, directions: str) -> None:
    network = made(POLICIES[name], max_length=2, **DIRECTIONS[directions])
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    features = HIDDEN * (2 if network.bidirectional else 1)
    grad = torch.randn(3, SAMPLES, features, dtype=torch.float64)
    for _ in range(2):
        expected, found = network(sequences(time=3)), compiled(sequences(time=3))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        expected[0].backward(grad)
        found[0].backward(grad)
    for mine, theirs in zip(twin.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(twin.state_dict(), network.state_dict(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_is_exported_for_any_batch_size(directions: str) -> None:
    network = made("steady", max_length=2, **DIRECTIONS[directions]).eval()
    batch = {1: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(network, (sequences(time=3),), dynamic_shapes=(batch,))
    for samples in (SAMPLES, 2, 9):
        x = sequences(samples, time=3)
        torch.testing.assert_close(program.module()(x), network(x), rtol=1e-9, atol=1e-11)
