"""Checkpoints and data of every format: mutated, bombs, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import random
import resource
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from tests.attack._children import Child
from tests.attack.cache_faults import mutated
from tests.models.test_hostile_files import BOMBS

from steadynorm.models.files import keras_settings, read_data, read_tensors, write

TITLE = "files: mutated, bombs, and pickles that run code"

MOST = 200 * 1024  # KiB that reading a small file may take
SECONDS = 60


def keras_model(folder: Path, name: str) -> None:
    """What Keras writes: weights as HDF5, in `.keras` inside an archive beside the settings."""
    import h5py

    weights = folder / "model.weights.h5"
    with h5py.File(weights, "w") as file:
        for layer in ("bn", "bn_1"):
            group = file.create_group(f"layers/{layer}/vars")
            for number in range(4):
                group.create_dataset(str(number), data=np.arange(8, dtype=np.float32))
    if name.endswith(".keras"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.write(weights, "model.weights.h5")
            archive.writestr("config.json", '{"config": {"layers": []}}')


@cache
def whole(name: str) -> bytes:
    """A good file of the format that the name's ending says."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if name.endswith((".h5", ".keras")):
            keras_model(folder, name)
        else:
            held = {f"bn.{part}": np.arange(8, dtype=np.float32) for part in ("weight", "bias")}
            write(held, folder / name)
        return (folder / name).read_bytes()


FORMATS = ("model.pt", "model.npz", "model.safetensors", "model.weights.h5", "model.keras")


def read(path: Path) -> None:
    """As the commands do. ValueError, a message of one line, is how bad input ends."""
    readers = [read_tensors, read_data]
    if path.suffix == ".keras":
        readers.append(keras_settings)
    for reader in readers:
        if "\n" in refusal(reader, path):
            raise AssertionError("the message is longer than a line")


def refusal(reader: Callable[[Path], object], path: Path) -> str:
    try:
        reader(path)
    except ValueError as error:
        return str(error)
    return ""


def survives(path: Path) -> None:
    """Reading it neither crashes nor hangs, nor fills the memory, nor raises anything else."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = Child(partial(read, path), SECONDS).wait()
    assert ended.code == 0, f"ended with {ended.code}: {ended.said}"
    assert ended.peak - before < MOST, f"took {(ended.peak - before) >> 10} MiB"


def mutation(name: str, seed: int) -> None:
    data = mutated(random.Random(seed), whole(name), whole(name)[::-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        survives(path)


def bomb(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        BOMBS[name](path)
        survives(path)


class Run:
    """Unpickled, it makes a folder."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.path,)


def code(name: str) -> None:
    """A pickle that runs code, as the format would carry it."""
    with tempfile.TemporaryDirectory() as folder:
        ran, path = Path(folder, "ran"), Path(folder, name)
        payload = Run(str(ran))
        if path.suffix in (".pt", ".pth"):
            torch.save({"bn.weight": payload}, path)
        elif path.suffix == ".npz":
            np.savez(path, a=np.array([payload], dtype=object))
        else:
            path.write_bytes(pickle.dumps(payload))
        survives(path)
        assert not ran.exists(), "code in the file was run"


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for name in FORMATS:
        for _ in range(500 if long else 20):
            seed = rng.randrange(1 << 32)
            yield f"{name}, mutation {seed}", partial(mutation, name, seed)
    for name in BOMBS:
        yield f"bomb {name}", partial(bomb, name)
    for name in ("a.pt", "a.pth", "a.bin", "a.npz", "a.npy", "a.safetensors", "a.keras", "a.h5"):
        yield f"code in {name}", partial(code, name)
