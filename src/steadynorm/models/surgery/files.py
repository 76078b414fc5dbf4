"""Read models, weights and data, and write weights so that a kill never leaves half a file.

Nothing read here is unpickled into code: safetensors, NumPy arrays without objects, or
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from steadynorm.models.checkpoints.files import damage_told
from steadynorm.models.checkpoints.formats import unnested


def load_model(spec: str) -> nn.Module:
    """The model made by `package.module:factory`, called without arguments.

    The current folder is searched first. Raises ValueError for a malformed or unknown name,
    TypeError if what is made is no model.

    >>> load_model("torch.nn:Identity")
    Identity()
    """
    module_name, colon, path = spec.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"MODEL must be package.module:factory; got {spec!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"MODEL names a module that cannot be imported: {error}.") from error
    for name in path.split("."):
        if not hasattr(made, name):
            raise ValueError(f"MODEL: {module_name} has no {path!r}.")
        made = getattr(made, name)
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise TypeError(f"MODEL must make a torch.nn.Module; {spec} made {type(model).__name__}.")
    return model


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or from a weights-only checkpoint.

    One nested under "state_dict", "model_state_dict" or "model" is found there. Raises ValueError
    for a file that is damaged, would run code, or holds no state dict.
    """
    with damage_told(path):
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        held = torch.load(path, map_location="cpu", weights_only=True)
    held = unnested(held)
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ValueError(f"{path}: holds no state dict of tensors.")
    return dict(held)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a file into a model, name by name.

    Raises ValueError if names or shapes do not fit.
    """
    try:
        model.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model. {error}") from error


def read_data(path: Path) -> Any:
    """Example inputs: one tensor, or a dict of them, from .safetensors, .npy, .npz or .pt."""
    with damage_told(path):
        if path.suffix == ".safetensors":
            held: Any = dict(load_file(path))
        elif path.suffix in (".npy", ".npz"):
            held = np.load(path, allow_pickle=False)
            if not isinstance(held, np.ndarray):
                held = {name: torch.from_numpy(held[name]) for name in held.files}
            else:
                held = torch.from_numpy(held)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    return next(iter(held.values())) if isinstance(held, dict) and len(held) == 1 else held


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict as safetensors, or as a torch checkpoint for .pt, .pth and .bin.

    Tensors that share memory are written each in full.
    """
    with replacing(path) as beside:
        if path.suffix in (".pt", ".pth", ".bin"):
            torch.save(dict(weights), beside)
        else:
            whole = {name: t.detach().contiguous().clone() for name, t in weights.items()}
            save_file(whole, beside)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` to write to, put in its place only once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        if path.exists():
            beside.chmod(path.stat().st_mode & 0o777)
        else:
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
