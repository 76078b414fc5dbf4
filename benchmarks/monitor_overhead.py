"""What `sn.monitor` costs: a training step under it, and without it, in the same run.

    python benchmarks/monitor_overhead.py

Three kinds of step in random order, so that drift hits all alike: without the monitor, with it but
not read, and read, with all that follows of it. One in `EVERY` is read, so its cost is spread. Time
of the processor, one thread, so that a busy machine counts for little. Medians; the last two
columns are medians over rounds of each kind beside the others.
"""

from __future__ import annotations

import random
import statistics
from time import process_time

import torch
from torch import nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.evidence.networks import convolutional, fully_connected, normalization_1d

EVERY = 50
CASES = {
    "fully connected, 3 norms, 64 × 64": (
        lambda: fully_connected(64, normalization_1d("torch")), (64, 64), 1_000
    ),
    "convolutional, 3 norms, 32 × 1×14×14": (
        lambda: convolutional(nn.BatchNorm2d), (32, 1, 14, 14), 300
    ),
    "convolutional, 3 norms, 42 × 1×14×14": (
        lambda: convolutional(nn.BatchNorm2d), (42, 1, 14, 14), 600
    ),
    "convolutional, 3 norms, 64 × 1×28×28": (
        lambda: convolutional(nn.BatchNorm2d), (64, 1, 28, 28), 200
    ),
    "deep convolutional, 20 norms, 16 × 16×32×32": (lambda: deep(20), (16, 16, 32, 32), 60),
}  # fmt: skip


def deep(layers: int) -> nn.Module:
    """Convolutions of 16 channels at full resolution, each with norm and ReLU."""
    parts = [
        part
        for _ in range(layers)
        for part in (
            nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
    ]  # fmt: skip
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Steps:
    """Training steps of one network, timed by kind."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.model = model
        self.x, self.y = torch.randn(shape), torch.randint(0, 10, shape[:1])
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.seconds: dict[str, list[float]] = {kind: [] for kind in ("plain", "idle", "read")}
        for _ in range(3):  # kernels and memory
            self.step("read")
        self.seconds["read"].clear()

    def step(self, kind: str) -> None:
        """One step; what is read is settled too, which else the next step would do."""
        watch = sn.monitor(self.model, every=1 if kind == "read" else 2)
        if kind != "plain":
            watch.start()
        watch.steps = 0 if kind == "read" else 1
        start = process_time()
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()
        if kind == "read":
            _ = watch.readings
        self.seconds[kind].append(process_time() - start)
        watch.stop()

    def milliseconds(self, kind: str) -> float:
        return 1e3 * statistics.median(self.seconds[kind])

    def more(self, kind: str, share: float) -> float:
        """How much longer than without, in %, where it happens in a share of the steps."""
        pairs = zip(self.seconds[kind], self.seconds["plain"], strict=True)
        return 100 * share * statistics.median(mine / plain - 1 for mine, plain in pairs)


def main() -> None:
    """Print a row for each network."""
    torch.set_num_threads(1)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, one step in {EVERY} read")
    kinds = ("plain", "idle", "read")
    heads = ("plain", "not read", "read", "reading", "hook")
    print(f"{'a step, ms':44}" + "".join(f"{head:>10}" for head in heads))
    for name, (make, shape, rounds) in CASES.items():
        steps = Steps(make(), shape)
        for _ in range(rounds):
            for kind in random.sample(kinds, 3):
                steps.step(kind)
        times = "".join(f"{steps.milliseconds(kind):10.2f}" for kind in kinds)
        print(
            f"{name:44}{times}{steps.more('read', 1 / EVERY):8.1f} %{steps.more('idle', 1):8.1f} %"
        )


if __name__ == "__main__":
    main()
