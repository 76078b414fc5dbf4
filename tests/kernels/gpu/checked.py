"""Triton's interpreter, made to notice what a device would punish. Needs TRITON_INTERPRET=1.

Inside `checked(...)`:

- every address read or written lies in a tensor given to the kernel: the interpreter itself reads
  and writes anywhere;
- float32 becomes bfloat16 by rounding to nearest even, as on devices: the interpreter truncates.
  Arithmetic or comparison on bfloat16 is a fault: it would work on bit patterns;
- a fused multiply-add rounds once; an int32 product or sum that leaves int32 is a fault;
- two programs that write the same byte without an atomic between them, or one that reads what
  another wrote in the same launch without having acquired it, are a race;
- programs run in a random order;
- bytes read and written are counted for each tensor, and launches by name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter as it


class Fault(Exception):
    pass


class Memory:
    """The bytes of one tensor: by whom and when each was last written in this launch."""

    def __init__(self, tensor: torch.Tensor, label: str) -> None:
        far = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        size = (far + 1) * tensor.element_size() if tensor.numel() else 0
        self.begin, self.end = tensor.data_ptr(), tensor.data_ptr() + size
        self.label = label
        self.writer = np.full(size, -1, np.int64)
        self.time = np.zeros(size, np.int64)


class Watch:
    """What is known of the launches so far. `traffic`: tensor -> [bytes loaded, bytes stored]."""

    def __init__(self, names: dict[str, torch.Tensor | None], seed: int) -> None:
        self.traffic: dict[str, list[int]] = {}
        self.launches: list[str] = []
        self.random = random.Random(seed)
        given = {name: t for name, t in names.items() if t is not None}
        self.names = {t.untyped_storage().data_ptr(): name for name, t in given.items()}
        self.memories: list[Memory] = []
        self.order: list[tuple[int, int, int]] = []
        self.clock, self.program = 0, -1
        self.acquired: dict[int, int] = {}  # program -> up to when it knows the others' stores
        self.released: dict[int, int] = {}  # address of an atomic -> when it was last released

    def enter(self, kernel: str, tensors: dict[str, torch.Tensor], grid: Any) -> None:
        self.launches.append(kernel)
        self.memories = []
        for name, t in tensors.items():
            label = self.names.get(t.untyped_storage().data_ptr(), name)
            self.memories.append(Memory(t, label))
            self.traffic.setdefault(label, [0, 0])
        nx, ny, nz = (*grid, 1, 1)[:3]
        self.order = [(a, b, c) for a in range(nx) for b in range(ny) for c in range(nz)]
        self.random.shuffle(self.order)
        self.clock, self.acquired, self.released = 0, {}, {}

    def begin(self, index: int) -> tuple[int, int, int]:
        self.program = index
        self.clock += 1
        return self.order[index]

    def touch(self, pointers: Any, mask: Any, size: int, *, store: bool) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask)
        where = pointers[mask.astype(bool)].astype(np.int64)
        left = np.ones(where.shape, bool)
        for memory in self.memories:
            here = (where >= memory.begin) & (where + size <= memory.end) & left
            if here.any():
                left &= ~here
                self._touch(memory, where[here] - memory.begin, size, store)
        if left.any():
            raise Fault(f"{'store' if store else 'load'} outside of every tensor: {left.sum()}")

    def _touch(self, memory: Memory, at: np.ndarray, size: int, store: bool) -> None:
        unique = np.unique(at)
        self.traffic[memory.label][store] += unique.size * size
        bytes_ = (unique[:, None] + np.arange(size)).ravel()
        writer, time = memory.writer[bytes_], memory.time[bytes_]
        unseen = time > self.acquired.get(self.program, -1)
        if ((writer >= 0) & (writer != self.program) & unseen).any():
            what = "two programs write" if store else "one program reads what another wrote,"
            raise Fault(f"race: {what} the same place of {memory.label}")
        if store:
            if at.size != unique.size:
                raise Fault(f"one store writes twice to one place of {memory.label}")
            memory.writer[bytes_], memory.time[bytes_] = self.program, self.clock

    def atomic(self, pointers: Any, mask: Any, sem: str) -> None:
        pointers, mask = np.broadcast_arrays(np.atleast_1d(pointers), np.atleast_1d(mask))
        for address in map(int, pointers[mask.astype(bool)]):
            if not any(m.begin <= address < m.end for m in self.memories):
                raise Fault("atomic outside of every tensor")
            if "ACQ" in sem:
                known = self.acquired.get(self.program, -1)
                self.acquired[self.program] = max(known, self.released.get(address, -1))
            if "REL" in sem and "RELAXED" not in sem:
                self.released[address] = self.clock


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def narrow(handle: Any) -> None:
    if handle.dtype.scalar == tl.bfloat16:
        raise Fault("arithmetic or comparison on bfloat16: widen first")


def width(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


class Patches:
    """The interpreter's methods that are replaced, each calling the one it stands for."""

    def __init__(self, watch: Watch, kept: dict[str, Any]) -> None:
        self.watch, self.kept = watch, kept

    def create_masked_load(self, builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        self.watch.touch(pointers.data, mask.data, width(pointers), store=False)
        return self.kept["create_masked_load"](builder, pointers, mask, *rest)

    def create_masked_store(self, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any):
        self.watch.touch(pointers.data, mask.data, width(pointers), store=True)
        return self.kept["create_masked_store"](builder, pointers, value, mask, *rest)

    def create_atomic_rmw(
        self, builder: Any, op: Any, pointer: Any, value: Any, mask: Any, sem: Any, scope: Any
    ):
        self.watch.clock += 1
        self.watch.atomic(pointer.data, mask.data, str(sem).upper())
        found = self.kept["create_atomic_rmw"](builder, op, pointer, value, mask, sem, scope)
        self.watch.clock += 1
        return found

    def cast_impl(self, builder: Any, source: Any, target: Any) -> Any:
        a, b = source.dtype.scalar, target.scalar
        if b == tl.bfloat16 and a != tl.bfloat16:
            return it.TensorHandle(to_bfloat16(source.data.astype(np.float32)), b)
        if a == tl.bfloat16 and b != tl.bfloat16:
            wide = (source.data.astype(np.uint32) << 16).view(np.float32)
            return it.TensorHandle(wide.astype(it._get_np_dtype(b)), b)
        return self.kept["cast_impl"](builder, source, target)

    def binary_op(self, builder: Any, a: Any, b: Any, op: Any) -> Any:
        narrow(a)
        if op in (np.add, np.multiply, np.subtract) and a.dtype.scalar == tl.int32:
            wide = op(a.data.astype(np.int64), b.data.astype(np.int64))
            if wide.size and (wide.max() >= 2**31 or wide.min() < -(2**31)):
                raise Fault("an int32 product or sum overflows")
        return self.kept["binary_op"](builder, a, b, op)

    def unary_op(self, builder: Any, x: Any, op: Any) -> Any:
        narrow(x)
        return self.kept["unary_op"](builder, x, op)

    def create_fma(self, builder: Any, x: Any, y: Any, z: Any) -> Any:
        narrow(z)
        if z.data.dtype != np.float32:
            return self.kept["create_fma"](builder, x, y, z)
        # float64 holds the product exactly and rounds the sum at 2^-53: twice, once in 1e8 or so.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return it.TensorHandle(wide.astype(np.float32), z.dtype.scalar)

    def set_grid_idx(self, builder: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        self.kept["set_grid_idx"](builder, *self.watch.begin((x * ny + y) * nz + z))


@contextmanager
def checked(seed: int = 0, **names: torch.Tensor | None) -> Iterator[Watch]:
    """`names`: tensors to call by these names in `traffic`; others go by the kernels' own."""
    watch, builder = Watch(names, seed), it.InterpreterBuilder
    replaced = [name for name in vars(Patches) if not name.startswith("_")]
    kept = {name: getattr(builder, name) for name in replaced}
    call, reduction = it.GridExecutor.__call__, it.ReduceOps.apply_impl
    patch_lang, patched = it._patch_lang, {}
    patches = Patches(watch, kept)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
        watch.enter(self.fn.__name__, tensors, self.grid)
        patched.clear()
        with _disable_current_modes():  # the interpreter's own copies are no launches
            return call(self, *args, **kwargs)

    def once_a_launch(function: Any) -> Any:
        """Patching the language anew in every function called takes a third of the time."""
        module = id(function.__globals__)
        if module not in patched:
            patched[module] = patch_lang(function)
        return patched[module]

    def reduce(self: Any, inputs: Any) -> Any:
        for x in inputs if isinstance(inputs, tuple) else (inputs,):
            narrow(x.handle)
        return reduction(self, inputs)

    for name in replaced:
        method = getattr(patches, name)
        setattr(builder, name, lambda self, *args, method=method: method(self, *args))
    it.GridExecutor.__call__, it.ReduceOps.apply_impl = launch, reduce
    it._patch_lang = once_a_launch
    try:
        yield watch
    finally:
        for name, old in kept.items():
            setattr(builder, name, old)
        it.GridExecutor.__call__, it.ReduceOps.apply_impl = call, reduction
        it._patch_lang = patch_lang
