"""Replicas that agree, disagree or die: every one of them ends as it should, and in time."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.attack._children import Ended, together

import steadynorm as sn

TITLE = "replicas: agreeing, disagreeing and dying"

SECONDS = 60
POLICIES = ("batch", "steady", "running", "renorm", "ghost")
DIED = 9


class Replica:
    """One of several processes, each with its own part of the batch."""

    def __init__(self, folder: str, rank: int, world: int, seed: int) -> None:
        self.rank, self.world, self.odd = rank, world, seed % world
        self.rng = random.Random(seed)  # the same on every replica
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(Path(folder, "store")), world), rank=rank,
            world_size=world, timeout=timedelta(seconds=SECONDS // 2),
        )  # fmt: skip
        self.settings: dict[str, Any] = {"statistics": self.rng.choice(POLICIES)}

    def step(self, layer: torch.nn.Module, channels: int, dtype: torch.dtype) -> None:
        samples = [self.rng.choice([0, 1, 2, 7]) for _ in range(self.world - 1)] + [4]
        x = torch.randn(samples[self.rank], channels, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()

    def agree(self) -> str:
        """Three steps, and the statistics that follow."""
        layer = sn.BatchNorm1d(4, synchronize=True, **self.settings)
        for _ in range(3):
            self.step(layer, 4, torch.float32)
        return str([t.tolist() for t in layer.buffers()])

    def disagree(self) -> None:
        """One differs, from the first step on or later."""
        odd, later = self.rank == self.odd, self.rng.random() < 0.5
        change = self.rng.choice(["policy", "type", "nonfinite", *(() if later else ("channels",))])
        made: dict[str, Any] = {**self.settings, "num_features": 4}
        dtype = torch.float32
        layer = sn.BatchNorm1d(synchronize=True, **made)
        if later:
            self.step(layer, 4, dtype)
        other = self.rng.choice([p for p in POLICIES if p != made["statistics"]])
        if odd and change == "channels":
            layer = sn.BatchNorm1d(synchronize=True, **{**made, "num_features": 6})
        elif odd and change == "policy":
            layer.statistics = other
        elif odd and change == "nonfinite":
            layer.nonfinite = "skip"
        elif odd:
            layer, dtype = layer.double(), torch.float64
        self.step(layer, layer.num_features, dtype)

    def die(self) -> None:
        """One ends without a word, before a forward or before its backward."""
        layer = sn.BatchNorm1d(4, synchronize=True, **self.settings)
        for _ in range(self.rng.randrange(3)):
            self.step(layer, 4, torch.float32)
        before = self.rng.random() < 0.5
        x = torch.randn(3, 4, requires_grad=True)
        if self.rank == self.odd and before:
            os._exit(DIED)
        y = layer(x)
        if self.rank == self.odd:
            os._exit(DIED)
        y.sum().backward()


def start(kind: str, seed: int, world: int) -> list[Ended]:
    with tempfile.TemporaryDirectory() as folder:

        def work(rank: int) -> object:
            return getattr(Replica(folder, rank, world, seed), kind)()

        return together([partial(work, rank) for rank in range(world)], SECONDS)


def agree(seed: int, world: int) -> None:
    ended = start("agree", seed, world)
    for end in ended:
        assert end.code == 0, f"ended with {end.code}: {end.said}"
    assert len({end.said for end in ended}) == 1, "statistics differ"


def disagree(seed: int, world: int) -> None:
    for end in start("disagree", seed, world):
        assert end.code == 1, f"ended with {end.code}: {end.said}"
        assert "the replicas must call this layer alike" in end.said, end.said
        assert f"on rank {seed % world}" in end.said, end.said


def die(seed: int, world: int) -> None:
    for rank, end in enumerate(start("die", seed, world)):
        if rank == seed % world:
            assert end.code == DIED, f"ended with {end.code}: {end.said}"
        else:
            assert end.code == 1, f"ended with {end.code}: {end.said}"
            assert "another replica stopped" in end.said, end.said


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for kind in (agree, disagree, die):
        for _ in range(25 if long else 5):
            seed, world = rng.randrange(1 << 32), rng.choice([2, 2, 3, 4])
            yield f"{world} {kind.__name__}, seed {seed}", partial(kind, seed, world)
