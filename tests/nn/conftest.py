"""The layer's tests run once per kernel that can serve them."""

from collections.abc import Iterator

import pytest
import torch

from steadynorm.kernels import aten
from steadynorm.kernels.cpu.backend import CPU


@pytest.fixture(params=["reference", "cpu", "aten"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernels serve: plain PyTorch, compiled, or PyTorch's own operator where it can.

    Fresh memory holds NaN meanwhile, so that a value never written shows.
    """
    name = str(request.param)
    monkeypatch.setattr(aten, "LIMIT", 1 << 40 if name == "aten" else 0)
    if name == "reference":
        monkeypatch.setattr(CPU, "supports", lambda call: "the test asks for the reference")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what makes PyTorch fill new memory with NaN
    yield name
    torch.use_deterministic_algorithms(before)
