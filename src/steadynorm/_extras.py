"""Which extra brings which package: one table, for every error that has to name one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

EXTRAS = {
    "torch": ("torch", "numba"),
    "keras": ("keras", "h5py"),
    "jax": ("jax", "flax"),
    "lab": ("sklearn", "scipy", "joblib", "altair", "vl_convert"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
_CURES = {
    package: f'pip install "steadynorm[{extra}]"'
    for extra, packages in EXTRAS.items()
    for package in packages
} | {"tensorflow": "pip install tensorflow, or set KERAS_BACKEND to torch or jax"}


def lacking(error: BaseException) -> str | None:
    """What installs the optional package whose import failed; None for any other error.

    >>> lacking(ValueError("something else")) is None
    True
    """
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _CURES or find_spec(package):
        return None
    return f"needs {package}, which is not installed: {_CURES[package]}"


@contextmanager
def needed_by(owner: str) -> Iterator[None]:
    """Let a failed import of an optional package say what installs it.

    Raises ModuleNotFoundError, as the import itself does; other errors pass unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        cure = lacking(error)
        if cure is None:
            raise
        raise ModuleNotFoundError(f"{owner} {cure}", name=error.name) from None


def require(*packages: str) -> None:
    """Raise ModuleNotFoundError for the first that is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
