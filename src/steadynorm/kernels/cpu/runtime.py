"""Compile the CPU kernels on first use, keep them on disk, and run them on PyTorch's threads."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import llvmlite
import numba
import torch
from llvmlite import binding as llvm
from numba import cfunc, types
from numba.core import config
from numba.core.compiler_lock import global_compiler_lock

from steadynorm.kernels import activations
from steadynorm.kernels.cpu import cache as files


class _Process:
    """What a fork changes."""

    forked = False


class Kernel:
    """A compiled kernel: call it with its block of arguments and a number of threads.

    `cached` tells whether it came from the disk.
    """

    def __init__(self, code: bytes, *, cached: bool) -> None:
        entry, _, machine_code = code.partition(b"\0")
        # One engine for each kernel: Numba numbers closures from 0 in every process, so kernels
        # that two processes compiled may define the same symbols.
        llvm.initialize_native_target()  # Numba does it when it first compiles; repeating is safe
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
        self._engine.finalize_object()
        self.address: int = self._engine.get_function_address(entry.decode())
        self.cached = cached
        self._enter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)

    def __call__(self, arguments: Any, threads: int) -> None:
        """Run until every pass in the arguments has gone through every chunk."""
        address = ctypes.addressof(arguments)
        if threads == 1 or _Process.forked:
            self._enter(address)
        else:
            arguments.sched_yield = _yield_address()
            team()(self, address, threads)


def compile_kernel(function: Callable[[Any], None], name: str) -> Kernel:
    """Load the kernel from the cache, or compile it and store it there."""
    title = f"{name}-{_fingerprint()}"
    with global_compiler_lock:
        code = files.load(title)
        if code is not None:
            return Kernel(code, cached=True)
        code = _compiled(function)
        files.store(title, code)
        return Kernel(code, cached=False)


def _compiled(function: Callable[[Any], None]) -> bytes:
    """The symbol to enter by, a null byte, and the object file.

    `_nrt=False`: without Numba's run-time library, which a process that only loads would have to
    start (0.06 s) before the symbols resolve.
    """
    level = config.OPT
    try:
        # -O3 compiles a sixth longer, and its kernels are no faster.
        config.OPT = type(level)(min(level, 2))
        compiled = cfunc(
            types.void(types.CPointer(types.int64)),
            error_model="numpy", fastmath={"contract"}, nopython=True, _nrt=False,
        )(function)  # fmt: skip
    finally:
        config.OPT = level
    entry: str = compiled.native_name
    machine_code: bytes = compiled._library._get_compiled_object()
    return entry.encode() + b"\0" + machine_code


@cache
def _fingerprint() -> str:
    """Changes with all that the machine code depends on."""
    try:
        version = metadata.version("steadynorm")
    except metadata.PackageNotFoundError:
        version = "source"
    made_with = (
        *(version, sys.implementation.cache_tag, numba.__version__, llvmlite.__version__),
        *(config.OPT, config.CPU_NAME, config.CPU_FEATURES, config.ENABLE_AVX, config.USING_SVML),
        *(config.LOOP_VECTORIZE, config.SLP_VECTORIZE, config.BOUNDSCHECK),
        *(config.DEBUGINFO_DEFAULT,),
    )
    machine = (
        llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    )  # fmt: skip
    digest = hashlib.sha256(repr((made_with, machine)).encode())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(activations.__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


@cache
def _yield_address() -> int:
    """The address of the system's sched_yield; 0 where there is none."""
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
    """How to run a kernel on a pool of Python threads, which release the interpreter's lock."""
    workers = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), "steadynorm")

    def run(kernel: Kernel, arguments: Any, threads: int) -> None:
        others = [workers.submit(kernel._enter, arguments) for _ in range(threads - 1)]
        kernel._enter(arguments)
        for other in others:
            # One that has not begun has nothing to do: all chunks are taken.
            if not other.cancel():
                other.result()

    return run


def _after_fork() -> None:
    """A forked child has none of its parent's threads: run on the one that is left."""
    _Process.forked = True
    global_compiler_lock.release()


if hasattr(os, "register_at_fork"):
    # A fork waits until no thread compiles: the child would inherit the compiler half way through
    # its work, and the lock without the thread that could release it.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=_after_fork,
    )
