"""The one reader and writer of checkpoints and data: tensors and arrays by name.

Nothing read here is unpickled into code, and reading costs at most `LARGEST_EXPANSION` times the
file's size for all its arrays together, which is checked before any of them is read.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from steadynorm.files import check_writable, replacing
from steadynorm.models import formats
from steadynorm.models.formats import Entry, array_of, within_size

READERS = {
    ".safetensors": formats.safetensors,
    ".pt": formats.torch_file,
    ".pth": formats.torch_file,
    ".ckpt": formats.torch_file,
    ".tar": formats.torch_file,  # .pth.tar
    ".bin": formats.torch_file,
    ".npy": formats.npy,
    ".npz": formats.npz,
    ".h5": formats.hdf5,
    ".keras": formats.keras,
}
WRAPPERS = ("module", "_orig_mod", "model")
READABLE = ".safetensors, .pt, .pth, .pth.tar, .ckpt, .bin, .npz, .weights.h5, .h5, .keras"


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name.

    torch: `.pt`, `.pth`, `.bin` (read with `weights_only=True`; a dictionary under "state_dict",
    "model_state_dict" or "model" is taken) and `.safetensors`. Keras: `.weights.h5` and `.keras`,
    whose files number the variables of a layer instead of naming them: a layer with four arrays of
    one length, and perhaps a count, is taken for gamma, beta, moving_mean, moving_variance
    (num_batches_tracked); others keep their numbers. flax: `.safetensors` or `.npz` with names
    joined by dots or slashes.

    Raises:
        ValueError: another kind of file, or one that is damaged, would run code, or whose arrays
            are too large for such a file, in one line.
        FileNotFoundError: no such file.
    """
    with entries(path) as held:
        return {name: array_of(entry.load()) for name, entry in held.items()}


@contextmanager
def entries(path: str | os.PathLike[str]) -> Iterator[dict[str, Entry]]:
    """What arrays a checkpoint holds, each read only when its `load()` is called.

    Raises as `read` does, inside the block too.
    """
    path = Path(path)
    reader = READERS.get(path.suffix)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the checkpoint file in it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file.")  # a FIFO would be waited for
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if reader is None:
        raise ValueError(f"path must end in one of {READABLE}; got {path.name!r}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    with ExitStack() as opened:
        with explained(path):
            found = reader(path, opened)
            within_size(found, path)
        yield {name: _explained(entry, path) for name, entry in found.items()}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Any]:
    """All tensors of a file by name, in the types they are stored in. Raises as `read` does."""
    import torch

    with entries(path) as held:
        loaded = {name: entry.load() for name, entry in held.items()}
        return {  # a copy: memory that maps a file would change with it
            name: value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
            for name, value in loaded.items()
        }


def read_data(path: Path) -> Any:
    """Example inputs: one tensor, a tuple, or a dict, from .safetensors, .npy, .npz or .pt."""
    held = read_tensors(path)
    if len(held) == 1:
        return next(iter(held.values()))
    return tuple(held.values()) if formats.is_sequence(held) else held


def load_weights(model: Any, path: Path) -> None:
    """Loads a checkpoint into a model, name by name.

    Names that all begin with what DistributedDataParallel, torch.compile or a LightningModule puts
    before them (`module.`, `_orig_mod.`, `model.`) lose it, unless the model's own do too; so do
    those of torch's AveragedModel, whose count `n_averaged` is dropped. A tensor that the model
    holds under several names may be in the file under one, as `safetensors.torch.save_model` does.

    Raises ValueError for a file that cannot be read, or whose names or shapes do not fit.
    """
    own = model.state_dict(keep_vars=True)
    held = _unwrapped(read_tensors(path), own)
    names_in_file = {id(own[name]): name for name in own.keys() & held.keys()}
    for name, tensor in own.items():
        if hasattr(tensor, "detach") and name not in held and id(tensor) in names_in_file:
            held[name] = held[names_in_file[id(tensor)]]
    try:
        model.load_state_dict(held)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the model. {_prefix_of(held, own)}{error}"
        ) from error


def _unwrapped(held: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    while held and not held.keys() & own.keys():
        named = {name: value for name, value in held.items() if name != "n_averaged"}
        first = next(iter(named), "").partition(".")[0]
        if first not in WRAPPERS or not all(name.startswith(f"{first}.") for name in named):
            break
        held = {name.removeprefix(f"{first}."): value for name, value in named.items()}
    return held


def _prefix_of(held: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Which part of the file would fit the model, in words."""
    some = next(iter(own), "")
    for name in held:
        prefix = name.removesuffix(some)
        if some and prefix.endswith(".") and all(f"{prefix}{one}" in held for one in own):
            return f"It would without {prefix!r} before its names. "
    return ""


def keras_settings(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The settings of every batch normalization layer in a `.keras` file; none in other files.

    Raises ValueError for a damaged one.
    """
    path = Path(path)
    if path.suffix != ".keras":
        return []
    with explained(path):
        return formats.keras_settings(path)


def write(weights: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes tensors or arrays, as the name's ending says: .safetensors, .npz, .pt, .pth or .bin.

    An old file stays whole until the new one is; see `steadynorm.files.replacing`. Tensors that
    share memory are written each in full.

    Raises ValueError for another kind of file, or what is no array of numbers.
    """
    path = Path(path)
    _check_ending(path)
    held = {name: formats.whole(value) for name, value in weights.items()}
    kinds_of = {n: v.dtype.kind for n, v in held.items() if isinstance(v, np.ndarray)}
    if objects := [name for name, kind in kinds_of.items() if kind in "OSUMmV"]:
        raise ValueError(f"weights must be arrays of numbers; got objects under {objects}.")
    with replacing(path) as part:
        formats.WRITERS[path.suffix](held, part)


def check_out(path: Path | None) -> None:
    """Raises as `write` would for that path, before the work whose result goes there."""
    if path is not None:
        _check_ending(path)
        check_writable(path)


def _check_ending(path: Path) -> None:
    if path.suffix not in formats.WRITERS:
        kinds = ", ".join(formats.WRITERS)
        raise ValueError(f"path must end in one of {kinds}; got {path.name!r}.")


def _explained(entry: Entry, path: Path) -> Entry:
    def load() -> Any:
        with explained(path):
            return entry.load()

    return entry._replace(load=load)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns whatever a library says of bytes it cannot make sense of into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a library may warn first; the line below says it
            yield
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} cannot be read: {_why_not_unpickled(error)}.") from error
    except (LookupError, EOFError) as error:  # bytes that are no such file; the text says nothing
        raise ValueError(f"{path} cannot be read: it is damaged, or of another kind.") from error
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
