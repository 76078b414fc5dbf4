"""Tests of the GPU kernels on machines without a GPU: in Triton's interpreter, and compiled.

`make test-triton` runs both, each in a process of its own: by TRITON_INTERPRET the kernels become
interpreted functions or compiled ones when they are first imported. Other tests import no Triton.
"""

import os

import pytest

pytest.register_assert_rewrite("tests.kernels.gpu.cases")

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]  # but for a file named on the command line: static_checks.py


@pytest.fixture
def nan_in_fresh_memory():
    """PyTorch fills uninitialized memory with NaN while it is asked to be deterministic."""
    import torch

    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu(monkeypatch):
    """The backend switched on, for tensors in this machine's memory."""
    from steadynorm.kernels.gpu.backend import GPU

    monkeypatch.setattr(GPU, "on", True)
    monkeypatch.setattr(GPU, "interpreted", True)
    return GPU
