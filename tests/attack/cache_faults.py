"""Mutated cache files, files of others, and environments without a home or a folder."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.kernels import processes

from steadynorm.kernels.cpu import cache

TITLE = "kernel cache: mutated, foreign and unusable files and folders"

NAME, OTHER = "forward-float32", "backward-float32"


class Place:
    """A cache folder of its own for one trial."""

    def __init__(self) -> None:
        self.base = Path(tempfile.mkdtemp())
        self.base.chmod(0o755)
        os.environ[cache.VARIABLE] = str(self.base / "cache")
        os.environ["XDG_CACHE_HOME"] = str(self.base / "none")
        self.folder = self.base / "cache"
        self.content = bytes(range(256)) * 4
        cache.store(NAME, self.content)
        cache.store(OTHER, b"another kernel")
        self.file = self.folder / NAME

    def close(self) -> None:
        shutil.rmtree(self.base, ignore_errors=True)


def mutated(rng: random.Random, whole: bytes, other: bytes) -> bytes:
    """What a bad disk, a killed writer or a clumsy tool makes of a file."""
    data = bytearray(whole)
    at, to = sorted(rng.sample(range(len(data)), 2))
    match rng.choice(["flip", "burst", "cut", "zeros", "splice", "insert", "drop", "grow"]):
        case "flip":
            data[at] ^= 1 << rng.randrange(8)
        case "burst":
            data[at:to] = rng.randbytes(to - at)
        case "cut":
            del data[at:]
        case "zeros":
            data[at:] = bytes(len(data) - at)
        case "splice":
            data[:at] = other[:at]
        case "insert":
            data[at:at] = rng.randbytes(1 + to % 64)
        case "drop":
            del data[at:to]
        case "grow":
            data += rng.randbytes(1 + at % 64)
    return bytes(data)


def with_place(trial: Callable[[Place], None]) -> None:
    before = dict(os.environ)
    place = Place()
    try:
        trial(place)
    finally:
        place.close()
        os.environ.clear()
        os.environ.update(before)


def mutate(seed: int, place: Place) -> None:
    whole = place.file.read_bytes()
    damaged = mutated(random.Random(seed), whole, (place.folder / OTHER).read_bytes())
    place.file.write_bytes(damaged)
    assert damaged == whole or cache.load(NAME) is None, "a damaged file was loaded"
    cache.store(NAME, place.content)
    assert cache.load(NAME) == place.content, "a damaged file was not replaced"


def rights(path: str, mode: int, place: Place) -> None:
    (place.base / path).chmod(mode)
    closed = not mode & 0o022
    assert (cache.load(NAME) is not None) == closed, f"mode {mode:o} of {path}"


def owner(path: str, place: Place) -> None:
    os.chown(place.base / path, processes.STRANGER, processes.STRANGER, follow_symlinks=False)
    assert cache.load(NAME) is None, f"{path} of another user was used"


def linked_by_another(place: Place) -> None:
    place.folder.symlink_to(place.folder.rename(place.base / "real"))
    owner("cache", place)


def replaced(how: str, place: Place) -> None:
    """Something else stands where the file is looked for."""
    real = place.file.rename(place.folder / "real")
    match how:
        case "link":
            place.file.symlink_to(real)
        case "pipe":
            os.mkfifo(place.file)
        case "folder":
            place.file.mkdir()
        case "device":
            place.file.symlink_to(os.devnull)
    assert cache.load(NAME) is None
    cache.store(NAME, place.content)
    assert real.read_bytes().endswith(place.content), "what a link led to was written"


COMPILE = """
    import os, resource, sys
    sys.path.insert(0, os.environ["KERNELS"])
    {before}
    from seven import seven
    from steadynorm.kernels.cpu import runtime as cpu_runtime
    from steadynorm.kernels.cpu.arguments import Arguments
    kernel = cpu_runtime.compile_kernel(seven, "seven")
    arguments = Arguments()
    kernel(arguments, 1)
    assert arguments.rows == 7
"""
LIMITED = "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
ENVIRONMENTS = {
    "no home": ("", {"HOME": ""}),
    "home is a device": ("", {"HOME": os.devnull}),
    "home is relative": ("", {"HOME": "somewhere"}),
    "not Unicode": ("", {"HOME": os.fsdecode(b"/tmp/\xff\xfe")}),
    "a name of 5,000 characters": ("", {"HOME": "/" + "x/" * 2500}),
    "a full disk": (LIMITED, {}),
}


def environment(name: str, stranger: bool, place: Place) -> None:
    (place.base / "seven.py").write_text("def seven(arguments):\n    arguments[0] = 7\n")
    before, variables = ENVIRONMENTS[name]
    without = (cache.VARIABLE, "XDG_CACHE_HOME", *(("HOME",) if name == "no home" else ()))
    given = {k: v for k, v in variables.items() if k not in without}
    code = COMPILE.format(before=before)
    processes.run(code, stranger=stranger, without=without, KERNELS=str(place.base), **given)


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    trials: dict[str, Callable[[Place], None]] = {}
    for number in range(5000 if long else 500):
        trials[f"mutation {number}"] = partial(mutate, rng.randrange(1 << 32))
    for mode in range(0o600, 0o1000):
        trials[f"file {mode:o}"] = partial(rights, f"cache/{NAME}", mode)
        if mode >= 0o700:
            trials[f"folder {mode:o}"] = partial(rights, "cache", mode)
    for how in ("link", "pipe", "folder", "device"):
        trials[f"{how} in place of the file"] = partial(replaced, how)
    if os.geteuid() == 0:
        for path in ("cache", f"cache/{NAME}"):
            trials[f"{path} of another user"] = partial(owner, path)
        trials["a link of another user"] = linked_by_another
    strangers = (False, True) if processes.can_become() else (False,)
    environments = [(name, stranger) for stranger in strangers for name in ENVIRONMENTS]
    if not long:
        environments = [("no home", strangers[-1]), ("a full disk", False)]
    for name, stranger in environments:
        who = "a user without an account" if stranger else "this user"
        trials[f"{name}, {who}"] = partial(environment, name, stranger)
    for title, trial in trials.items():
        yield title, partial(with_place, trial)
