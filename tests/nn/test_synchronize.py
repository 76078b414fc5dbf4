"""Several replicas are one process: values, gradients, buffers, and how it ends when one dies."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.nn import replica_worker
from tests.nn.doomed_replica import DEATHS, TIMEOUT
from tests.replicas import start, start_well

import steadynorm as sn


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} replicas".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list:
    """What every case said on every replica; they are started once for all cases."""
    results = tmp_path_factory.mktemp("replicas")
    start_well("tests.nn.replica_worker", folder=results, replicas=request.param)
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", replica_worker.CASES)
def test_replicas_equal_one_process(outcomes: list[dict[str, str]], case: str) -> None:
    failures = [f"rank {rank}: {said[case]}" for rank, said in enumerate(outcomes) if said[case]]
    assert failures == []


@pytest.mark.parametrize("death", DEATHS)
def test_a_replica_that_died_ends_the_others(death: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    ended = start("tests.nn.doomed_replica", death, folder=tmp_path, replicas=3)
    assert time.monotonic() - begin < TIMEOUT.total_seconds()
    assert ended[1].returncode == 9
    for rank in (0, 2):
        # After the error, gloo's threads may end the process with "terminate called without an
        # active exception" (seen with torch 2.13 on a busy machine).
        assert ended[rank].returncode in (1, -signal.SIGABRT)
        assert (
            "RuntimeError: BatchNorm1d: `synchronize`: the exchange of statistics with the other "
            "replicas failed: another replica stopped, or did not reach this layer in time. Look "
            "at the first replica that ended; all replicas must call the layer equally often. ("
        ) in ended[rank].stderr


def test_without_replicas_synchronize_means_nothing() -> None:
    assert not dist.is_initialized()
    assert sn.BatchNorm1d(2, synchronize=True)(replica_worker.torch.randn(3, 2)).shape == (3, 2)
