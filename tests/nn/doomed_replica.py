"""One of three replicas, of which rank 1 dies; started by tests/replicas.py."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tests import replicas

import steadynorm as sn

TIMEOUT = timedelta(seconds=120)  # of the group; the test demands an end well before
DEATHS = ("before the forward", "between forward and backward")


def main(folder: Path, death: str) -> None:
    replicas.join(folder, TIMEOUT)
    layer = sn.BatchNorm1d(4, statistics="steady", synchronize=True)
    layer(torch.randn(5, 4)).sum().backward()  # all is well at first
    x = torch.randn(5, 4, requires_grad=True)
    doomed = dist.get_rank() == 1
    if doomed and death == "before the forward":
        os._exit(9)
    y = layer(x)
    if doomed:
        os._exit(9)
    y.sum().backward()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
