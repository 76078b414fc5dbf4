"""Compile the CPU kernels on first use, keep them on disk, and run them on PyTorch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import torch
from numba import cfunc, types
from numba.core import config

from .cpu_loops import COUNTER, SIZE

Arguments = ctypes.c_int64 * SIZE


class _Process:
    """What a fork changes."""

    forked = False
    compiling = threading.RLock()


class Kernel:
    """A compiled kernel: call it with its block of arguments and a number of threads.

    `calls` counts how often it ran, `cached` tells whether it came from the disk.
    """

    def __init__(self, function: Any) -> None:
        self.address: int = function.address
        self.cached: bool = function.cache_hits > 0
        self.calls = 0
        self._function = function  # keeps the machine code alive
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)

    def __call__(self, arguments: Any, threads: int) -> None:
        """Run until the counter in the arguments has gone through every chunk."""
        self.calls += 1
        arguments[COUNTER] = 0
        if threads == 1 or _Process.forked:
            self._enter(arguments)
        else:
            team()(self, arguments, threads)


def cache_folder() -> Path:
    """Where compiled kernels are kept: the user's cache folder, by version and kernel sources."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin" and not os.environ.get("XDG_CACHE_HOME"):
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "steadynorm" / f"{_version()}-{_fingerprint()}"


def _version() -> str:
    try:
        return metadata.version("steadynorm")
    except metadata.PackageNotFoundError:
        return "source"


@cache
def _fingerprint() -> str:
    """Changes with any kernel source: Numba looks only at the file of the outermost function."""
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("cpu*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def compile_kernel(function: Callable[[Any], None]) -> Kernel:
    """Compile, or load from the cache folder; a folder that cannot be used does no harm."""
    signature = types.void(types.CPointer(types.int64))
    options = {"error_model": "numpy", "fastmath": {"contract"}, "nopython": True}
    with _Process.compiling:
        before = config.CACHE_DIR
        try:
            config.CACHE_DIR = str(cache_folder())
            return Kernel(cfunc(signature, cache=True, **options)(function))
        except (OSError, RuntimeError, EOFError, ValueError):
            # No home, a read-only or full disk, a damaged file: compile for this process alone.
            return Kernel(cfunc(signature, **options)(function))
        finally:
            config.CACHE_DIR = before


@cache
def team() -> Callable[[Kernel, Any, int], None]:
    """How to run a kernel on several threads at once.

    Through the OpenMP library that PyTorch itself runs on, if it is GNU's: its threads are awake
    after PyTorch's own operators and do not compete with ours, and a start costs about 2 µs. A pool
    of Python threads otherwise (about 30 µs).
    """
    try:
        start = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return _pool()
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return lambda kernel, arguments, threads: start(kernel.address, arguments, threads, 0)


def _pool() -> Callable[[Kernel, Any, int], None]:
    workers = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "steadynorm")

    def run(kernel: Kernel, arguments: Any, threads: int) -> None:
        others = [workers.submit(kernel._enter, arguments) for _ in range(threads - 1)]
        kernel._enter(arguments)
        for other in others:
            # One that has not begun has nothing left to do: the counter is through.
            if not other.cancel():
                other.result()

    return run


def _after_fork() -> None:
    """A forked child has none of its parent's threads: run on the one that is left."""
    _Process.forked = True
    _Process.compiling = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
