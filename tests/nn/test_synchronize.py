"""Several replicas are one process: values, gradients, buffers, and how it ends when one dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.nn import replica_worker
from tests.nn.doomed_replica import DEATHS, TIMEOUT

import steadynorm as sn

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} replicas".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list:
    """What every case said on every replica; they are started once for all cases."""
    results = tmp_path_factory.mktemp("replicas")
    started = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(request.param)),
            *("-m", "tests.nn.replica_worker", str(results)),
        ],
        env=ENVIRONMENT,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert started.returncode == 0, started.stderr[-4000:]
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("case", replica_worker.CASES)
def test_replicas_equal_one_process(outcomes: list[dict[str, str]], case: str) -> None:
    failures = [f"rank {rank}: {said[case]}" for rank, said in enumerate(outcomes) if said[case]]
    assert failures == []


@pytest.mark.parametrize("death", DEATHS)
def test_a_replica_that_died_ends_the_others(death: str, tmp_path: Path) -> None:
    """Each process on its own, since torchrun would end the others itself."""
    begin = time.monotonic()
    replicas = [
        subprocess.Popen(
            [sys.executable, str(HERE / "doomed_replica.py"), death, str(rank), str(tmp_path)],
            env=ENVIRONMENT,
            cwd=HERE.parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [replica.communicate(timeout=TIMEOUT)[1] for replica in replicas]
    assert time.monotonic() - begin < TIMEOUT
    assert replicas[1].returncode == 9
    for rank in (0, 2):
        # After the error, gloo's threads may end the process with "terminate called without an
        # active exception" (seen with torch 2.13 on a busy machine).
        assert replicas[rank].returncode in (1, -signal.SIGABRT)
        assert (
            "RuntimeError: BatchNorm1d: `synchronize`: the exchange of statistics with the other "
            "replicas failed: another replica stopped, or did not reach this layer in time. Look "
            "at the first replica that ended; all replicas must call the layer equally often. ("
        ) in said[rank]


def test_without_replicas_synchronize_means_nothing() -> None:
    assert not dist.is_initialized()
    assert sn.BatchNorm1d(2, synchronize=True)(replica_worker.torch.randn(3, 2)).shape == (3, 2)
