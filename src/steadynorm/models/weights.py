"""Put a scale and a shift per channel into a layer's weight and bias, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from steadynorm.models.layers import TRANSPOSED, exact, recognize


def scale_output(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Makes a layer answer `scale·f(x) + shift`.

        W' = scale·W        b' = scale·b + shift

    `scale` and `shift`: (channels out,), float64. A batch norm is rewritten through its weight and
    bias. Parameters are replaced, never written into, so that a tied weight elsewhere stays.
    """
    weight, bias = layer.weight, layer.bias
    if recognize(layer) is not None:
        ones = torch.ones_like(scale)
        new = scale * (ones if weight is None else exact(weight))
        mean = layer.running_mean
        # The scale belongs to the weight; the mean is subtracted before it either way.
        _store(layer, "weight", new, weight, mean)
        if isinstance(layer, _BatchNorm):
            layer.affine = True
    else:
        _store(layer, "weight", exact(weight) * _per_output(layer, weight, scale), weight, weight)
    old = torch.zeros_like(shift) if bias is None else exact(bias)
    _store(layer, "bias", scale * old + shift, bias, layer.weight)


def scale_input(layer: Any, scale: Tensor, shift: Tensor) -> None:
    """Makes a linear layer or an unpadded convolution answer `f(scale·x + shift)`.

        W' = W·scale        b' = b + W·shift

    `scale` and `shift`: (channels in,), float64.
    """
    weight, bias = layer.weight, layer.bias
    wide, groups = exact(weight), layer.groups if isinstance(layer, _ConvNd) else 1
    moved = (wide * _second_axis(weight, shift, groups)).flatten(1).sum(1)
    _store(layer, "weight", wide * _second_axis(weight, scale, groups), weight, weight)
    _store(layer, "bias", moved if bias is None else exact(bias) + moved, bias, weight)


def pads(layer: Any) -> bool:
    """Whether a convolution adds anything at the borders."""
    padding = layer.padding
    if isinstance(padding, str):
        return padding != "valid" and any(size > 1 for size in layer.kernel_size)
    return any(padding)


def _per_output(layer: Any, weight: Tensor, values: Tensor) -> Tensor:
    """Values of the output channels, shaped to multiply the weight."""
    if isinstance(layer, TRANSPOSED):
        return _second_axis(weight, values, layer.groups)
    return values.view(-1, *(1 for _ in range(weight.ndim - 1)))


def _second_axis(weight: Tensor, values: Tensor, groups: int) -> Tensor:
    """Values of the channels on a weight's second axis, shaped to multiply it: those of the input
    of (out, in/groups, *), or of the output of a transposed (in, out/groups, *). Each group of
    rows has its own.
    """
    rows, columns = weight.shape[:2]
    grouped = values.view(groups, 1, columns).expand(-1, rows // groups, -1)
    return grouped.reshape(rows, columns, *(1 for _ in range(weight.ndim - 2)))


def _store(layer: nn.Module, name: str, value: Tensor, old: Tensor | None, like: Tensor) -> None:
    """Sets a parameter in the type, device and memory format of what stood there."""
    new = value.to(device=like.device, dtype=like.dtype)
    trainable = old.requires_grad if old is not None else like.requires_grad
    if name in layer._buffers:  # frozen look-alikes keep weight and bias as buffers
        layer._buffers[name] = new
    else:
        setattr(layer, name, nn.Parameter(new, requires_grad=trainable))
