"""One of three replicas, of which rank 1 dies: `doomed_replica.py DEATH RANK FOLDER`."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import steadynorm as sn

TIMEOUT = 120  # seconds, of the group; the test demands an end well before
DEATHS = ("before the forward", "between forward and backward")


def main(death: str, rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), 3),
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=TIMEOUT),
    )
    layer = sn.BatchNorm1d(4, statistics="steady", synchronize=True)
    layer(torch.randn(5, 4)).sum().backward()  # all is well at first
    x = torch.randn(5, 4, requires_grad=True)
    doomed = rank == 1
    if doomed and death == "before the forward":
        os._exit(9)
    y = layer(x)
    if doomed:
        os._exit(9)
    y.sum().backward()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
