"""Skipped where Keras is not installed; every backend runs in a process of its own."""

from importlib.util import find_spec

collect_ignore = ["kerass_own_checks.py"]  # Keras's own tests, with settings of their own
if find_spec("keras") is None:
    collect_ignore_glob = ["test_*.py"]  # pip install "steadynorm[keras]"
