"""Keras's own tests of its layer, with ours in its place; run by `test_backends.py`."""

import pytest
from keras.src import layers
from keras.src.layers.normalization.batch_normalization_test import BatchNormalizationTest

from steadynorm.keras import BatchNormalization

__all__ = ["BatchNormalizationTest"]


@pytest.fixture(autouse=True)
def ours_in_the_place_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "BatchNormalization", BatchNormalization)
