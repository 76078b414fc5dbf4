"""How each batch norm stands among the calls of its model, seen by tracing or running it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.doctor.evidence import Neighbour
from steadynorm.models.surgery.bias import biases
from steadynorm.models.surgery.graph import Graph, Node, is_atom, trace
from steadynorm.models.surgery.layers import DROPOUTS, TRANSPOSED, is_host, recognize

CHECKPOINTING = (
    "torch.utils.checkpoint",
    "fairscale.nn.checkpoint",
    "deepspeed.runtime.activation_checkpointing",
)


@dataclass
class Standing:
    """Of one batch norm: the fields of `NormUsage` that the graph of calls decides."""

    calls: int | None = None
    inputs: int | None = None
    before: tuple[Neighbour, ...] | None = None
    after: tuple[Neighbour, ...] | None = None
    redundant_bias: str | None = None
    host_peak: np.ndarray | None = None
    recomputed: bool | None = None
    samples: int | None = None


@dataclass
class Ran:
    """What hooks saw of one batch norm while the model ran in training."""

    recomputed: list[bool] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)


def standings(
    model: nn.Module, norms: Iterable[nn.Module], example: Any = None
) -> tuple[dict[nn.Module, Standing], tuple[str, ...]]:
    """Each batch norm's standing, and remarks on what could not be seen.

    `example`: a function that calls the model on a batch; without, `torch.fx` traces it.
    """
    norms = list(norms)
    found = {norm: Standing() for norm in norms}
    inference, _, problem = _traced(model, norms, example, training=False)
    training, ran, problem_in_training = _traced(model, norms, example, training=True)
    remarks = tuple(dict.fromkeys(p for p in (problem, problem_in_training) if p))
    graph = training or inference
    if graph is None:
        return found, remarks
    names = dict(model.named_modules(remove_duplicate=False))
    for norm, standing in found.items():
        _stand(standing, norm, graph, names, ran[norm])
    if inference is not None and training is not None:
        for name, _, cancelling, needed in biases(model, [inference, training]):
            for norm in cancelling:
                if needed is None and norm in found:
                    found[norm].redundant_bias = f"{name}.bias"
    return found, remarks


def _traced(
    model: nn.Module, norms: list[nn.Module], example: Any, *, training: bool
) -> tuple[Graph | None, dict[nn.Module, Ran], str]:
    """The graph, what hooks saw, and why there is none."""
    with _watched(norms) as ran:
        try:
            return trace(model, example, training=training, atom=_is_atom), ran, ""
        except Exception as error:  # noqa: BLE001  whatever a model raises, the rest is judged
            if example is None:
                what = f"torch.fx cannot follow {type(model).__name__}; give batches to run it on."
                return None, ran, f"The graph of calls is not known: {what}"
            mode = "training" if training else "inference"
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return None, ran, f"The model cannot run in {mode} on the first batch: {lines[0]}"


def _is_atom(module: nn.Module) -> bool:
    return is_atom(module) or isinstance(module, DROPOUTS)


def _stand(
    standing: Standing,
    norm: nn.Module,
    graph: Graph,
    modules: dict[str, nn.Module],
    ran: Ran,
) -> None:
    calls = graph.calls(norm)
    sources = [call.origin() for call in calls]
    standing.calls = len(calls)
    standing.inputs = len({id(call.inputs[0]) for call in calls if call.inputs})
    standing.before = _distinct(_neighbour(node, modules) for node in sources if node is not None)
    standing.after = _distinct(
        _neighbour(user, modules) for call in calls for user, _ in call.ends(None)
    )
    hosts = {node.module for node in sources if node is not None}
    host = hosts.pop() if len(hosts) == 1 else None
    if host is not None and is_host(host):
        standing.host_peak = _peak(host)
    if ran.recomputed:
        standing.recomputed = any(ran.recomputed)
        standing.samples = min(ran.samples, default=None)


def _distinct(neighbours: Iterator[Neighbour]) -> tuple[Neighbour, ...]:
    return tuple(dict.fromkeys(neighbours))


def _neighbour(node: Node, modules: dict[str, nn.Module]) -> Neighbour:
    module = node.module or modules.get(node.name)
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
    found = re.search(r"(?:function|method) (\w+)", node.name)
    return found.group(1) if found else node.name.removeprefix("aten.").rstrip("_")


def _peak(host: Any) -> np.ndarray | None:
    """The largest weight that makes each output channel."""
    weight = host.weight.detach()
    if isinstance(host, TRANSPOSED):
        if host.groups != 1:
            return None
        weight = weight.transpose(0, 1)
    peak: np.ndarray = weight.flatten(1).abs().amax(1).to("cpu", torch.float64).numpy()
    return peak


@contextmanager
def _watched(norms: list[nn.Module]) -> Iterator[dict[nn.Module, Ran]]:
    """Hooks on batch norms that note each call, while the block runs."""
    ran = {norm: Ran() for norm in norms}

    def enter(module: nn.Module, args: Any) -> None:
        ran[module].recomputed.append(_inside_checkpointing())
        if args and isinstance(args[0], Tensor) and args[0].ndim:
            ran[module].samples.append(args[0].shape[0])

    handles = [norm.register_forward_pre_hook(enter) for norm in norms]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _inside_checkpointing() -> bool:
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
