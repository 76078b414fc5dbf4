"""How the graph of calls uses each batch norm, by tracing the model or by running it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
from torch import Tensor, nn

from steadynorm.doctor.evidence.records import Neighbour
from steadynorm.models.bias import biases
from steadynorm.models.graph import Graph, Node, is_atom, trace
from steadynorm.models.layers import DROPOUTS, TRANSPOSED, channel_axis, is_host, recognize

CHECKPOINTING = (
    "torch.utils.checkpoint",
    "fairscale.nn.checkpoint",
    "deepspeed.runtime.activation_checkpointing",
)

FEATURES_LAST = ("native_layer_norm", "embedding", "addmm", "mm")
"""Operators whose results hold features on the last axis, as those of recurrent layers do."""
BY_ELEMENT = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "hardswish", "hardtanh", "add",
    "mul", "div", "native_dropout", "_to_copy",
)  # fmt: skip

Call = tuple[bool, int | None]
"""Of a batch norm: whether inside activation checkpointing, and how many samples."""


def graph_facts(
    model: nn.Module, norms: Iterable[nn.Module], example: Callable[[nn.Module], Any] | None = None
) -> tuple[dict[nn.Module, dict[str, Any]], tuple[str, ...]]:
    """For each batch norm the fields of `NormUsage` that the graph decides, and remarks on what
    could not be seen.

    `example`: calls the model on a batch; without it, `torch.fx` traces the model.
    """
    calls: dict[nn.Module, list[Call]] = {norm: [] for norm in norms}
    inference, problem = _traced(model, example, {}, training=False)
    training, problem_in_training = _traced(model, example, calls, training=True)
    remarks = tuple(dict.fromkeys(p for p in (problem, problem_in_training) if p))
    graph = training or inference
    if graph is None:
        return {norm: {} for norm in calls}, remarks
    names = dict(model.named_modules(remove_duplicate=False))
    found = {norm: _facts(norm, graph, names, ran) for norm, ran in calls.items()}
    if inference is not None and training is not None:
        for name, _, cancelling, needed in biases(model, [inference, training]):
            for norm in cancelling:
                if needed is None and norm in found:
                    found[norm]["redundant_bias"] = f"{name}.bias"
    return found, remarks


def _traced(
    model: nn.Module, example: Any, calls: dict[nn.Module, list[Call]], *, training: bool
) -> tuple[Graph | None, str]:
    """The graph, or why there is none."""
    with _recorded(calls):
        try:
            return trace(model, example, training=training, atom=_is_atom), ""
        except Exception as error:  # noqa: BLE001  whatever a model raises, the rest is judged
            if example is None:
                what = f"torch.fx cannot follow {type(model).__name__}; give batches to run it on."
                return None, f"The graph of calls is not known: {what}"
            mode = "training" if training else "inference"
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return None, f"The model cannot run in {mode} on the first batch: {lines[0]}"


def _is_atom(module: nn.Module) -> bool:
    return is_atom(module) or isinstance(module, (*DROPOUTS, nn.RNNBase))


def _facts(
    norm: nn.Module, graph: Graph, modules: dict[str, nn.Module], ran: list[Call]
) -> dict[str, Any]:
    calls = graph.calls(norm)
    sources = [source for call in calls if (source := call.origin()) is not None]
    hosts = {node.module for node in sources}
    host: Any = hosts.pop() if len(hosts) == 1 else None
    host = host if host is not None and is_host(host) and has_values(host.weight) else None
    bias = None if host is None else host.bias
    axes = {_channel_axis(call.inputs[0]) for call in calls if call.inputs}
    users = (user for call in calls for user, _ in call.ends(None))
    return {
        "calls": len(calls),
        "inputs": len({id(call.inputs[0]) for call in calls if call.inputs}),
        "before": tuple(dict.fromkeys(_neighbour(node, modules) for node in sources)),
        "after": tuple(dict.fromkeys(_neighbour(node, modules) for node in users)),
        "host_peak": None if host is None else _peak(host),
        "host_bias": None if bias is None else bias.detach().double().cpu().numpy(),
        "channel_axis": axes.pop() if len(axes) == 1 else None,
        "recomputed": any(inside for inside, _ in ran) if ran else None,
        "samples": min((n for _, n in ran if n is not None), default=None),
    }


def has_values(tensor: Any) -> bool:
    """Whether it is a tensor whose values can be read: neither lazy nor on the meta device."""
    return isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) and not tensor.is_meta


def _channel_axis(node: Node, depth: int = 50) -> int | None:
    """Where the channels of the layers that made these values lie in them; None if that is not
    known, or if the layers whose results were added up do not agree, as where axes are mixed in
    turn. `depth`: how many operators it looks back.
    """
    if node.shape is None or not depth:
        return None
    last = len(node.shape) - 1
    if node.module is not None and is_host(node.module):
        return channel_axis(node.module, last + 1)
    if node.module is not None and recognize(node.module) is not None:
        return 1
    if isinstance(node.module, nn.RNNBase) or _operator(node) in FEATURES_LAST:
        return last
    if node.axes is not None and node.inputs:
        before = _channel_axis(node.inputs[0], depth - 1)
        return None if before is None else node.axes.get(before)
    if _operator(node) == "cat":  # parameters, such as a class's token, lie as the others do
        same_rank = [s for s in node.inputs if s.shape and len(s.shape) == last + 1]
        axes = {_channel_axis(source, depth - 1) for source in same_rank} - {None}
    elif node.module or _operator(node) in BY_ELEMENT:
        same_shape = [source for source in node.inputs if source.shape == node.shape]
        axes = {_channel_axis(source, depth - 1) for source in same_shape}
    else:
        return None
    return axes.pop() if len(axes) == 1 else None


def _neighbour(node: Node, modules: dict[str, nn.Module]) -> Neighbour:
    module = node.module or (modules.get(node.name) if node.inputs else None)
    if module is None:
        return Neighbour("", _operator(node))
    parameters = list(module.parameters())
    trained = any(p.requires_grad for p in parameters) if parameters else None
    probability = float(module.p) if isinstance(module, DROPOUTS) else None
    norm = recognize(module)
    activated = norm is not None and norm.activation is not None
    return Neighbour(node.name, type(module).__name__, trained, probability, activated)


def _operator(node: Node) -> str:
    """A word for a call that is no layer's: `torch.fx` and the dispatcher each have their own."""
    if node.name == "output":
        return "output"
    if not node.inputs:
        return "input"
    return node.name.removeprefix("aten.").removesuffix("()").rstrip("_")


def _peak(host: Any) -> np.ndarray | None:
    """The largest weight of each output channel."""
    weight = host.weight.detach()
    if isinstance(host, TRANSPOSED):
        if host.groups != 1:
            return None
        weight = weight.transpose(0, 1)
    peak: np.ndarray = weight.flatten(1).abs().amax(1).double().cpu().numpy()
    return peak


@contextmanager
def _recorded(calls: dict[nn.Module, list[Call]]) -> Iterator[None]:
    """Hooks that note each call of the batch norms, while the block runs."""

    def note(into: list[Call], _: nn.Module, args: Any) -> None:
        has_samples = args and isinstance(args[0], Tensor) and args[0].ndim
        into.append((inside_checkpointing(), args[0].shape[0] if has_samples else None))

    with ExitStack() as hooks:
        for norm, into in calls.items():
            hooks.callback(norm.register_forward_pre_hook(partial(note, into)).remove)
        yield


def inside_checkpointing() -> bool:
    """Whether a function of an activation checkpointing library is on the stack.

    Their hooks on saved tensors and their switching off of gradients are not the same: a model may
    do either by itself.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(CHECKPOINTING):
            return True
        frame = frame.f_back
    return False
