"""Remove biases that a following batch norm cancels in training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from steadynorm.models.changes import Change, Changes
from steadynorm.models.equivalence import answers, compare, copied
from steadynorm.models.graph import Graph, trace
from steadynorm.models.layers import (
    SHARES_STATISTICS,
    channel_axis,
    channels,
    exact,
    is_host,
    named,
    recognize,
    require_module,
    require_no_replicas,
    require_values,
    shared_buffers,
    taken_for_granted,
    why_untouchable,
)
from steadynorm.statistics import Running, Steady

Model = TypeVar("Model", bound=nn.Module)


def drop_redundant_bias(
    model: Model, example_inputs: Any = None, *, inplace: bool = False
) -> tuple[Model, Changes]:
    """Removes the bias of every layer whose output goes only to batch norms.

    A batch norm subtracts the mean, and with it the bias b before it: in training the bias changes
    nothing and its gradient is zero. In inference it is subtracted by way of the running mean, so

        running_mean ← running_mean - b        b ← none

    leaves inference, training and the running statistics to come the same, with one parameter per
    channel less to store, update and decay.

    The graphs of calls in training and in inference must both agree
    (`steadynorm.models.graph`).
    Biases before a batch norm that are not redundant are left and named: those of layers whose
    output goes elsewhere too, those before frozen batch norms, which subtract a constant, and those
    under `Steady` and `Running`, which subtract the batch's mean only in part: there a part of the
    gradient reaches the bias.

    Arguments:
        model: in either mode, which stays.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, a batch that
            the model can train on. With them the model may be any Python code, and its answers in
            inference are compared with those from before. Without, `torch.fx` must follow it, and a
            `BatchNorm1d` beside `nn.Linear` is taken to act on (N, C).
        inplace: change the model given instead of a copy.

    Returns the model and the changes. An optimizer must be built, or rebuilt, after this.

    Raises ValueError where `torch.fx` cannot follow the model and there are no example inputs;
    RuntimeError if the answers changed.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> model, changes = drop_redundant_bias(model)
    >>> print(changes)
    what     where   before       after  why
    dropped  0.bias  8 values     none   1 subtracts it; its running mean moved along

    Neither torch, Keras nor flax offers this.
    """
    require_module(model, "drop_redundant_bias")
    require_no_replicas(model, "drop_redundant_bias")
    if example_inputs is not None:
        require_values(model, "drop_redundant_bias")
    expected = None if example_inputs is None else answers(model, example_inputs, training=False)
    model = model if inplace else copied(model, "drop_redundant_bias")
    graphs = [trace(model, example_inputs, training=training) for training in (False, True)]
    names = {id(module): name for name, module in named(model)}
    changes = Changes()
    for name, host, norms, reason in biases(model, graphs):
        size = f"{channels(host)[1]} values"
        if reason:
            changes.append(Change("left", f"{name}.bias", size, size, reason))
            continue
        for norm in norms:
            _subtract(norm, host)
        host.register_parameter("bias", None)
        by = ", ".join(names[id(norm)] for norm in norms)
        verb = (
            "subtract it; their running means"
            if len(norms) > 1
            else "subtracts it; its running mean"
        )
        why = f"{by} {verb} moved along" + taken_for_granted([host], graphs[0].calls(host))
        changes.append(Change("dropped", f"{name}.bias", size, "none", why))
    if expected is not None:
        got = answers(model, example_inputs, training=False)
        compare(expected, got, "drop_redundant_bias")
    return model, changes


def biases(
    model: nn.Module, graphs: list[Graph]
) -> Iterator[tuple[str, Any, list[nn.Module], str | None]]:
    """Every bias before batch norms: its layer's name, the layer, the norms, why it is needed.

    The last is None for a redundant one. `graphs`: the model's in inference and in training.
    """
    shared = shared_buffers(model)
    for name, host in named(model):
        if not is_host(host) or host.bias is None:
            continue
        if norms := _norms_after(host, graphs):
            needed = _why_needed(host, norms, graphs, model.training)
            if needed is None and any(
                id(getattr(norm, "running_mean", None)) in shared for norm in norms
            ):
                needed = SHARES_STATISTICS
            yield name, host, norms, needed


def _subtract(norm: Any, host: Any) -> None:
    mean = norm.running_mean
    if mean is not None:
        with torch.no_grad():
            mean.copy_(exact(mean) - exact(host.bias))


def _norms_after(host: nn.Module, graphs: list[Graph]) -> list[nn.Module]:
    """Every batch norm that takes the layer's output in either graph."""
    ends = (
        user.module
        for graph in graphs
        for call in graph.calls(host)
        for user, _ in call.ends(None)
        if user.module is not None and recognize(user.module) is not None
    )
    return list(dict.fromkeys(ends))


def _why_needed(
    host: nn.Module, norms: list[nn.Module], graphs: list[Graph], training: bool
) -> str | None:
    """Why a bias before batch norms is not redundant."""
    for norm in norms:
        made = recognize(norm)
        assert made is not None
        if made.kind == "other":
            return f"{type(norm).__name__} has its own forward"
        if made.frozen or (training and not norm.training):
            return "the batch norm after it is frozen, and subtracts a constant"
        policy = getattr(norm, "statistics", None)
        if isinstance(policy, Steady | Running):
            return f"{policy!r} subtracts the batch's mean only in part, so the bias is trained"
        if channels(norm)[1] not in (0, channels(host)[1]):
            return "the batch norm after it has another number of channels"
    for module in (host, *norms):
        if reason := why_untouchable(module):
            return reason
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    for graph in graphs:
        if any(id(parameter) in graph.touched for parameter in host.parameters()):
            return "it is also read outside its layer"
        if any(id(buffer) in graph.touched for buffer in statistics):
            return "the running mean after it is also read outside it"
        for call in graph.calls(host):
            axis = None if call.shape is None else channel_axis(host, len(call.shape))
            users = list(call.ends(axis))
            for user, place in users:
                if user.module not in norms or user.origin() is not call:
                    return f"the output also goes to {user.name}"
                if [u for u, _ in users].count(user) > 1:
                    return f"{user.name} takes the output twice, as input and as residual"
                if place not in (None, 1):
                    return "the batch norm after it acts on another axis than its channels"
        for norm in norms:
            for call in graph.calls(norm):
                source = call.origin()
                if source is None or source.module is not host:
                    return "the batch norm after it is also called on something else"
    return None
