"""Keras's own tests run in processes of their own, see test_keras_own.py; not as part of ours."""

collect_ignore = ["kerass_own_checks.py"]
