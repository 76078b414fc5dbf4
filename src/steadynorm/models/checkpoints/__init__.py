"""Weights and settings of batch normalization layers, from one framework to another."""

from steadynorm.models.checkpoints.convert import Converted, convert_settings, convert_weights
from steadynorm.models.checkpoints.files import entries, read, write

__all__ = ["Converted", "convert_settings", "convert_weights", "entries", "read", "write"]
