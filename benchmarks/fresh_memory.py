"""What fresh memory costs: a copy of 103 MB into fresh memory against one into old.

`clone` is `x.clone()`, under settings of the allocator; `ours` copies into memory that the CPU
kernels would have taken for their result, for which they ask huge pages themselves.

python benchmarks/fresh_memory.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

SETTINGS = {
    "as it comes": {},
    "glibc keeps all it got": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(1 << 28),
    },
    "glibc asks for huge pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "PyTorch asks for huge pages": {"THP_MEM_ALLOC_ENABLE": "1"},
}


def one() -> None:
    import torch

    from steadynorm.evidence.timing import interleaved
    from steadynorm.kernels.cpu.results import large_like

    x = torch.randn(32, 64, 112, 112)
    y = torch.empty_like(x)

    ways = {"clone": x.clone, "ours": lambda: large_like(x).copy_(x), "copy": lambda: y.copy_(x)}
    found = interleaved(ways, 15)
    clone, ours, copy = (statistics.median(found[name]) for name in ways)
    print(f"clone {clone / copy:.2f}, ours {ours / copy:.2f} copies")


if __name__ == "__main__":
    if "--one" in sys.argv:
        one()
    else:
        for name, extra in SETTINGS.items():
            answer = subprocess.run(
                [sys.executable, __file__, "--one"],
                env={**os.environ, **extra},
                capture_output=True,
                text=True,
                check=True,
            )
            shown = " ".join(f"{key}={value}" for key, value in extra.items())
            print(f"{name:27} {answer.stdout.strip():32} {shown}")
