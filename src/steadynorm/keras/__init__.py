"""Batch normalization for Keras 3, on its TensorFlow, JAX and torch backends."""

from steadynorm.keras.batchnorm import BatchNormalization

__all__ = ["BatchNormalization"]
