"""See what reaches the batch norms of a model, by hooks: calibration and the doctor stand on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.kernels.dispatch import stages_for
from steadynorm.models.layers import NormLayer
from steadynorm.nn import checks
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.statistics import Moments

Observer = Callable[[NormLayer, Tensor, Tensor | None], None]


@contextmanager
def observing(layers: Iterable[NormLayer], observer: Observer) -> Iterator[None]:
    """While it lasts, `observer(layer, input, mask)` is called before each call of a layer.

    `mask` has the input's shape without its channel axis, or is None. Inputs that the layer will
    refuse (another rank, other channels) are not observed. The observer may change the layer, which
    then runs as changed. Its hooks stand last, so that it sees what the layer sees; it runs without
    gradient, and models compiled by torch.compile run eagerly, since compiled code would not call
    hooks.
    """
    with ExitStack() as hooks, torch.no_grad(), eagerly():
        for layer in layers:

            def hook(module: Any, args: Any, kwargs: Any, layer: NormLayer = layer) -> None:
                given = input_of(module, args, kwargs)
                if given is not None:
                    observer(layer, *given)

            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def input_of(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """The input and the mask of one call of a batch norm; None where the layer will refuse it."""
    x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
    if not isinstance(x, Tensor) or x.ndim < 2:
        return None
    mean: Any = getattr(module, "running_mean", None)
    channels = vars(module).get("num_features") if mean is None else len(mean)
    if channels is not None and x.shape[1] != channels:
        return None
    mask = kwargs.get("mask") if isinstance(module, SteadyNorm) else None
    return x, None if mask is None else checks.expanded_mask(mask, x, type(module).__name__)


def eagerly() -> AbstractContextManager[Any]:
    """No compiled code, which would not call the hooks."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


def moments_of(x: Tensor, mask: Tensor | None) -> Moments:
    """Moments of one call's input in float64, where the mean needs no second half."""
    part = stages_for(x).moments(x.detach(), mask=mask)
    where = float64_device(part.mean)
    count = torch.as_tensor(part.count, dtype=torch.float64, device=where).reshape(1)
    mean, low, var = (
        value.to(where, torch.float64) for value in (part.mean, part.mean_low, part.var)
    )
    return Moments(count, mean + low, var, torch.zeros_like(mean))


def float64_device(tensor: Tensor) -> torch.device:
    """The tensor's device, if it has float64; else the CPU."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device
