"""JAX on the CPU, which stands for four devices; skipped where JAX or flax is not installed."""

import os
from importlib.util import find_spec

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "device_count" not in os.environ.get("XLA_FLAGS", ""):  # read when JAX makes its first array
    os.environ["XLA_FLAGS"] = " --xla_force_host_platform_device_count=4"

if find_spec("jax") is None or find_spec("flax") is None:
    collect_ignore_glob = ["test_*.py"]  # pip install "steadynorm[jax]"
