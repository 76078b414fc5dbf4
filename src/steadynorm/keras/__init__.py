"""Batch normalization for Keras 3, on its TensorFlow, JAX and torch backends."""

from steadynorm._extras import needed_by

with needed_by("steadynorm.keras"):
    from steadynorm.keras.batchnorm import BatchNormalization
    from steadynorm.keras.conversion import convert

__all__ = ["BatchNormalization", "convert"]
