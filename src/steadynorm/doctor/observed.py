"""What batches of data show of a model: plain numbers, made by `measure.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, eq=False)
class LayerData:
    """What batches show of one layer."""


@dataclass(frozen=True, eq=False)
class ModelData:
    """What batches show of the model as a whole."""


class Measured(NamedTuple):
    """What `measure` returns: by layer's name as in `Evidence`, and for the model."""

    layers: Mapping[str, LayerData]
    model: ModelData
