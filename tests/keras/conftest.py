"""Skipped where Keras is not installed; every backend runs in a process of its own."""

from importlib.util import find_spec

if find_spec("keras") is None:
    collect_ignore_glob = ["test_*.py"]  # pip install "steadynorm[keras]"
