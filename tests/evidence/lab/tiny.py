"""An experiment of seconds, and a script that runs it, to be killed or started by torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torch import nn

from steadynorm.evidence.data_parallel import launched
from steadynorm.evidence.lab import runner
from steadynorm.evidence.lab.experiment import Experiment, PlannedRun
from steadynorm.evidence.lab.runs import Runs
from steadynorm.evidence.lab.verdict import expect, judge
from steadynorm.evidence.networks import build
from steadynorm.evidence.training import Recipe, train

# With two processes, batch 9 is uneven and batch 1 leaves one of them without a sample.
SETTINGS = [
    {"policy": policy, "batch": batch, "steps": 6}
    for policy, batch in (("batch", 9), ("steady", 9), ("steady", 1), ("none", 9))
]


def run(setting, seed, digits, tick):
    if "NOTES" in os.environ:
        with (Path(os.environ["NOTES"]) / f"{os.getpid()}").open("a") as note:
            note.write(f"{setting['policy']} {setting['batch']} {seed}\n")
    batch, policy = setting["batch"], setting["policy"]
    shape = {"widths": (8, 8), "activation": nn.Tanh}
    network = build("fully connected", policy, digits, seed, **shape)
    recipe = Recipe(batch, setting["steps"] * batch, points=3)
    done = train(network, digits, recipe, seed=seed, tick=tick)
    return {
        "loss": [point.loss for point in done.points],
        "accuracy": done.accuracy,
        "training_accuracy": [point.training_accuracy for point in done.points],
        "weight": network[1].weight.flatten()[:5].tolist(),
        "stopped": done.stopped,
    }


def verdict(runs: Runs):
    found = runs.difference("accuracy", "policy", "batch", "steady", batch=9)
    return judge(f"They differ by {found}.", [expect("difference", found, above=-1, below=1)])


def shows(runs: Runs):
    yield "Nothing to see."


def one_step(setting):
    return 1


TINY = Experiment(
    name="tiny", title="A tiny one", claim="It runs.", source="nobody", factors={"policy": "two"},
    measure="accuracy", rule="within one", settings={"quick": SETTINGS, "full": SETTINGS}, run=run,
    verdict=verdict, shows=shows, steps=one_step, seeds={"quick": 6, "full": 7},
)  # fmt: skip


def main(out: str) -> None:
    if launched():
        told: list[PlannedRun] = []
        runner.run_together([TINY], out=out, seeds=2, progress=lambda _, run: told.append(run))
        (Path(out) / f"told-{os.environ['RANK']}-{len(told)}").touch()
    else:
        runner.run([TINY], out=out, workers=2)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from tests.evidence.lab import tiny  # workers must find its functions by this name

    tiny.main(sys.argv[1])
