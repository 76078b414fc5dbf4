"""Fresh memory full of NaN, both ways through the CPU kernels, a folder that all users reach."""

import tempfile
from pathlib import Path

import pytest
import torch

from steadynorm.kernels.cpu import prepared, slabs


@pytest.fixture
def nan_in_fresh_memory():
    """PyTorch fills uninitialized memory with NaN while it is asked to be deterministic."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["visit", "parts", "visit past the caches", "parts past the caches"])
def way(request, monkeypatch):
    """All ways through a direction, and two threads, however small the input."""
    monkeypatch.setattr(slabs, "PARALLEL_FROM", 0)
    if "parts" in request.param:
        monkeypatch.setattr(slabs, "VISIT_UP_TO", 0)
    if "past the caches" in request.param:
        for name in ("STREAM_FROM", "STREAM_VISITS_FROM", "STREAM_MAPS_FROM"):
            monkeypatch.setattr(slabs, name, 0)
        monkeypatch.setattr(slabs.Cut, "begins_lines", lambda *_: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    slabs.cut.cache_clear()
    prepared.prepared.cache_clear()
    yield request.param
    torch.set_num_threads(threads)
    slabs.cut.cache_clear()
    prepared.prepared.cache_clear()


@pytest.fixture
def public():
    """An empty folder that every user of the machine can reach, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
