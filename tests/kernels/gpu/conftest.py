"""Tests of the GPU kernels, which no machine here can run: in Triton's interpreter, or compiled.

Both need Triton, and each a process of its own: `make test-triton`. The kernels become interpreted
functions or compiled ones when they are first imported, by TRITON_INTERPRET.
"""

import os
from importlib.util import find_spec

import pytest

pytest.register_assert_rewrite("tests.kernels.gpu.cases")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
COMPILED_ONLY = ["test_static.py"]
collect_ignore_glob = (
    COMPILED_ONLY if INTERPRETED
    else ["test_*.py"] if find_spec("triton") is None or "STEADYNORM_TEST_TRITON" not in os.environ
    else ["test_[!s]*.py"]
)  # fmt: skip


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
