"""What fresh memory costs: `x.clone()` against `y.copy_(x)`, 103 MB, under allocator settings.

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
}


def one() -> None:
    import torch

    from steadynorm.evidence.timing import interleaved

    x = torch.randn(32, 64, 112, 112)
    y = torch.empty_like(x)

    found = interleaved({"clone": x.clone, "copy": lambda: y.copy_(x)}, 15)
    clone, copy = (statistics.median(found[name]) for name in ("clone", "copy"))
    print(f"{clone / copy:.2f} copies")


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
            print(f"{name:26} {answer.stdout.strip():14} {shown}")
