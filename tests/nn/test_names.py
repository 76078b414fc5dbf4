"""`steadynorm.nn` stands in for `torch.nn`: ours where we have one, torch's for the rest."""

import pytest
import torch

import steadynorm as sn
from steadynorm import nn


def test_our_layers_and_torchs_other_names():
    assert nn.BatchNorm1d is sn.BatchNorm1d
    assert nn.Linear is torch.nn.Linear
    assert nn.Module is torch.nn.Module


def test_completion_knows_both():
    names = dir(nn)
    assert {"BatchNorm2d", "BatchNormLSTM", "Linear", "Conv2d", "functional"} <= set(names)
    assert all(hasattr(nn, name) for name in names if not name.startswith("_"))
    assert {"batch_norm", "relu"} <= set(dir(nn.functional))


def test_a_star_gives_ours_after_torchs():
    names = {}
    exec("from torch.nn import *; from steadynorm.nn import *", names)
    assert names["BatchNorm2d"] is sn.BatchNorm2d
    assert names["Linear"] is torch.nn.Linear


def test_a_name_that_neither_has():
    with pytest.raises(AttributeError, match="BatchNorm4d"):
        nn.BatchNorm4d  # noqa: B018


def test_functions_of_torch_beside_ours():
    F = nn.functional
    assert F is sn.functional
    assert F.relu is torch.nn.functional.relu
    assert F.batch_norm is not torch.nn.functional.batch_norm
    with pytest.raises(AttributeError, match="no_such_function"):
        F.no_such_function  # noqa: B018


def test_torchs_functions_are_seen_by_the_compiler():
    def network(x):
        return nn.functional.relu(nn.functional.linear(x, torch.ones(3, 2)))

    x = torch.randn(4, 2)
    torch.testing.assert_close(
        torch.compile(network, backend="eager", fullgraph=True)(x), network(x)
    )


def test_the_stub_names_what_the_module_has():
    from importlib.resources import files

    stub = (files("steadynorm.nn") / "__init__.pyi").read_text()
    assert [name for name in nn.__all__ if f" as {name}\n" not in stub] == []
