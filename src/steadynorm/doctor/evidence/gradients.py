"""Where gradients are lost: saturated activations after batch norms, and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.doctor.evidence import Saturation, WeightGradient
from steadynorm.doctor.evidence.inputs import watching
from steadynorm.models.calibration.layers import Layer
from steadynorm.models.surgery.graph import tensors
from steadynorm.models.surgery.layers import is_host
from steadynorm.models.untouched import set_training

FLAT = 0.05  # of the steepest slope: sigmoid' = y(1 - y) is at most 1/4, tanh' = 1 - y² at most 1
NEARLY_ALL = 0.95

_SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda y: 4 * y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}


class _Listener(TorchDispatchMode):
    """Sees sigmoid and tanh wherever they are applied to what a batch norm returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.makers: Any = WeakIdKeyDictionary()
        self.seen: list[tuple[str, str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        layer = self.makers.get(args[0]) if name in _SLOPES and args else None
        result = func(*args, **(kwargs or {}))
        if layer is not None and isinstance(result, Tensor):
            self.seen.append((layer, name, result))
        return result


def saturations(layers: Sequence[Layer], call: Callable[[], Any]) -> dict[str, Saturation]:
    """By layer, how saturated the sigmoid or tanh that follows it is, batches normalized as in
    training. What the model returns as its answer is left out: it is meant to decide.
    """
    listener = _Listener()
    with ExitStack() as hooks, watching(layers, training=True):
        for layer in layers:
            handle = layer.module.register_forward_hook(_remember(listener, layer))
            hooks.callback(handle.remove)
        with listener:
            answer = call()
    final = {id(tensor) for tensor in tensors(answer)}
    found = {}
    for name, function, result in listener.seen:
        if id(result) not in final and result.ndim > 1:
            found[name] = _saturation(function, result)
    return found


def _remember(listener: _Listener, layer: Layer) -> Callable[[Any, Any, Any], None]:
    fused = getattr(layer.module, "activation", None)

    def hook(_: Any, args: Any, result: Any) -> None:
        if not isinstance(result, Tensor):
            return
        if fused in _SLOPES:
            listener.seen.append((layer.name, fused, result))
        else:
            listener.makers[result] = layer.name

    return hook


def _saturation(function: str, y: Tensor) -> Saturation:
    flat = (_SLOPES[function](y.detach().float()) < FLAT).float()
    by_channel = flat.movedim(1, 0).flatten(1).mean(1)
    return Saturation(function, float(flat.mean()), float((by_channel > NEARLY_ALL).float().mean()))


def gradients(
    model: nn.Module, layers: Sequence[Layer], scalar: Callable[[], Tensor | None]
) -> tuple[WeightGradient, ...]:
    """How much gradient reaches each linear layer and convolution, in the order of the forward,
    batches normalized as in training. Empty where the model lets none through.
    """
    order: dict[str, nn.Parameter] = {}

    def note(name: str) -> Callable[[Any, Any], None]:
        def hook(module: Any, _: Any) -> None:
            weight = module.weight
            if isinstance(weight, nn.Parameter) and weight.requires_grad:
                order.setdefault(name, weight)

        return hook

    with ExitStack() as hooks, watching(layers, training=True), torch.enable_grad():
        for name, module in model.named_modules():
            if is_host(module):
                hooks.callback(module.register_forward_pre_hook(note(name)).remove)
        set_training(model, False)
        try:
            value = scalar()
            if value is None or not order:
                return ()
            found = torch.autograd.grad(value, list(order.values()), allow_unused=True)
        except RuntimeError:  # not every forward can be differentiated
            return ()
    return tuple(
        WeightGradient(name, float(grad.detach().double().norm() * weight.detach().double().norm()))
        for (name, weight), grad in zip(order.items(), found, strict=True)
        if grad is not None and bool(grad.isfinite().all())
    )
