"""PyTorch as an array namespace for the definitions that name no framework."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class TorchArrays:
    """The math namespace of `activations`, over tensors."""

    where = staticmethod(torch.where)
    sigmoid = staticmethod(torch.sigmoid)
    tanh = staticmethod(torch.tanh)
    erf = staticmethod(torch.erf)
    exp = staticmethod(torch.exp)
    expm1 = staticmethod(torch.expm1)

    @staticmethod
    def like(number: float, z: Tensor) -> float:
        """Operators of torch keep the tensor's type beside a plain number."""
        return number

    @staticmethod
    def activate(name: str, z: Tensor) -> Tensor:
        """torch's own function of the same name: one pass, and one tensor saved for autograd."""
        y: Tensor = getattr(F, name)(z)
        return y


xp = TorchArrays()
