"""What `sn.diagnose` costs: time and memory, beside two training steps.

    python benchmarks/doctor_cost.py

transformers' ResNet-50 (25.6 million parameters, random weights), 64 pictures of 224×224 in batches
of 8, on as many threads as `OMP_NUM_THREADS` says. Each in a process of its own; memory is the most
that the process held; the clock is fair only on a machine that does nothing else.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from time import perf_counter, process_time

SAMPLES, BATCH = 64, 8


def main() -> None:
    for what in ("train", "diagnose"):
        subprocess.run([sys.executable, __file__, what], check=True)


def measured(what: str) -> None:
    import torch
    import transformers
    from torch.nn import functional as F

    import steadynorm as sn

    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    batches = [
        (torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,)))
        for _ in range(SAMPLES // BATCH)
    ]
    start, clock = process_time(), perf_counter()
    if what == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for x, labels in batches[:2]:
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x).logits, labels).backward()
            optimizer.step()
    else:
        sn.diagnose(
            model, batches, loss=F.cross_entropy, forward=lambda model, pair: model(pair[0]).logits
        )
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{what}: {perf_counter() - clock:.0f} s by the clock on {torch.get_num_threads()} "
        f"threads, {process_time() - start:.0f} s of one core, {held:.2f} GB"
    )


if __name__ == "__main__":
    measured(sys.argv[1]) if len(sys.argv) > 1 else main()
