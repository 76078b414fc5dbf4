"""Starts the replicas of a process group, each as a process of its own, and lets them meet.

Without `torchrun`: the replicas meet in a file, no port is chosen, and what each of them wrote is
kept apart. A replica that waits for the others in vain ends with an error, one that hangs with the
stacks of its threads.
"""

import faulthandler
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
WAIT = timedelta(seconds=120)  # for the other replicas, in one collective
LIMIT = 300.0  # seconds, for a replica as a whole


class Ended(NamedTuple):
    """How a replica ended, and what it wrote to stderr."""

    returncode: int
    stderr: str


def start(module: str, *arguments: str, folder: Path, replicas: int) -> list[Ended]:
    """Run `python -m module folder *arguments` as so many replicas at once, and wait for all."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(replicas),
    }
    started = []
    for rank in range(replicas):
        with (folder / f"{rank}.stderr").open("w") as stderr:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(folder), *arguments],
                    cwd=ROOT,
                    env={**environment, "RANK": str(rank)},
                    stdout=stderr,
                    stderr=stderr,
                )
            )
    try:
        codes = [replica.wait(LIMIT + 30) for replica in started]
    finally:
        for replica in started:
            replica.kill()
    said = [(folder / f"{rank}.stderr").read_text() for rank in range(replicas)]
    return [Ended(*end) for end in zip(codes, said, strict=True)]


def start_well(module: str, *arguments: str, folder: Path, replicas: int) -> None:
    """The same, where every replica must end without an error."""
    ended = start(module, *arguments, folder=folder, replicas=replicas)
    failed = [f"rank {rank}: {end.stderr[-4000:]}" for rank, end in enumerate(ended) if end[0]]
    assert not failed, "\n".join(failed)


def join(folder: Path, wait: timedelta = WAIT) -> None:
    """In a replica: meet the others in the default process group."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    world = int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
