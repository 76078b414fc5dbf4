"""Which tests are slow, and so left to `make test-slow`; and nothing compiled outlives a test."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# The longest folders and files of `pytest --durations=0`: they train, compile with Inductor, take
# real networks, or start processes and browsers.
SLOW = (
    "contract",
    "doctor/report/test_browser.py",
    "doctor/test_blind.py",
    "doctor/test_fixes.py",
    "doctor/test_gallery.py",
    "doctor/test_keras_live.py",
    "doctor/test_missed.py",
    "doctor/test_outside.py",
    "evidence",
    "keras/test_backends.py",
    "kernels/test_compiled.py",
    "kernels/test_cpu_backward.py",
    "kernels/test_cpu_runtime.py",
    "kernels/test_inductor.py",
    "kernels/test_signs.py",
    "models/calibration/test_replicas.py",
    "models/surgery/test_models.py",
    "models/test_hostile_files.py",
    "models/surgery/test_survey.py",
    "models/test_other_tools.py",
    "models/test_random_graphs.py",
    "nn/test_compile.py",
    "nn/test_distributed_wrappers.py",
    "nn/test_export.py",
    "nn/test_gradient_memory_compiled.py",
    "nn/test_recurrent.py",
    "nn/test_recurrent_graphs.py",
    "nn/test_synchronize.py",
    "report/test_browser.py",
    "test_attack.py",
    "test_typing.py",
    "with/test_tools.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies under one of `SLOW`."""
    slow = {HERE / path for path in SLOW}
    if gone := [str(path) for path in slow if not path.exists()]:
        raise pytest.UsageError(f"tests/conftest.py: SLOW names what does not exist: {gone}")
    for item in items:
        if not slow.isdisjoint((item.path, *item.path.parents)):
            item.add_marker(pytest.mark.slow)


def pytest_runtest_teardown() -> None:
    """Forget what a test has compiled: torch.compile refuses a ninth variant of one function."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
