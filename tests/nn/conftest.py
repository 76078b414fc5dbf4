"""The layer's tests run once per kernel that can serve them."""

from collections.abc import Iterator

import pytest
import torch

from steadynorm.kernels import choice


@pytest.fixture(params=["eager", "cpu", "native"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernels serve: plain PyTorch, compiled, or PyTorch's own operator where it can.

    Fresh memory holds NaN meanwhile, so that a value never written shows.
    """
    name = str(request.param)
    monkeypatch.setattr(choice, "NATIVE_LIMIT", 1 << 40 if name == "native" else 0)
    if name == "eager":
        monkeypatch.setattr(choice, "_cpu_kernels", lambda: (None, "the test asks for eager"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # what makes PyTorch fill new memory with NaN
    yield name
    torch.use_deterministic_algorithms(before)
