"""What is measured: shapes of real networks, layouts, types, what surrounds the layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

CASES = ("bn", "bn+relu", "bn+add+relu")
LAYOUTS = ("nchw", "nhwc")
DTYPES = ("float32", "bfloat16", "float16")

# The distinct inputs of batch normalization in ResNet-50 at 224 x 224 and batch 32.
RESNET50 = (
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 128, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 256, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 14, 14),
    (32, 512, 14, 14),
    (32, 1024, 14, 14),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
)
# Where the cost of a call, not memory, decides.
SMALL = (
    (2, 16), (2, 16, 4, 4), (8, 64), (4, 32, 8, 8), (16, 64, 4, 4), (8, 64, 8, 8), (32, 64, 8, 8),
)  # fmt: skip

SUITES: dict[str, Sequence[tuple[int, ...]]] = {
    "resnet50": RESNET50,
    # A 3-d U-Net on patches of 64 x 64 x 64, batch 2.
    "unet3d": ((2, 32, 64, 64, 64), (2, 64, 32, 32, 32), (2, 128, 16, 16, 16), (2, 256, 8, 8, 8)),
    "mlp": ((64, 256), (256, 1024), (1024, 1024), (4096, 512)),
    "small": SMALL,
}


class Workload(NamedTuple):
    """One thing to time."""

    suite: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    case: str
    training: bool

    @property
    def size(self) -> str:
        """The shape as text."""
        return "x".join(map(str, self.shape))

    @property
    def mode(self) -> str:
        """Training or inference."""
        return "training" if self.training else "inference"

    @property
    def activation(self) -> str | None:
        """The layer's, if it has one."""
        return None if self.case == "bn" else "relu"

    @property
    def has_residual(self) -> bool:
        """Whether a residual is added before the activation."""
        return self.case == "bn+add+relu"

    @property
    def total(self) -> str:
        """The direction that counts: both in training."""
        return "both" if self.training else "forward"

    @property
    def title(self) -> str:
        """All but the shape."""
        return f"{self.case}, {self.mode}, {self.suite}, {self.layout}, {self.dtype}"

    @property
    def limit(self) -> tuple[float, float]:
        """Least memory traffic of forward and backward, in copies of the input (read and write).

        Forward reads x (and the residual) and writes y. Backward reads the gradient and x and
        writes dx (and the residual's gradient). One bit per value for the activation's gradient is
        not counted.
        """
        more = int(self.has_residual)
        return (2 + more) / 2, (3 + more) / 2 if self.training else 0.0


def workloads(
    suites: Sequence[str],
    cases: Sequence[str],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    modes: Sequence[str],
) -> Iterator[Workload]:
    """Every combination that exists: layouts only where there are positions to lay out."""
    for mode, dtype, case, suite, layout in product(modes, dtypes, cases, suites, layouts):
        for shape in SUITES[suite]:
            if layout != "nhwc" or len(shape) >= 4:
                yield Workload(suite, shape, layout, dtype, case, mode == "training")
