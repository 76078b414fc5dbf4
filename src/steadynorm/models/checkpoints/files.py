"""Checkpoint files as arrays by name. Nothing is unpickled into code."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from steadynorm.models.checkpoints import formats
from steadynorm.models.checkpoints.formats import LARGEST_EXPANSION, Entry

READERS = {
    ".safetensors": formats.safetensors,
    ".pt": formats.torch_file,
    ".pth": formats.torch_file,
    ".bin": formats.torch_file,
    ".npz": formats.npz,
    ".h5": formats.hdf5,
    ".keras": formats.keras,
}
READABLE = ".safetensors, .pt, .pth, .bin, .npz, .weights.h5, .h5, .keras"


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name.

    torch: `.pt`, `.pth`, `.bin` (read with `weights_only=True`; a dictionary under "state_dict",
    "model_state_dict" or "model" is taken) and `.safetensors`. Keras: `.weights.h5` and `.keras`,
    whose files number the variables of a layer instead of naming them: a layer with four arrays of
    one length, and perhaps a count, is taken for gamma, beta, moving_mean, moving_variance
    (num_batches_tracked); others keep their numbers. flax: `.safetensors` or `.npz` with names
    joined by dots or slashes.

    Raises:
        ValueError: another kind of file, or one that is damaged or would run code, in one line.
        FileNotFoundError: no such file.
    """
    with entries(path) as held:
        return {name: entry.load() for name, entry in held.items()}


@contextmanager
def entries(path: str | os.PathLike[str]) -> Iterator[dict[str, Entry]]:
    """What arrays a checkpoint holds, each read only when its `load()` is called.

    Raises as `read` does, inside the block too.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"path must end in one of {READABLE}; got {path.name!r}.")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path} is empty.")
    with ExitStack() as opened:
        with damage_told(path):
            found = reader(path, opened)
        yield {name: _guarded(entry, name, path, size) for name, entry in found.items()}


def keras_settings(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The settings of every batch normalization layer in a `.keras` file; none in other files.

    Raises ValueError for a damaged one.
    """
    path = Path(path)
    if path.suffix != ".keras":
        return []
    with damage_told(path):
        return formats.keras_settings(path)


def _guarded(entry: Entry, name: str, path: Path, size: int) -> Entry:
    def load() -> np.ndarray:
        if 2 * prod(entry.shape) > LARGEST_EXPANSION * max(size, 1 << 16):
            raise ValueError(
                f"{path} cannot be read: {name!r} of shape {entry.shape} is larger than such a "
                f"file can hold."
            )
        with damage_told(path):
            return entry.load()

    return entry._replace(load=load)


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Turns whatever a library says of bytes it cannot make sense of into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library may warn first; the line below says it
            yield
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} cannot be read: {_why_not_unpickled(error)}.") from error
    except Exception as error:
        own = type(error) is ValueError
        what = str(error) if own else f"{type(error).__name__}: {error}".rstrip(": ")
        lines = what.strip().splitlines()
        # The first sentence: libraries go on by advising how to run it nevertheless.
        line = re.split(r"(?<=\w)\. ", lines[0])[0].rstrip(".") if lines else type(error).__name__
        short = line if len(line) < 200 else f"{line[:200]}…"
        raise ValueError(f"{path} cannot be read: {short}.") from error


def _why_not_unpickled(error: pickle.UnpicklingError) -> str:
    command = re.search(r"GLOBAL ([\w.]+)", str(error))
    if command:
        return (
            f"it would run {command.group(1)}, which may be harmful and is not run; save the state "
            f"dict alone, or as .safetensors"
        )
    return "it is no checkpoint of tensors alone"


def write(weights: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write arrays to `.safetensors` or `.npz`; an old file stays whole until the new one is.

    Raises:
        ValueError: another kind of file, or what is no array of numbers.
    """
    path = Path(path)
    if path.suffix not in {".safetensors", ".npz"}:
        raise ValueError(f"path must end in .safetensors or .npz; got {path.name!r}.")
    arrays = {name: np.array(array, order="C") for name, array in weights.items()}
    if strange := [name for name, array in arrays.items() if array.dtype == object]:
        raise ValueError(f"weights must be arrays of numbers; got objects under {strange}.")
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".npz":
            np.savez(beside, allow_pickle=False, **arrays)
        else:
            from safetensors.numpy import save_file

            save_file(arrays, beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
