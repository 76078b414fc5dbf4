"""Keras reads its backend once, so its checks run in one process for each backend."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BACKENDS = ("tensorflow", "jax", "torch")
ROOT = Path(__file__).resolve().parents[2]


def environment(backend: str) -> dict[str, str]:
    quiet = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **quiet, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}


# Keras's tests have a marker of their own, and warn of what is not ours.
AS_KERAS_RUNS_THEM = (
    *("-o", "markers=requires_trainable_backend: trains"),
    *("-o", "filterwarnings=default"),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("layer_checks.py", ()),
        ("edge_checks.py", ()),
        ("model_checks.py", ()),
        ("kerass_own_checks.py", AS_KERAS_RUNS_THEM),
    ],
    ids=["layer", "edges", "models", "kerass own"],
)
def test_layer(file: str, options: tuple[str, ...], backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    checks = str(Path(__file__).with_name(file))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, checks]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(backend),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_loads_the_backend_alone(backend: str) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    others = [name for name in ("torch", "tensorflow", "flax", "numba") if name != backend]
    ask = (
        "import sys, numpy, steadynorm.keras\n"
        "layer = steadynorm.keras.BatchNormalization(statistics='steady', activation='relu')\n"
        "layer(numpy.ones((2, 3)), training=True)\n"
        f"print(*(f for f in {others} if f in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        env=environment(backend),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_replicas_are_one_batch(backend: str, tmp_path: Path) -> None:
    if find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replica_checks.py")), str(tmp_path)],
        cwd=ROOT,
        env={**environment(backend), **two},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "passed").exists()
