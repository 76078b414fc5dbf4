"""Eight threads that call layers at once, on kernels that nobody has compiled or loaded yet."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

import steadynorm as sn

TITLE = "threads: eight at once, compared with one after the other"

THREADS = 8
SHAPES = ((4, 8, 5, 5), (16, 24, 30, 30), (64, 7), (8, 130, 14, 14))
POLICIES = ("batch", "steady", "running", sn.Ghost(2))


def steps(seed: int, shape: tuple[int, ...], policy: Any, activation: str | None) -> Any:
    """A few training steps and an inference of a layer of one's own."""
    random_state = torch.Generator().manual_seed(seed)
    kind = sn.BatchNorm1d if len(shape) == 2 else sn.BatchNorm2d
    layer = kind(shape[1], statistics=policy, activation=activation)
    found = []
    for _ in range(3):
        x = torch.randn(shape, generator=random_state).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(shape, generator=random_state))
        found += [y.detach(), x.grad, layer.weight.grad.clone()]
    layer.eval()
    with torch.no_grad():
        found.append(layer(torch.randn(shape, generator=random_state)))
    return [*found, layer.running_mean, layer.running_var]


def own_layers(seed: int, shape: tuple[int, ...], policy: Any, activation: str | None) -> None:
    """Every thread has a layer: results are those of a thread alone, bit for bit."""
    call = partial(steps, shape=shape, policy=policy, activation=activation)
    seeds = range(seed, seed + THREADS)
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(call, seeds))
    for one, other in zip(together, map(call, seeds), strict=True):
        assert all(map(torch.equal, one, other)), "a thread's results depend on the others"


def one_layer(seed: int, shape: tuple[int, ...]) -> None:
    """One layer in inference, which all threads share."""
    layer = sn.BatchNorm2d(shape[1]).eval()
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + k))
        for k in range(THREADS)
    ]
    barrier = threading.Barrier(THREADS)

    def call(x: torch.Tensor) -> torch.Tensor:
        barrier.wait(60)
        with torch.no_grad():
            return [layer(x) for _ in range(20)][-1]

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(call, inputs))
    with torch.no_grad():
        assert all(map(torch.equal, together, map(layer, inputs)))


def cases(rng: random.Random, long: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """With a short switching interval, so that threads meet in the middle of things."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(60 if long else 4):
            shape, policy = rng.choice(SHAPES), rng.choice(POLICIES)
            activation, seed = rng.choice([None, "relu"]), rng.randrange(1 << 30)
            title = f"{shape} {policy} {activation}"
            yield title, partial(own_layers, seed, shape, policy, activation)
            images = rng.choice([shape for shape in SHAPES if len(shape) == 4])
            yield f"{images} shared", partial(one_layer, seed, images)
    finally:
        sys.setswitchinterval(before)
