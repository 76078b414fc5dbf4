"""Whole models: convert, fold, drop redundant biases, freeze, group parameters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steadynorm.models.surgery.bias import drop_redundant_bias
    from steadynorm.models.surgery.changes import Change, Changes
    from steadynorm.models.surgery.conversion import convert
    from steadynorm.models.surgery.folding import fold
    from steadynorm.models.surgery.freezing import freeze, unfreeze
    from steadynorm.models.surgery.grouping import parameter_groups

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

_HOME_OF = {
    "Change": "changes",
    "Changes": "changes",
    "convert": "conversion",
    "drop_redundant_bias": "bias",
    "fold": "folding",
    "freeze": "freezing",
    "parameter_groups": "grouping",
    "unfreeze": "freezing",
}


def __getattr__(name: str) -> Any:  # so that the command line starts without torch
    if name not in _HOME_OF:
        raise AttributeError(f"module 'steadynorm.models.surgery' has no attribute {name!r}")
    return getattr(import_module(f"steadynorm.models.surgery.{_HOME_OF[name]}"), name)
