"""Compile Triton kernels for GPUs that are not here, and read what the machine code tells.

No device, driver or toolkit is needed: Triton's wheel carries ptxas, its disassembler and LLVM's
AMD backend. What is read: registers, spills, occupancy, the width of global accesses, barriers, and
in the hot loop bytes in flight and instructions; from those by arithmetic, never a measurement,
the time to issue the loop over the time to move its bytes.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of one multiprocessor: registers, threads, blocks, shared memory (CUDA programming guide).
LIMITS = {
    "sm_80": (65536, 2048, 32, 164 << 10),
    "sm_90": (65536, 2048, 32, 228 << 10),
    "sm_100": (65536, 2048, 32, 228 << 10),
}
# Multiprocessors, clock in GHz, bytes/s that a copy reaches, in TB: A100, H200, B200; assumed.
CHIPS = {"sm_80": (108, 1.41, 1.7), "sm_90": (132, 1.755, 4.3), "sm_100": (148, 1.85, 7.0)}
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "bool": "i1",
         "int32": "i32", "int64": "i64"}  # fmt: skip


class Launch:
    """One kernel with the arguments of one launch; equal if the same code would be compiled."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.name = kernel, kernel.fn.__name__
        options = ("num_warps", "enable_fp_fusion", "maxnreg")
        self.options = {k: constants[k] for k in options if k in constants}
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        given |= {k: v for k, v in constants.items() if k not in self.options}
        defaults = {p.name: p.default for p in kernel.params if p.has_default}
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.aligned: list[str] = []
        for p in kernel.params:
            self._specialize(p, (defaults | given)[p.name])
        self.elements = {k: v.element_size() for k, v in given.items() if isinstance(v, Tensor)}

    def _specialize(self, p: Any, value: Any) -> None:
        """As Triton does at a launch: 1 and None are constants, multiples of 16 are known to be."""
        if p.is_constexpr or value is None or (value.__class__ is int and value == 1):
            self.signature[p.name], self.constants[p.name] = "constexpr", value
            return
        if isinstance(value, Tensor):
            self.signature[p.name] = f"*{NAMES[str(value.dtype).removeprefix('torch.')]}"
            aligned = True
        else:
            self.signature[p.name] = "i32" if isinstance(value, int) else "fp32"
            aligned = isinstance(value, int) and value % 16 == 0
        if aligned and not p.do_not_specialize_on_alignment:
            self.aligned.append(p.name)

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides on the code."""
        parts = (self.signature, self.constants, self.options)
        return self.name, tuple(self.aligned), *(tuple(sorted(p.items(), key=str)) for p in parts)

    def compile(self, target: str) -> Any:
        """The compiled kernel."""
        names = list(self.signature)
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in self.aligned}
        source = ASTSource(
            fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=attributes
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return triton.compile(source, target=TARGETS[target], options=dict(self.options))


@dataclass
class Report:
    """What one compiled kernel's code tells."""

    kernel: str
    target: str
    warps: int
    registers: int = 0
    spills: int = 0  # bytes of stack or local memory (CUDA), spilled registers (AMD)
    shared: int = 0
    occupancy: float = 0.0
    loads: Counter[int] = field(default_factory=Counter)  # bits -> instructions, in the hot loop
    stores: Counter[int] = field(default_factory=Counter)
    in_flight: int = 0  # bytes that a full multiprocessor has requested before the first is used
    instructions: int = 0  # in the hot loop
    per_element: float = 0.0
    issue_share: float = 0.0
    barriers: int = 0
    hot_barriers: int = 0
    loops: bool = True  # else all figures of the hot loop are the whole kernel's


def read(launch: Launch, target: str, x_sized: tuple[str, ...]) -> Report:
    """Compile and read. `x_sized`: the arguments whose every element the hot loop moves once."""
    compiled = launch.compile(target)
    report = Report(launch.name, target, launch.options["num_warps"])
    report.loops = "normalize" not in launch.name
    report.shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        _read_cuda(report, compiled.asm["cubin"])
        present = [n for n in x_sized if n in launch.elements]
        written = {"y", "dx", "dresidual"}
        loaded = sum(launch.elements[n] for n in present if n not in written)
        _bound(report, loaded, sum(launch.elements[n] for n in present))
    else:
        _read_amd(report, compiled.asm["amdgcn"])
    return report


def _bound(report: Report, loaded: int, moved: int) -> None:
    wide = sum(bits // 8 * n for bits, n in report.loads.items() if bits >= 16)
    if not wide or not loaded:
        return
    report.per_element = report.instructions / (wide / loaded)
    multiprocessors, clock, bandwidth = CHIPS[report.target]
    issue = report.per_element / (multiprocessors * 128 * clock * 1e9)
    report.issue_share = issue / (moved / (bandwidth * 1e12))


# CUDA ---------------------------------------------------------------------------------------------

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
REGISTER = re.compile(r"\bR(\d+)\b")


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([BIN / name, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[:400]}")
    return done.stdout


def _opcode(text: str) -> str:
    words = text.split()
    return words[1] if words and words[0].startswith("@") and len(words) > 1 else (words or [""])[0]


def _width(opcode: str) -> int:
    for part in opcode.split(".")[1:]:
        if part in {"128", "64", "256"}:
            return int(part)
        if part in {"U16", "S16", "U8", "S8"}:
            return int(part[1:])
    return 32


def _lines(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions, and where labels stand among them."""
    lines: list[str] = []
    places: dict[str, int] = {}
    for text in sass.splitlines():
        if label := LABEL.match(text.strip()):
            places[label[1]] = len(lines)
        elif match := INSTRUCTION.search(text):
            lines.append(match[2])
    return lines, places


def _moved(lines: list[str]) -> int:
    """Bits that one thread moves from and to global memory."""
    opcodes = map(_opcode, lines)
    return sum(_width(opcode) for opcode in opcodes if opcode.startswith(("LDG", "STG")))


def _hot(lines: list[str], places: dict[str, int]) -> tuple[int, int]:
    """The innermost loop that moves most at a turn; without any, the whole kernel.

    The merge of partial results, of loads of 32 bits, is another.
    """
    loops = []
    for at, text in enumerate(lines):
        if target := re.search(r"\bBRA(?:\.\w+)*\s.*?`?\(?(\.L_x_\d+)", text):
            start = places.get(target[1], at)
            if start < at and _moved(lines[start:at]):
                loops.append((start, at + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max(inner, key=lambda loop: _moved(lines[slice(*loop)]), default=(0, len(lines)))


def _read_cuda(report: Report, cubin: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        sass = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    report.registers = int(found["REG"])
    lines, places = _lines(sass)
    local = sum(bool(re.search(r"\b(LDL|STL)\b", t)) for t in lines)
    report.spills = max(int(found["STACK"]), int(found["LOCAL"]), local)
    begin, end = _hot(lines, places) if report.loops else (0, len(lines))
    hot = lines[begin:end]
    for text in hot:
        opcode = _opcode(text)
        if opcode.startswith(("LDG", "STG")):
            table = report.loads if opcode.startswith("LDG") else report.stores
            table[_width(opcode)] += 1
    barriers = [at for at, text in enumerate(lines) if _opcode(text).startswith("BAR")]
    report.barriers = len(barriers)
    report.hot_barriers = sum(begin <= at < end for at in barriers)
    report.instructions = sum(not _opcode(t).startswith("NOP") for t in hot)
    registers, threads, blocks, shared = LIMITS[report.target]
    each = -(-report.registers * 32 // 256) * 256 * report.warps
    resident = min(
        registers // each, threads // (report.warps * 32), blocks, shared // (report.shared + 1024)
    )
    report.occupancy = resident * report.warps * 32 / threads
    report.in_flight = _in_flight(hot) * report.warps * 32 * resident


def _in_flight(lines: list[str]) -> int:
    """Most bytes of loads that one thread has outstanding, if each ends only where it is used."""
    most, serial = 0, 0
    waiting: dict[int, tuple[int, int]] = {}  # register -> (load, bytes)
    for text in lines * 2:  # twice around the loop: loads may be for the next turn
        opcode = _opcode(text)
        rest = text.split(opcode, 1)[1] if opcode else text
        operands = rest.split(",")
        loads = opcode.startswith("LDG")
        sources = ",".join(operands[1:]) if loads else rest
        used = {waiting[int(r)][0] for r in REGISTER.findall(sources) if int(r) in waiting}
        waiting = {r: v for r, v in waiting.items() if v[0] not in used}
        target = REGISTER.search(operands[0]) if loads else None
        if target:
            size = _width(opcode) // 8
            serial += 1
            waiting |= {int(target[1]) + k: (serial, size) for k in range(max(1, size // 4))}
            most = max(most, sum(dict(waiting.values()).values()))
    return most


def releases_partials(ptx: str) -> bool:
    """Whether stores of partials, a barrier, the release and acquire, another barrier, and loads
    that pass the L1 by stand in this order."""
    at = ptx.index("atom.global.gpu.acq_rel.add")
    before, after = ptx[:at], ptx[at:]
    barrier = before.rfind("bar.sync")
    again, reads = after.find("bar.sync"), after.find("ld.global.cg")
    return 0 < before.rfind("st.global") < barrier and 0 < again < reads


# AMD ----------------------------------------------------------------------------------------------

AMD_WIDTH = {"dwordx4": 128, "b128": 128, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32,
             "ushort": 16, "short": 16, "u16": 16, "b16": 16, "ubyte": 8, "byte": 8, "u8": 8,
             "b8": 8}  # fmt: skip


def _read_amd(report: Report, text: str) -> None:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    report.registers, report.spills = number("vgpr_count"), number("vgpr_spill_count")
    for kind, table in (("load", report.loads), ("store", report.stores)):
        for name in re.findall(rf"\b(?:global|buffer|flat)_{kind}_(\w+)", text):
            table[next((b for k, b in AMD_WIDTH.items() if name.startswith(k)), 32)] += 1
    report.barriers = len(re.findall(r"\bs_barrier\b", text))
    waves = min(8, 512 // max(8, -(-report.registers // 8) * 8))
    report.occupancy = waves / 8


def processes() -> int:
    """How many compilers run at once: one for each core."""
    return len(os.sched_getaffinity(0))
