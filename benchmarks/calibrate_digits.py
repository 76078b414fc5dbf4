"""Real digits: inference before and after `calibrate`, and on shifted digits after `adapt`.

    python benchmarks/calibrate_digits.py

Networks are trained at batch 2 with torch's defaults, in one cycle of the learning rate. They are
looked at half-way, where the weights still move fast, and at the end. Ten seeds; ± is Student's
95 % interval, and "gain" is the interval of the paired differences.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.evidence import workers
from steadynorm.evidence.digits import load, tensors
from steadynorm.evidence.estimates import mean
from steadynorm.evidence.networks import KINDS, Kind, build
from steadynorm.evidence.training import Recipe, Tick, inference_accuracy, train
from steadynorm.report.machine import processor
from steadynorm.report.page import Table

SAMPLES = 9_000
BATCH = 64  # of the calibration, unless it says otherwise


class HalfWayError(Exception):
    """Ends a run at its middle."""


def trained(kind: Kind, batch_size: int, seed: int, *, half: bool, tick: Tick) -> nn.Sequential:
    recipe = Recipe(batch_size, SAMPLES, points=1)
    network, done = build(kind, "torch", load(), seed), 0

    def watch(steps: int) -> None:
        nonlocal done
        done += steps
        tick(steps)
        if half and done >= recipe.steps // 2:
            raise HalfWayError

    with suppress(HalfWayError):
        train(network, load(), recipe, seed=seed, tick=watch)
    return network


def after(network: nn.Module, change: Callable[[nn.Module], object]) -> float:
    """Accuracy of inference on the test digits, in %, after `change` to a copy."""
    _, _, images, labels = tensors(load())
    network = copy.deepcopy(network)
    change(network)
    return 100 * inference_accuracy(network, images, labels)


def calibration(kind: Kind, half: bool, seed: int, *, tick: Tick) -> dict[str, float]:
    network = trained(kind, 2, seed, half=half, tick=tick)
    images = tensors(load())[0]

    def calibrate(size: int, passes: str) -> Callable[[nn.Module], object]:
        return lambda model: sn.calibrate(model, images.split(size), passes=passes, progress=False)

    def update_bn(model: nn.Module) -> None:
        torch.optim.swa_utils.update_bn(images[:-1].split(2), model)  # it cannot do a batch of one

    return {
        "before": after(network, lambda model: None),
        "calibrate": after(network, calibrate(BATCH, "one")),
        "at batch 2": after(network, calibrate(2, "one")),
        "layerwise": after(network, calibrate(BATCH, "layerwise")),
        "update_bn at batch 2": after(network, update_bn),
    }


class Shift(NamedTuple):
    """A change of the pictures that a network was not trained for."""

    name: str
    change: Callable[[Tensor, torch.Generator], Tensor]


SHIFTS = (
    Shift("as trained", lambda x, g: x),
    Shift("a third of the contrast", lambda x, g: x / 3),
    Shift("brighter by 2 std", lambda x, g: x + 2),
    Shift("noise of 1 std", lambda x, g: x + torch.randn(x.shape, generator=g)),
)


def adaptation(seed: int, *, tick: Tick) -> dict[tuple[str, str], float]:
    """Each group of so many test digits is adapted to and classified on its own."""
    network = trained("convolutional", BATCH, seed, half=False, tick=tick)
    _, _, images, labels = tensors(load())
    results = {}
    for shift in SHIFTS:
        shifted = shift.change(images, torch.Generator().manual_seed(seed))
        results[shift.name, "before"] = 100 * inference_accuracy(network, shifted, labels)
        for group in (4, 40):
            for prior in (0, 16):
                right = 0.0
                for x, y in zip(shifted.split(group), labels.split(group), strict=True):
                    model = copy.deepcopy(network)
                    sn.adapt(model, [x], prior=prior, progress=False)
                    right += inference_accuracy(model, x, y) * len(y)
                results[shift.name, f"{group} digits, prior {prior}"] = 100 * right / len(labels)
    return results


def show_calibration(runs: dict[tuple[str, bool], list[dict[str, float]]]) -> None:
    columns = list(next(iter(runs.values()))[0])
    rows = []
    for (kind, half), results in runs.items():
        gain = mean([run["calibrate"] - run["before"] for run in results])
        cells = [mean([run[column] for run in results]).plus_minus for column in columns]
        rows.append([f"{kind}, {'half-way' if half else 'at the end'}", *cells, str(gain)])
    heads = ["network, trained at batch 2", *columns, "gain of calibrate"]
    print(f"{Table('calibrate', heads, rows).markdown()}\n")


def show_adaptation(runs: list[dict[tuple[str, str], float]]) -> None:
    columns = [column for name, column in runs[0] if name == SHIFTS[0].name]
    rows = [
        [name, *(mean([run[name, column] for run in runs]).plus_minus for column in columns)]
        for name, _ in SHIFTS
    ]
    print(f"{Table('adapt', ['test digits', *columns], rows).markdown()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    steps = SAMPLES // 2
    cells = list(product(KINDS, (True, False)))
    work = [
        workers.Job("calibrate", (kind, half, seed), steps, calibration, (kind, half, seed))
        for kind, half in cells
        for seed in seeds
    ]
    work += [workers.Job("adapt", (seed,), steps, adaptation, (seed,)) for seed in seeds]
    outcomes = {job.key: outcome for job, outcome in workers.run(work)}
    print(f"{load()}; accuracy of inference on the test digits, %; {len(seeds)} seeds")
    print(
        f"{date.today()}, {processor()}, {workers.cores()} cores, "
        f"steadynorm {sn.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    show_calibration({cell: [outcomes[(*cell, seed)] for seed in seeds] for cell in cells})
    show_adaptation([outcomes[seed,] for seed in seeds])


if __name__ == "__main__":
    main()
