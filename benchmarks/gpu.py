"""On a machine with a GPU: test the layer there, look for wrong accesses, measure, write a page.

    python benchmarks/gpu.py [--out gpu] [--quick]        (make gpu)

1. tests/kernels/test_device.py, by PyTorch's operator and by the Triton kernels;
2. a part of it under compute-sanitizer (memcheck, then racecheck), if that is found;
3. benchmarks/gpu_kernels.py: the device time of each kernel;
4. `steadynorm bench --device cuda` against eager PyTorch, torch.compile and a copy: both layouts,
   float32, bfloat16 and float16, whole networks; by PyTorch's operator, then by the Triton kernels.

Writes OUT/<card>/page.md, with the card's name, what passed, and the tables, beside the files of
the bench. Ends with 1 if a test or the sanitizer found something, with 2 where there is no device.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

TESTS = "tests/kernels/test_device.py"
ROOT = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    """What ran, and how it ended."""

    title: str
    passed: bool
    told: str


def run(title: str, command: list[str], *, keep: int = 1, **environment: str) -> Step:
    """Run a command, showing what it prints; `told` is its last lines."""
    print(f"== {title}", flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    )  # fmt: skip
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    last = [line for line in lines if line][-keep:]
    return Step(title, process.wait() == 0, "\n".join(last))


def tests() -> list[Step]:
    """The tests on the device, and a part of them watched by the sanitizer."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    steps = [run("tests on the device", pytest)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        return [*steps, Step("compute-sanitizer", True, "not found: not run")]
    part = [*pytest, "-k", "test_three_steps and gpu and nchw and float32 and 16"]
    for tool in ("memcheck", "racecheck"):
        watched = [sanitizer, "--tool", tool, "--error-exitcode", "1", *part]
        steps.append(run(f"compute-sanitizer, {tool}", watched))
    return steps


def bench(folder: Path, *, quick: bool) -> list[Step]:
    """Each kernel's time; the bench by PyTorch's operator and by ours, each in its own folder."""
    alone = [sys.executable, "benchmarks/gpu_kernels.py", "--json", str(folder / "kernels.json")]
    steps = [run("device time of each kernel", alone, keep=1_000_000)]
    for kernels in ("operator", "gpu"):
        wanted = {
            "--device": "cuda", "--dtypes": "float32,bfloat16,float16",
            "--cases": "bn,bn+relu,bn+add+relu",
            "--contenders": "ours,eager,compile,graph,eager_graph",
            "--suites": "resnet50" if quick else "resnet50,networks",
            "--rounds": "5" if quick else "15", "--out": str(folder / kernels),
            "--kernels": kernels,
        }  # fmt: skip
        command = [sys.executable, "-m", "steadynorm", "bench"]
        command += [word for pair in wanted.items() for word in pair]
        steps.append(run(f"bench, {kernels}", command, keep=1_000_000, COLUMNS="160"))
    return steps


def page(card: str, steps: list[Step], measured: list[Step]) -> str:
    """What passed, then the tables."""
    lines = [f"# Measured on {card}", "", f"{date.today()}, by `make gpu`.", ""]
    lines += ["| step | passed | its last line |", "|---|---|---|"]
    lines += [f"| {s.title} | {'yes' if s.passed else '**no**'} | {s.told} |" for s in steps]
    for step in measured:
        lines += ["", f"## {step.title}", "", "```", step.told, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no whole networks")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: PyTorch sees no CUDA or ROCm device.", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    folder = options.out.resolve() / re.sub(r"[^A-Za-z0-9]+", "-", card).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    steps = tests()
    measured = bench(folder, quick=options.quick)
    (folder / "page.md").write_text(page(card, steps, measured), encoding="utf-8")
    print(f"wrote {folder / 'page.md'}")
    return 0 if all(step.passed for step in steps + measured) else 1


if __name__ == "__main__":
    sys.exit(main())
