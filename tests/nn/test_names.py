"""`steadynorm.nn` stands in for `torch.nn`: ours where we have one, torch's for the rest."""

import pytest
import torch

import steadynorm as sn
from steadynorm import nn


def test_our_layers_and_torchs_other_names():
    assert nn.BatchNorm1d is sn.BatchNorm1d
    assert nn.Linear is torch.nn.Linear
    assert nn.Module is torch.nn.Module


def test_a_name_that_neither_has():
    with pytest.raises(AttributeError, match="BatchNorm4d"):
        nn.BatchNorm4d  # noqa: B018
