"""Whole models: convert, fold, drop redundant biases, freeze, group parameters."""

from steadynorm.surgery.changes import Change, Changes
from steadynorm.surgery.fold import fold

__all__ = ["Change", "Changes", "fold"]
