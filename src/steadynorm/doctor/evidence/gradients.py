"""Where gradients are lost: saturated activations after batch norms, and depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.doctor.evidence.inputs import observed
from steadynorm.doctor.evidence.records import Saturation, WeightGradient
from steadynorm.models.graph import tensors
from steadynorm.models.layers import NormLayer, is_host

FLAT = 0.05  # of the steepest slope: sigmoid' = y(1 - y) is at most 1/4, tanh' = 1 - y² at most 1
NEARLY_ALL = 0.95

SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda y: 4 * y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}


class _ActivationRecorder(TorchDispatchMode):
    """Records sigmoid and tanh wherever they are applied to what a batch norm returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.makers: Any = WeakIdKeyDictionary()
        self.seen: list[tuple[str, str, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        layer = self.makers.get(args[0]) if name in SLOPES and args else None
        result = func(*args, **(kwargs or {}))
        if layer is not None and isinstance(result, Tensor):
            self.seen.append((layer, name, result))
        return result

    def returned(self, layer: NormLayer, module: Any, _: Any, result: Any) -> None:
        """A batch norm has returned; its own activation may be inside."""
        fused = getattr(module, "activation", None)
        if not isinstance(result, Tensor):
            return
        if fused in SLOPES:
            self.seen.append((layer.name, fused, result))
        else:
            self.makers[result] = layer.name


def saturations(layers: Sequence[NormLayer], call: Callable[[], Any]) -> dict[str, Saturation]:
    """By layer, how saturated the sigmoid or tanh after it is, batches normalized as in training.

    The model's answer is left out: it is meant to decide.
    """
    recorder = _ActivationRecorder()
    with ExitStack() as hooks, observed(layers, training=True):
        for layer in layers:
            handle = layer.module.register_forward_hook(partial(recorder.returned, layer))
            hooks.callback(handle.remove)
        with recorder:
            answer = call()
    final = {id(tensor) for tensor in tensors(answer)}
    return {
        name: _saturation(function, result)
        for name, function, result in recorder.seen
        if id(result) not in final and result.ndim > 1
    }


def _saturation(function: str, y: Tensor) -> Saturation:
    flat = (SLOPES[function](y.detach().float()) < FLAT).float()
    by_channel = flat.movedim(1, 0).flatten(1).mean(1)
    return Saturation(function, float(flat.mean()), float((by_channel > NEARLY_ALL).float().mean()))


def gradients(
    model: nn.Module, layers: Sequence[NormLayer], scalar: Callable[[], Tensor | None]
) -> tuple[WeightGradient, ...]:
    """The gradient of each linear layer and convolution, and of what it gets, in the order of the
    forward, batches normalized as in training. Empty where the model cannot be differentiated.
    """
    weights: dict[str, nn.Parameter] = {}
    inputs: dict[str, tuple[Tensor, float]] = {}  # with their norms: they may be written into

    def note(name: str, module: Any, args: Any) -> None:
        if name in weights or not isinstance(module.weight, nn.Parameter):
            return
        if module.weight.requires_grad:
            weights[name] = module.weight
            if args and isinstance(args[0], Tensor) and args[0].requires_grad:
                inputs[name] = (args[0], float(args[0].detach().double().norm()))

    with ExitStack() as hooks, observed(layers, training=True), torch.enable_grad():
        for name, module in model.named_modules():
            if is_host(module):
                handle = module.register_forward_pre_hook(partial(note, name))
                hooks.callback(handle.remove)
        try:
            value = scalar()
            if value is None or not weights:
                return ()
            wanted = [*weights.values(), *(x for x, _ in inputs.values())]
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        except RuntimeError:  # not every forward can be differentiated
            return ()
    of_inputs = {
        name: float(grad.double().norm()) * size
        for (name, (_, size)), grad in zip(inputs.items(), found[len(weights) :], strict=True)
        if grad is not None and bool(grad.isfinite().all())
    }
    return tuple(
        WeightGradient(
            name, float(grad.double().norm() * weight.detach().double().norm()), of_inputs.get(name)
        )
        for (name, weight), grad in zip(weights.items(), found[: len(weights)], strict=True)
        if grad is not None and bool(grad.isfinite().all())
    )
