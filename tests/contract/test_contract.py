"""One behaviour in every framework: 50 training steps of one network from the same weights.

Values, gradients and running statistics agree to 1e-5 after conversion, with each other and with
`torch.nn` in float64.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.contract.train import BATCH, RATE, record
from tests.keras.test_backends import ROOT, environment

import steadynorm as sn

PLACES = ("torch", "jax", "keras-tensorflow", "keras-jax", "keras-torch")


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    """Weights under torch's names, and 50 batches of a problem that can be learned."""
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    weights: dict[str, Any] = {}
    for name, (inner, outer) in {"0": (12, 16), "2": (16, 8), "4": (8, 3)}.items():
        weights[f"{name}.weight"] = draw((outer, inner)) / np.sqrt(inner)
        weights[f"{name}.bias"] = 0.1 * draw(outer)
    for name, channels in {"1": 16, "3": 8}.items():
        weights[f"{name}.weight"] = 1 + 0.2 * draw(channels)
        weights[f"{name}.bias"] = 0.2 * draw(channels)
        weights[f"{name}.running_mean"] = draw(channels)
        weights[f"{name}.running_var"] = rng.random(channels) + 0.5
        weights[f"{name}.num_batches_tracked"] = np.asarray(3)
    x = draw((50, BATCH, 12)) + 0.5
    y = np.tanh(x @ draw((12, 3)) / 3)
    return {"x": x, "y": y} | {f"w:{name}": np.asarray(a) for name, a in weights.items()}


@pytest.fixture(scope="module")
def expected(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In float64; with `Batch` by torch.nn's own layer."""

    class Theirs(torch.nn.BatchNorm1d):
        def __init__(self, channels: int, *, statistics: str, activation: Any, **rest: Any) -> None:
            super().__init__(channels, **rest)
            self.after = torch.tanh if activation else torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.after(super().forward(x))

    found = {}
    torch.set_default_dtype(torch.float64)
    try:
        for statistics in ("batch", "steady"):
            with pytest.MonkeyPatch.context() as patch:
                if statistics == "batch":
                    patch.setattr(sn, "BatchNorm1d", Theirs)
                results = record("torch", given, statistics, np.float64)
            found |= {f"{statistics}; {key}": value for key, value in results.items()}
    finally:
        torch.set_default_dtype(torch.float32)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_fifty_steps_agree(
    place: str, given: dict[str, np.ndarray], expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    framework, _, backend = place.partition("-")
    for needed in ({"jax": ["jax", "flax"]}.get(framework, [framework]), [backend or "numpy"]):
        for package in needed:
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
    np.savez(tmp_path / "in.npz", allow_pickle=False, **given)
    files = [str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.train", framework, *files],
        cwd=ROOT,
        env={**environment(backend or "jax"), "PYTHONPATH": os.pathsep.join(["src", "."])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(files[1]) as archive:
        found = dict(archive)
    assert found.keys() == expected.keys()
    assert float(expected["batch; loss 50"]) < 0.5 * float(expected["batch; loss 1"])
    worst = {key: np.abs(found[key] - value).max() for key, value in expected.items()}
    bad = {key: error for key, error in worst.items() if not error <= 1e-5}
    assert bad == {}
    for statistics in ("batch", "steady"):  # the first step's gradients
        for name in [key[2:] for key in given if key.endswith((".weight", ".bias"))]:
            key = f"{statistics}; step 1: {name}"
            gradients = [(given[f"w:{name}"] - after[key]) / RATE for after in (found, expected)]
            assert np.abs(gradients[0] - gradients[1]).max() <= 1e-5, key
