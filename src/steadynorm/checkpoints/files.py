"""Checkpoint files as arrays by name. Nothing is unpickled into code."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

READABLE = ".safetensors, .pt, .pth, .bin, .npz, .weights.h5, .h5, .keras"


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name.

    torch: `.pt`, `.pth`, `.bin` (read with `weights_only=True`; a dictionary under "state_dict" or
    "model" is taken) and `.safetensors`. Keras: `.weights.h5` and `.keras`, whose files number the
    variables of a layer instead of naming them: a layer with four arrays of one length, and perhaps
    a count, is taken for gamma, beta, moving_mean, moving_variance (num_batches_tracked); others
    keep their numbers. flax: `.safetensors` or `.npz` with names joined by dots or slashes.

    Raises:
        ValueError: another kind of file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: _array(tensor) for name, tensor in load_file(path).items()}
    if path.suffix in {".pt", ".pth", ".bin"}:
        return _read_torch(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    if path.suffix == ".h5":
        return _read_keras(path)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            return _read_keras(Path(archive.extract("model.weights.h5", folder)))
    raise ValueError(f"path must end in one of {READABLE}; got {path.name!r}.")


def _array(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach().cpu()
    array: np.ndarray = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {k: _array(v) for k, v in content.items() if isinstance(v, torch.Tensor)}


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    import h5py

    found: dict[str, np.ndarray] = {}

    def visit(name: str, group: Any) -> None:
        if not (name.endswith("vars") and isinstance(group, h5py.Group)) or not len(group):
            return
        arrays = [np.asarray(group[key]) for key in sorted(group, key=int)]
        prefix = name.removesuffix("vars").rstrip("/")
        names = [str(i) for i in range(len(arrays))]
        shapes = [array.shape for array in arrays]
        counted = len(arrays) == 5 and shapes[4] == ()
        if (len(arrays) == 4 or counted) and len(shapes[0]) == 1 and len(set(shapes[:4])) == 1:
            names = ["gamma", "beta", "moving_mean", "moving_variance", "num_batches_tracked"]
        found.update((f"{prefix}/{n}", array) for n, array in zip(names, arrays, strict=False))

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


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
