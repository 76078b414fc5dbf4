"""Processes killed while they write: a reader always finds a whole file."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from tests.attack._children import Child

from steadynorm.files import STALE_AFTER
from steadynorm.models.files import read, write

TITLE = "kills: a writer killed at a random moment"

NAMES = ("w.safetensors", "w.npz", "w.pt")
VALUES = 200_000


def held(value: float) -> dict[str, np.ndarray]:
    return {"weight": np.full(VALUES, value, np.float32)}


def keep_writing(path: Path) -> None:
    for value in cycle((1.0, 2.0)):
        write(held(value), path)


def killed(name: str, after: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        write(held(0.0), path)
        path.chmod(0o640)
        child = Child(partial(keep_writing, path), 60)
        time.sleep(after)
        child.kill()
        child.wait()
        found = read(path)["weight"]
        assert found.shape == (VALUES,), "the file is not whole"
        assert len(np.unique(found)) == 1, "the file holds parts of two"
        assert path.stat().st_mode & 0o777 == 0o640, "its permissions changed"
        for left in Path(folder).glob(".*"):
            os.utime(left, times=(0, time.time() - 2 * STALE_AFTER))
        write(held(3.0), path)
        left = {other.name for other in Path(folder).iterdir()} - {name}
        assert not left, f"what the kill left was not removed: {', '.join(left)}"


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for _ in range(300 if long else 30):
        name, after = rng.choice(NAMES), rng.uniform(0, 0.1)
        yield f"{name} after {after * 1000:.1f} ms", partial(killed, name, after)
