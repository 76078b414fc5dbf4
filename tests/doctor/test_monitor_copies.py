"""A copy of a monitored model is a model of its own."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import steadynorm as sn


def hooks_of(model: nn.Module) -> int:
    """How many entries the modules' tables of hooks hold."""
    return sum(
        len(table)
        for m in model.modules()
        for n, table in vars(m).items()
        if "hooks" in n and table
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "within a step"])
def test_a_copy_of_the_model_is_not_monitored(how: str) -> None:
    """An average of weights is such a copy; it may be taken while the monitor runs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    copies = []

    def keep(*_: Any) -> None:
        copies.append(copy.deepcopy(model))

    if how == "within a step":
        handle = model[0].register_forward_hook(keep)
    with sn.monitor(model, every=1) as watch:
        model(torch.randn(6, 3)).square().mean().backward()
        if how == "within a step":
            handle.remove()
        elif how == "deepcopy":
            keep()
        else:
            copies.append(pickle.loads(pickle.dumps(model)))
        (twin,) = copies
        for number in range(2):  # the first call removes what stands in the hook's place
            twin(torch.randn(6, 3)).square().mean().backward()
            left = hooks_of(twin) - (how == "within a step")  # the test's own
            assert left == 0, number
        assert watch.steps == 1
        assert len(watch.readings) == 1
        model(torch.randn(6, 3)).square().mean().backward()
    assert watch.steps == 2
    assert [reading.step for reading in watch.readings] == [0, 1]
    assert hooks_of(model) == 0
