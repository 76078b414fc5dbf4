"""Compile the CPU kernels on first use, keep them on disk, and run them on PyTorch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numba
import torch
from llvmlite.binding import get_host_cpu_features, get_host_cpu_name
from numba import cfunc, types
from numba.core import config

from steadynorm.kernels import activations


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
        """Run until every pass in the arguments has gone through every chunk."""
        self.calls += 1
        address = ctypes.addressof(arguments)
        if threads == 1 or _Process.forked:
            self._enter(address)
        else:
            arguments.sched_yield = _yield_address()
            team()(self, address, threads)


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
    """Changes with any kernel source, of which Numba would look at one, and with the processor."""
    made_with = (numba.__version__, config.OPT, config.CPU_NAME, config.CPU_FEATURES)
    processor = (get_host_cpu_name(), get_host_cpu_features().flatten())
    digest = hashlib.sha256(repr((made_with, processor)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(Path(activations.__file__).read_bytes())
    return digest.hexdigest()[:12]


def compile_kernel(function: Callable[[Any], None], name: str) -> Kernel:
    """Compile, or load from the cache folder; a folder that cannot be used does no harm.

    Every kernel has a folder of its own: Numba numbers the variants of one function as it finds the
    index, and two processes at once could each believe a number theirs.
    """
    signature = types.void(types.CPointer(types.int64))
    options = {"error_model": "numpy", "fastmath": {"contract"}, "nopython": True}
    with _Process.compiling:
        folder, before = cache_folder() / name, (config.CACHE_DIR, config.OPT)
        try:
            # The third level takes a sixth more time, and makes these kernels no faster.
            config.OPT = type(config.OPT)(min(config.OPT, 2))
            if _can_be_written(folder):
                config.CACHE_DIR = str(folder)
                try:
                    return Kernel(cfunc(signature, cache=True, **options)(function))
                except Exception:  # noqa: BLE001
                    # A damaged file may raise anything; an error of the compiler comes again below.
                    shutil.rmtree(folder, ignore_errors=True)
            return Kernel(cfunc(signature, **options)(function))
        finally:
            config.CACHE_DIR, config.OPT = before


def _can_be_written(folder: Path) -> bool:
    """Asked beforehand, since Numba would turn to folders of its own choice instead."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


@cache
def _yield_address() -> int:
    """Where the system's function is with which a waiting thread lets others run; 0 if unknown."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):  # Windows
        return 0


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
        return python_team()
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None
    return lambda kernel, arguments, threads: start(kernel.address, arguments, threads, 0)


def python_team() -> Callable[[Kernel, Any, int], None]:
    """How to run a kernel on a pool of Python threads, which leave the interpreter meanwhile."""
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
