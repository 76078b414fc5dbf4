"""Whole models: convert, fold, drop redundant biases, freeze, group parameters."""

from steadynorm.surgery.bias import drop_redundant_bias
from steadynorm.surgery.changes import Change, Changes
from steadynorm.surgery.convert import convert
from steadynorm.surgery.fold import fold
from steadynorm.surgery.freeze import freeze, unfreeze
from steadynorm.surgery.parameter_groups import parameter_groups

__all__ = [
    "Change",
    "Changes",
    "convert",
    "drop_redundant_bias",
    "fold",
    "freeze",
    "parameter_groups",
    "unfreeze",
]
