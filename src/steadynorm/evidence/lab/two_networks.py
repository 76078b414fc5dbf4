"""The two plain networks that several experiments put batch normalization into: one as built in
2015, with sigmoid units and small weights, and one as built today.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from steadynorm.evidence import networks
from steadynorm.evidence.digits import Digits
from steadynorm.evidence.lab.runs import Runs, Setting
from steadynorm.evidence.networks import Statistics
from steadynorm.evidence.training import Recipe

BATCH = 32
SIGMOID, RELU = "sigmoid, small weights", "ReLU, He's weights"
NETWORKS = (SIGMOID, RELU)
GOOD_RATES = {SIGMOID: 0.9, RELU: 0.09}  # for the plain networks


def build(network: str, statistics: Statistics, digits: Digits, seed: int) -> nn.Sequential:
    """The paper's first network, three sigmoid layers of 100, or ten ReLU layers of 64."""
    if network == RELU:
        return networks.build("fully connected", statistics, digits, seed, widths=(64,) * 10)
    made = networks.build(
        "fully connected", statistics, digits, seed, widths=(100,) * 3, activation=nn.Sigmoid
    )
    networks.initialize(made, seed, std=0.1)
    return made


def recipe(setting: Setting) -> Recipe:
    """Plain SGD at the network's good rate."""
    return Recipe.constant(BATCH, setting["samples"], GOOD_RATES[setting["network"]])


def needed(runs: Runs, **factors: object) -> Sequence[float]:
    """By seed, steps to the target; where it was not reached, those of the whole run, which is an
    underestimate.
    """
    reached, budget = runs.values("reached", **factors), runs.values("budget", **factors)
    return [float(step or whole) for step, whole in zip(reached, budget, strict=True)]
