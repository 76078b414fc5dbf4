"""The formats of checkpoint files: what arrays a file holds, read one by one when asked.

Every reader here takes a path and an `ExitStack` that closes what it opened, and returns entries
by name. A file may come from anybody: nothing in it is run, and nothing is allocated on its word.
`WRITERS` are the formats that can be written, by the name's ending.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steadynorm._extras import lacking

NESTED = ("state_dict", "model_state_dict", "model")
KERAS_NAMES = ("gamma", "beta", "moving_mean", "moving_variance", "num_batches_tracked")
KERAS_RENORM_NAMES = ("moving_stddev", "renorm_mean", "renorm_stddev")
# Compressed zeros shrink a thousandfold, trained weights hardly at all.
LARGEST_EXPANSION = 100
SMALLEST_SIZE = 1 << 16  # a tiny file's header may say much of little
LARGEST_SETTINGS = 10  # Keras stores its configuration uncompressed


class Entry(NamedTuple):
    """An array that a file holds: `dtype` is the one it is kept in, `load()` reads it.

    What `load` returns is a torch tensor or a NumPy array, whichever the format's library gives.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Any]


Entries = dict[str, Entry]


def within_size(found: Entries, path: Path) -> None:
    """Raises ValueError where the arrays of a file together are larger than it can hold."""
    limit = LARGEST_EXPANSION * max(path.stat().st_size, SMALLEST_SIZE)
    total = 0
    for name, entry in found.items():
        size = prod(entry.shape) * _ITEM_SIZES.get(entry.dtype, 8)
        total += size
        if size > limit:
            what = f"{name!r} of shape {entry.shape} is"
            raise ValueError(f"{what} larger than such a file can hold")
        if total > limit:
            raise ValueError("its arrays together are larger than such a file can hold")


_ITEM_SIZES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int16": 2, "int8": 1, "uint8": 1,
    "bool": 1,
}  # fmt: skip


def is_sequence(found: Mapping[str, Any]) -> bool:
    """Whether the names only number the tensors of a list."""
    return list(found) == [str(number) for number in range(len(found))]


def safetensors(path: Path, opened: ExitStack) -> Entries:
    """Of `.safetensors`; the library checks that the header's sizes are the file's."""
    from safetensors import safe_open

    framework = "pt" if find_spec("torch") else "np"  # NumPy knows no bfloat16
    file = opened.enter_context(safe_open(path, framework=framework))

    def entry(name: str) -> Entry:
        held = file.get_slice(name)
        kind = held.get_dtype()
        return Entry(
            tuple(held.get_shape()),
            _SAFETENSORS_TYPES.get(kind, kind.lower()),
            lambda: file.get_tensor(name),
        )

    return {name: entry(name) for name in file.keys()}  # noqa: SIM118  it is no mapping


_SAFETENSORS_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def torch_file(path: Path, opened: ExitStack) -> Entries:
    """Of `.pt`, `.pth`, `.bin`: read weights-only, a nested state dict found by its usual names."""
    import torch

    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
    # Mapped, a checkpoint of any size costs what is looked at.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    content = unnested(content)
    if isinstance(content, torch.Tensor):
        content = {"": content}
    if isinstance(content, tuple | list):
        content = dict(enumerate(content))
    tensors = content if isinstance(content, Mapping) else {}
    found = {str(n): t for n, t in tensors.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    if not found:
        raise ValueError("it holds no state dict of tensors")
    return {name: tensor_entry(tensor) for name, tensor in found.items()}


def unnested(content: Any) -> Any:
    """The state dict inside a checkpoint, where it lies under one of its usual names."""
    if isinstance(content, Mapping):
        for name in NESTED:
            if isinstance(content.get(name), Mapping):
                return content[name]
    return content


def tensor_entry(tensor: Any) -> Entry:
    """A tensor in memory, or mapped, as an entry."""
    return Entry(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


def array_of(value: Any) -> np.ndarray:
    """A tensor as an array of its own; what NumPy has no type for, bfloat16, becomes float32."""
    if not hasattr(value, "detach"):
        return np.asarray(value)
    tensor = value.detach().to("cpu", copy=True)
    known = hasattr(np, str(tensor.dtype).removeprefix("torch."))
    array: np.ndarray = (tensor if known else tensor.float()).numpy()
    return array


def npy(path: Path, opened: ExitStack) -> Entries:
    """Of `.npy`: one array, mapped."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return {"": Entry(array.shape, array.dtype.name, lambda: _native(array))}


def npz(path: Path, opened: ExitStack) -> Entries:
    """Of `.npz`, without objects."""
    stream = opened.enter_context(path.open("rb"))  # np.load leaves it open where it fails
    archive = np.load(stream, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds one array without a name")
    opened.enter_context(archive)
    members: Any = archive.zip
    held: Entries = {}
    for file_name in members.namelist():
        name = file_name.removesuffix(".npy")
        if name in held:
            raise ValueError(f"it holds two arrays named {name!r}")
        with members.open(file_name) as member:
            version = np.lib.format.read_magic(member)
            header = "read_array_header_1_0" if version == (1, 0) else "read_array_header_2_0"
            shape, _, dtype = getattr(np.lib.format, header)(member)
        # By the file's name: NumPy takes "a.npy" for the array "a" where both are there.
        held[name] = Entry(shape, dtype.name, _load_from(archive, file_name))
    return held


def _load_from(held: Any, name: Any) -> Callable[[], np.ndarray]:
    return lambda: _native(np.asarray(held[name]))


def _native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes, the only one that torch takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def keras(path: Path, opened: ExitStack) -> Entries:
    """Of `.keras`: an archive of the weights as HDF5, whose layers its settings explain."""
    archive = opened.enter_context(zipfile.ZipFile(path))
    inner = _member(archive, "model.weights.h5", "weights", path, LARGEST_EXPANSION)
    folder = opened.enter_context(tempfile.TemporaryDirectory())
    known: dict[str, tuple[str, ...] | None] = {}
    for settings in keras_settings(path) if "config.json" in archive.namelist() else []:
        name, roles = str(settings.get("name")), _roles_by(settings)
        known[name] = roles if known.get(name, roles) == roles else None  # two layers of one name
    return hdf5(Path(archive.extract(inner, folder)), opened, known)


def _member(
    archive: zipfile.ZipFile, name: str, what: str, path: Path, factor: int
) -> zipfile.ZipInfo:
    """A part of an archive, if its size is one that such a file can hold."""
    found = archive.getinfo(name)
    if found.file_size > factor * max(path.stat().st_size, SMALLEST_SIZE):
        raise ValueError(f"its {what} would be larger than such a file can hold")
    return found


def keras_settings(path: Path) -> list[dict[str, Any]]:
    """The settings of every batch normalization layer in a `.keras` file's configuration."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read(_member(archive, "config.json", "settings", path, LARGEST_SETTINGS))

    def visit(value: Any) -> Iterator[dict[str, Any]]:
        if isinstance(value, dict):
            inner = value.get("config")
            if value.get("class_name") == "BatchNormalization" and isinstance(inner, dict):
                yield inner
            value = list(value.values())
        if isinstance(value, list):
            for part in value:
                yield from visit(part)

    return list(visit(json.loads(text)))


def hdf5(
    path: Path, opened: ExitStack, known: Mapping[str, tuple[str, ...] | None] | None = None
) -> Entries:
    """Of Keras's `.weights.h5`, which numbers the variables of a layer instead of naming them, or
    of a whole model's `.h5`, which names them. `known`: what a layer of a name keeps, in order.

    Links and data that lie in other files are not followed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"reading it {lacking(error) or f'failed: {error}'}") from error

    found: Entries = {}

    def entry(data: Any) -> Entry:
        if data.external or data.is_virtual:
            raise ValueError("its arrays lie in other files, which are not opened")
        return Entry(data.shape, data.dtype.name, _load_from(data, ()))

    def visit(name: str, group: Any) -> None:
        if name.startswith("model_weights/") and isinstance(group, h5py.Dataset):
            found[name.removeprefix("model_weights/").removesuffix(":0")] = entry(group)
        if not (name.endswith("vars") and isinstance(group, h5py.Group)):
            return
        keys = sorted((key for key in group if key.isdecimal()), key=int)
        held = [group[key] for key in keys if type(group.get(key, getlink=True)) is h5py.HardLink]
        held = [data for data in held if isinstance(data, h5py.Dataset)]
        prefix = name.removesuffix("vars").rstrip("/")
        roles = _keras_roles(
            [d.shape for d in held], (known or {}).get(str(group.attrs.get("name")))
        )
        for role, data in zip(roles, held, strict=True):
            found[f"{prefix}/{role}"] = entry(data)

    file = opened.enter_context(h5py.File(path, "r"))
    file.visititems(visit)
    return found


def _roles_by(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What a batch normalization with these settings keeps, in Keras's order."""
    learned = [n for n, s in (("gamma", "scale"), ("beta", "center")) if settings.get(s, True)]
    renorm = KERAS_RENORM_NAMES if settings.get("renorm") else ()
    return (*learned, *KERAS_NAMES[2:4], *renorm)


def _keras_roles(shapes: list[Any], known: tuple[str, ...] | None) -> list[str]:
    """Names for a layer's variables, and numbers where nothing tells what they are.

    Where the settings are not known, four arrays of one length are a batch normalization's, and
    seven one's with `renorm=True`.
    """
    counted = len(shapes) > 1 and shapes[-1] == ()
    arrays = shapes[:-1] if counted else shapes
    if known is None:
        known = {4: KERAS_NAMES[:4], 7: (*KERAS_NAMES[:4], *KERAS_RENORM_NAMES)}.get(len(arrays))
    alike = len(set(arrays)) == 1 and len(arrays[0]) == 1
    if known is not None and len(known) == len(arrays) and alike:
        return [*known, *KERAS_NAMES[4 : 4 + counted]]
    return [str(number) for number in range(len(shapes))]


# --- writing


def whole(value: Any) -> Any:
    """A tensor or array in memory of its own, contiguous."""
    if hasattr(value, "detach"):
        return value.detach().contiguous().clone()
    return np.array(value, order="C")


def _write_safetensors(held: Mapping[str, Any], path: Path) -> None:
    # Not by save_file, which (safetensors 0.8) writes to a temporary file of its own beside
    # the path: a killed process would leave that behind.
    if all(isinstance(value, np.ndarray) for value in held.values()):
        from safetensors.numpy import save as save_arrays

        content = save_arrays(dict(held))
    else:
        from safetensors.torch import save

        content = save(_tensors(held))
    path.write_bytes(content)


def _write_npz(held: Mapping[str, Any], path: Path) -> None:
    for name in held:
        if f"{name}.npy" in held:
            raise ValueError(
                f".npz files cannot tell the names {name!r} and '{name}.npy' apart; "
                f"write .safetensors instead."
            )
    # Not by np.savez, which takes the names as keywords beside its own, such as "file".
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in held.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array_of(value), allow_pickle=False)


def _write_torch(held: Mapping[str, Any], path: Path) -> None:
    import torch

    torch.save(_tensors(held), path)


def _tensors(held: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.as_tensor(value) for name, value in held.items()}


WRITERS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".bin": _write_torch,
}
