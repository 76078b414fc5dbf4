"""What Inductor makes of the layer on CUDA: as many kernels and passes as of torch.nn's."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "inductor_kernels.py"
ROW = re.compile(
    r"^\| (.+), (\S+) \| (\S+) \| (\d+)(.*?), ([\d.]+) \| (\d+)(.*?), ([\d.]+) \|$", re.M
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Inductor writes its kernels with triton"
)


@pytest.fixture(scope="module")
def table():
    """(case, layout, policy) -> kernels, others and passes of forward, then of backward."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--policies", "torch.nn,batch,steady"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return {
        (case, layout, policy): rest for case, policy, layout, *rest in ROW.findall(answer.stdout)
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["BN", "BN + ReLU", "BN + add + ReLU"])
def test_batch_fuses_as_torch_does(table, case, layout):
    kernels, others, passes, *backward = table[case, layout, "batch"]
    peer, _, peers_passes, *peers_backward = table[case, layout, "torch.nn"]
    assert (kernels, passes) == (peer, peers_passes)
    assert others == " + 1 others"  # the copy of the running statistics
    assert backward == peers_backward


@pytest.mark.parametrize("case", ["BN", "BN + ReLU", "BN + add + ReLU"])
def test_steady_fuses_as_torch_does_where_one_kernel_holds_a_channel(table, case):
    kernels, _, passes, *backward = table[case, "contiguous", "steady"]
    peer, _, peers_passes, *peers_backward = table[case, "contiguous", "torch.nn"]
    assert (kernels, passes) == (peer, peers_passes)
    assert backward == peers_backward
