"""Three processes with uneven data keep the same statistics, those of all data at once."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.models.calibration.replicas import SIZES, batches, network
from tests.replicas import start_well


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("replicas")
    start_well("tests.models.calibration.replicas", folder=folder, replicas=len(SIZES))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in SIZES]


def everything() -> np.ndarray:
    return torch.cat([part for rank in SIZES for part in batches(rank)]).double().numpy()


def through(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


KEYS = ("calibrate one", "calibrate layerwise", "adapt one", "adapt layerwise")


@pytest.mark.parametrize("key", KEYS)
def test_all_replicas_keep_the_same_to_the_bit(results: list[dict[str, Any]], key: str) -> None:
    state, report = results[0][key]
    for other, told in (result[key] for result in results[1:]):
        assert told == report
        assert all(torch.equal(state[name], other[name]) for name in state)
    assert report["batches"] == 7
    assert [layer["values"] for layer in report["layers"]] == [30, 30]
    assert state["1.num_batches_tracked"] == 7


@pytest.mark.parametrize("key", KEYS[:2])
def test_the_statistics_are_those_of_all_data_at_once(
    results: list[dict[str, Any]], key: str
) -> None:
    model, (state, _) = network(), results[0][key]
    x = through(model[0], everything())
    np.testing.assert_allclose(state["1.running_mean"], x.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["1.running_var"], x.var(0, ddof=1), rtol=1e-5)
    if "layerwise" in key:
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0, ddof=1) + 1e-5), 0)
        x = through(model[3], x)
        np.testing.assert_allclose(state["4.running_mean"], x.mean(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state["4.running_var"], x.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("key", KEYS[2:])
def test_adapting_mixes_with_the_first_replicas_source(
    results: list[dict[str, Any]], key: str
) -> None:
    x = through(network()[0], everything())
    state, _ = results[0][key]
    np.testing.assert_allclose(state["1.running_mean"], x.mean(0) * 30 / 46, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["1.running_var"], (16 + 30 * x.var(0, ddof=1)) / 46, rtol=1e-5)


def test_without_synchronizing_each_measures_its_own(results: list[dict[str, Any]]) -> None:
    for rank in (0, 2):
        own = through(network()[0], torch.cat(batches(rank)).double().numpy())
        kept = results[rank]["alone"]["1.running_mean"]
        np.testing.assert_allclose(kept, own.mean(0), rtol=1e-5, atol=1e-5)


def test_a_failure_on_one_replica_is_told_on_all(results: list[dict[str, Any]]) -> None:
    assert results[1]["failed"] == "KeyError: 'broken file'"
    for rank in (0, 2):
        assert results[rank]["failed"] == (
            "RuntimeError: calibrate: replica 1 failed: KeyError: 'broken file'"
        )
    assert all(result["whole"] for result in results)
