"""The structure of the kernels' arguments: a kernel reads what a caller writes, name by name."""

import ctypes
import struct

import pytest
from numba import cfunc, types

from steadynorm.kernels.cpu.arguments import FORWARD, PASSES, Arguments, at, writer

LISTS = ("passes", "taken", "done")


def reader():
    """Machine code that copies every field behind the structure, in the order of `at`."""
    size = ctypes.sizeof(Arguments) // 8
    lines = [f"    args[{size + k}] = args[at.{name}]" for k, name in enumerate(at._fields)]
    scope = {"at": at}
    exec("def read(args):\n" + "\n".join(lines), scope)
    return cfunc(types.void(types.CPointer(types.int64)))(scope["read"])


def misread(structure):
    """Names under which a kernel reads something else than a caller of `structure` wrote."""
    filled, wanted = structure(), []
    for k, name in enumerate(at._fields):
        number = 100.5 + k if dict(structure._fields_)[name] is ctypes.c_double else 100 + k
        setattr(filled, name, (number,) * PASSES if name in LISTS else number)
        wanted.append(struct.unpack("q", struct.pack("d", number))[0] if number % 1 else number)
    size = ctypes.sizeof(Arguments) // 8
    memory = (ctypes.c_int64 * (2 * size + len(at)))()
    ctypes.memmove(memory, ctypes.byref(filled), ctypes.sizeof(filled))
    reader().ctypes(ctypes.cast(memory, ctypes.POINTER(ctypes.c_int64)))
    pairs = zip(at._fields, memory[size : size + len(at)], wanted, strict=True)
    return [name for name, found, right in pairs if found != right]


def test_a_kernel_reads_under_a_name_what_the_caller_wrote_under_it():
    assert misread(Arguments) == []


def test_a_field_that_only_the_caller_knows_is_noticed():
    fields = list(Arguments._fields_)
    where = [name for name, _ in fields].index("scale")
    fields.insert(where, ("new", ctypes.c_int64))
    longer = type("Longer", (ctypes.Structure,), {"_fields_": fields})
    wrong = misread(longer)
    assert wrong[0] == "scale"
    assert "center" not in wrong


def test_adjacent_fields_are_filled_in_at_once_under_their_names():
    fill, offset = writer("eps", "momentum", "share", *FORWARD)
    filled = Arguments(count=2.0, grad=3)
    fill(filled, offset, 0.5, 0.25, 0.125, *range(1000, 1000 + len(FORWARD)))
    assert [getattr(filled, name) for name in FORWARD] == list(range(1000, 1000 + len(FORWARD)))
    assert (filled.count, filled.eps, filled.momentum, filled.share) == (2.0, 0.5, 0.25, 0.125)
    assert filled.grad == 3
    with pytest.raises(ValueError, match="must be adjacent"):
        writer("momentum", "eps")
