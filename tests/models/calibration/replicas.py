"""What one of three replicas does in test_replicas.py; started by tests/replicas.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tests.replicas import join
from torch import Tensor, nn

import steadynorm as sn

SIZES = {0: (4, 1, 6, 3, 5), 1: (), 2: (2, 9)}  # uneven, and one replica without any


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(4, 6), sn.BatchNorm1d(6, synchronize=True), nn.ReLU(), nn.Linear(6, 3),
        nn.BatchNorm1d(3),
    )  # fmt: skip


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, 4, generator=generator) * 2 + rank for size in SIZES[rank]]


def failing(rank: int):
    yield torch.ones(2, 4)
    if rank == 1:
        raise KeyError("broken file")


def main(folder: Path) -> None:
    join(folder)
    rank = dist.get_rank()
    results: dict[str, object] = {}
    for name, call in (("calibrate", sn.calibrate), ("adapt", sn.adapt)):
        for passes in ("one", "layerwise"):
            model = network()
            if name == "adapt":
                model[1].running_mean.fill_(rank)  # the first replica's counts
            given = nn.parallel.DistributedDataParallel(model) if passes == "one" else model
            if name == "adapt":
                model[1].running_mean.fill_(rank)  # DistributedDataParallel has made them equal
            report = call(given, batches(rank), passes=passes)
            results[f"{name} {passes}"] = (
                {key: value.clone() for key, value in model.state_dict().items()},
                report.to_dict(),
            )
    alone = network()
    if rank != 1:
        sn.calibrate(alone, batches(rank), synchronize=False)
    results["alone"] = alone.state_dict()
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        sn.calibrate(model, failing(rank))
    except (KeyError, RuntimeError) as error:
        results["failed"] = f"{type(error).__name__}: {error}"
    results["whole"] = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
