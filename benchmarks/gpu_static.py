"""The GPU kernels compiled for devices that are not here, and a table of what their code tells.

    python -m benchmarks.gpu_static [--short] [--targets sm_90,gfx942] [--write]
    python -m benchmarks.gpu_static --breaks --targets sm_90    with another Triton than the pinned

Needs Triton (`make test-triton` makes an environment with it), and TRITON_INTERPRET unset. What is
compiled is what the host's own code would launch, recorded on tensors without values. Compiled
kernels are cached by Triton. `--write` puts a summary, the table of one target and a prediction
into docs/gpu.md. No figure is a measurement: nothing runs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from benchmarks.machine_code import CHIPS, TARGETS, Launch, Report, processes, read

from steadynorm.evidence.bench.workloads import RESNET50
from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu import prepared, replay
from steadynorm.kernels.spec import Call, Memory
from steadynorm.statistics import Batch, Ghost, Policy, Renorm, Running, Steady

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
WIDE, ODD, SMALL = (32, 256, 56, 56), (64, 2048, 9, 9), (4, 2048, 7, 7)
"""Planes of a multiple of a vector, odd ones, and channels that one program holds."""
X_SIZED = ("x", "residual", "y", "grad", "extra", "dx", "dresidual")
MULTIPROCESSORS = 132


class Training(Call):
    """A training step that no layer made: the policy alone decides."""

    def by_policy_alone(self) -> bool:
        return True


class Config(NamedTuple):
    """One kind of call."""

    dtype: str
    layout: str
    shape: tuple[int, ...] = WIDE
    policy: Policy | None = Batch()
    activation: str | None = None
    residual: bool = False
    masked: bool = False

    def __str__(self) -> str:
        policy = "inference" if self.policy is None else type(self.policy).__name__
        if getattr(self.policy, "window", None):
            policy += " two-way"
        parts = [policy, *(["add"] if self.residual else []), self.activation or ""]
        what = " + ".join(part for part in parts if part) + (", mask" if self.masked else "")
        size = {ODD: ", odd planes", SMALL: ", in registers"}.get(self.shape, "")
        return f"{self.dtype} {self.layout}: {what}{size}"


def configurations(short: bool) -> Iterator[Config]:
    """Every kind of kernel in every type and layout; activations in two of them."""
    both = list(itertools.product(DTYPES, LAYOUTS))
    for dtype, layout in both:
        for shape in (WIDE, SMALL) if short else (WIDE, ODD, SMALL):
            for activation, residual in ((None, False), ("relu", False), ("relu", True)):
                yield Config(dtype, layout, shape, Batch(), activation, residual)
        for policy in (Steady(window=None), Steady()):
            yield Config(dtype, layout, policy=policy)
        if not short:
            for policy in (Running(), Renorm(), Ghost(8)):
                yield Config(dtype, layout, policy=policy)
            yield Config(dtype, layout, masked=True)
            yield Config(dtype, layout, policy=None, activation="relu", residual=True)
    if short:
        return
    for (dtype, layout), name, residual in itertools.product(
        (("fp32", "first"), ("bf16", "last")), ACTIVATIONS, (False, True)
    ):
        yield Config(dtype, layout, activation=name, residual=residual)


def record(config: Config) -> list[Launch]:
    """What the host launches for a call and its backward."""
    launched: list[Launch] = []

    def launch(kernel: Any, plan: Any, x: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(Launch(kernel, arguments, constants))

    n, c, *sizes = config.shape
    x = torch.empty(config.shape, dtype=DTYPES[config.dtype], device="meta")
    x = x.to(memory_format=LAYOUTS[config.layout])
    channels = [torch.empty(c, device="meta") for _ in range(4)]
    policy = config.policy
    call = Training(
        x, channels[0], channels[1], torch.empty_like(x) if config.residual else None,
        torch.empty((n, *sizes), dtype=torch.bool, device="meta") if config.masked else None,
        channels[2], channels[3], torch.empty((), dtype=torch.int64, device="meta"), policy,
        config.activation, 0.1, groups=policy.lengths(n) if isinstance(policy, Ghost) else None,
        memory=Memory(torch.empty(2, c, device="meta")) if getattr(policy, "window", 0) else None,
    )  # fmt: skip
    call.gradient = True
    kept = replay.launch, plans.multiprocessors
    replay.launch = launch
    plans.multiprocessors = lambda device: MULTIPROCESSORS
    try:
        call.plan = kind = prepared.Kind(call)
        y, (tensors, left) = kind.forward(call)
        kind.backward(tensors, left, torch.empty_like(y), (True, True, True, config.residual))
    finally:
        replay.launch, plans.multiprocessors = kept
    return launched


class Row(NamedTuple):
    """One kernel of one kind of call, for one target."""

    what: str
    report: Report
    vector: int  # bits of the widest access that the shape allows

    def complaints(self) -> list[str]:
        """Bars that it misses; a kernel without a loop has fixed work, and only the first."""
        r = self.report
        found = [f"spills {r.spills}"] if r.spills else []
        # Sign bits and masks are bytes.
        narrow = {b for b in (*r.loads, *r.stores) if 8 < b < self.vector}
        if narrow and r.loops and r.target in CHIPS:
            found.append(f"accesses of {sorted(narrow)} bits of {self.vector}")
        if r.hot_barriers and r.loops:
            found.append(f"{r.hot_barriers} barriers in the hot loop")
        if r.issue_share >= 1 and r.loops:
            found.append(f"issue {r.issue_share:.2f} of memory time")
        return found


def compiled(job: tuple[Config, int], target: str) -> Row:
    """One job of a process: the launch of that number in the configuration."""
    config, number = job
    launch = record(config)[number]
    constants = launch.constants
    vector = 8 * constants["VEC"] * torch.empty((), dtype=DTYPES[config.dtype]).element_size()
    return Row(str(config), read(launch, target, X_SIZED), vector)


def distinct(short: bool) -> list[tuple[Config, int]]:
    """Each kernel that differs from those before it."""
    seen = {}
    for config in configurations(short):
        for number, launch in enumerate(record(config)):
            seen.setdefault(launch.key, (config, number))
    return list(seen.values())


def compile_all(targets: list[str], *, short: bool = False) -> list[Row]:
    """All kernels for all targets, a process a core."""
    jobs = distinct(short)
    with ProcessPoolExecutor(processes()) as pool:
        found = [pool.map(partial(compiled, target=t), jobs, chunksize=4) for t in targets]
        return [row for rows in found for row in rows]


def breaks(targets: list[str]) -> Iterator[tuple[str, str]]:
    """Every kernel of BN + add + ReLU, in a process of its own, and how it ended.

    Some releases of Triton crash their process on kernels that others compile.
    """
    for dtype, layout, shape, target in itertools.product(
        ("fp32", "bf16"), LAYOUTS, (WIDE, SMALL), targets
    ):
        config = Config(dtype, layout, shape, activation="relu", residual=True)
        for number, launch in enumerate(record(config)):
            with ProcessPoolExecutor(1) as pool:
                try:
                    pool.submit(compiled, (config, number), target).result()
                    told = "compiled"
                except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
                    told = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            yield f"{config} {launch.name} {target}", told


def line(row: Row) -> str:
    """One row of the table."""
    r = row.report
    widths = " ".join(f"{b}:{n}" for b, n in sorted((r.loads + r.stores).items()))
    cells = (
        row.what, r.kernel, r.registers, r.spills, f"{r.occupancy:.0%}", widths,
        f"{r.hot_barriers}/{r.barriers}", f"{r.in_flight / 1024:.0f}" if r.in_flight else "",
        f"{r.per_element:.1f}" if r.per_element else "",
        f"{r.issue_share:.2f}" if r.issue_share else "",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = (
    "| call | kernel | registers | spills | occupancy | accesses, bits:number | barriers, loop/all "
    "| KB in flight | instructions an element | issue/memory time |\n|" + "---|" * 10
)


def summary(rows: list[Row]) -> Iterator[str]:
    """One line a target."""
    heads = ("target", "kernels", "registers", "spills, most", "KB in flight, least",
             "issue/memory time, most", "miss a bar")  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield "|" + "---|" * len(heads)
    for target, group in itertools.groupby(rows, key=lambda row: row.report.target):
        mine = list(group)
        looped = [row.report for row in mine if row.report.loops]
        registers = [row.report.registers for row in mine]
        flight = min((r.in_flight for r in looped), default=0)
        issue = max((r.issue_share for r in looped), default=0.0)
        yield "| " + " | ".join((
            target, str(len(mine)), f"{min(registers)} to {max(registers)}",
            str(max(row.report.spills for row in mine)), f"{flight / 1024:.0f}" if flight else "",
            f"{issue:.2f}" if issue else "", str(sum(bool(row.complaints()) for row in mine)),
        )) + " |"  # fmt: skip


LAUNCH = 2.5e-6  # seconds of a launch, assumed
EAGER = {"forward": 8, "backward": 8}
"""Passes of torch.nn's layer, add and ReLU (benchmarks/launches.py)."""


def predicted(shape: tuple[int, ...], dtype: str, bandwidth: float) -> tuple[float, float]:
    """Seconds of BN + add + ReLU, forward and backward, ours and eager, by bytes and launches."""
    config = Config(dtype, "last", shape, activation="relu", residual=True)
    size = torch.empty(shape, dtype=DTYPES[dtype], device="meta")
    unit, bits = size.nbytes, size.numel() / 8
    once = len(launches := record(config)) == 2
    ours = (3 + 4) * unit + 2 * bits if once else (4 + 6) * unit + 3 * bits
    theirs = sum(EAGER.values()) * unit
    return ours / bandwidth + len(launches) * LAUNCH, theirs / bandwidth + 8 * LAUNCH


def predictions(target: str) -> Iterator[str]:
    """BN + add + ReLU at the shapes of ResNet-50."""
    bandwidth = CHIPS[target][2] * 1e12
    yield "| input | bf16, µs: ours | eager | ratio | fp32, µs: ours | eager | ratio |"
    yield "|" + "---|" * 7
    for shape in RESNET50:
        cells = ["×".join(map(str, shape))]
        for dtype in ("bf16", "fp32"):
            ours, theirs = predicted(shape, dtype, bandwidth)
            cells += [f"{ours * 1e6:.0f}", f"{theirs * 1e6:.0f}", f"{theirs / ours:.2f}"]
        yield "| " + " | ".join(cells) + " |"


def put(name: str, body: str) -> None:
    """Write what stands between the marks of this name in docs/gpu.md."""
    before, rest = PAGE.read_text(encoding="utf-8").split(f"<!-- {name} -->")
    after = rest.partition("<!-- end -->")[2]
    text = f"{before}<!-- {name} -->\n\n{body}\n\n<!-- end -->{after}"
    PAGE.write_text(text, encoding="utf-8")


def write(rows: list[Row]) -> None:
    """The tables between the marks of the page."""
    shown = [r for r in rows if r.report.target == "sm_90" and r.what.startswith(("fp32", "bf16"))]
    shown = [r for r in shown if "Batch" in r.what and "odd" not in r.what and "mask" not in r.what]
    shown = [r for r in shown if r.what.split("+")[-1].strip().split(",")[0] in {"relu", "Batch"}]
    parts = {
        "summary": "\n".join(summary(rows)),
        "sm_90": f"{HEAD}\n" + "\n".join(map(line, shown)),
        "prediction": "\n".join(predictions("sm_90")),
    }
    for name, body in parts.items():
        put(name, body)


def main() -> int:
    """Compile, print, and say what misses a bar."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--short", action="store_true", help="fewer kinds of calls")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gpu.md")
    parser.add_argument("--breaks", action="store_true", help="only whether it compiles")
    chosen = parser.parse_args()
    if chosen.breaks:
        print(f"Triton {triton.__version__}")
        for what, told in breaks(chosen.targets.split(",")):
            print(f"{told:10s} {what}", flush=True)
        return 0
    start = time.perf_counter()
    rows = compile_all(chosen.targets.split(","), short=chosen.short)
    for target, group in itertools.groupby(rows, key=lambda row: row.report.target):
        print(f"\n{target}, Triton {triton.__version__}\n\n{HEAD}")
        print(*map(line, group), sep="\n")
    missed = [f"{r.what} {r.report.kernel} {r.report.target}: {', '.join(said)}"
              for r in rows if (said := r.complaints())]  # fmt: skip
    print(f"\n{len(rows)} kernels in {time.perf_counter() - start:.0f} s; {len(missed)} miss a bar")
    print(*missed, sep="\n")
    print("\nSeconds below are predicted from bytes and launches, not measured.\n")
    print(*summary(rows), "", *predictions("sm_90"), sep="\n")
    if chosen.write:
        write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
