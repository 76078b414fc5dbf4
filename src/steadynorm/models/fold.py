"""Merge batch norms in inference into the layers beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from steadynorm.models.changes import Change, Changes
from steadynorm.models.equivalence import answers, compare, copied
from steadynorm.models.graph import Graph, Node, trace
from steadynorm.models.layers import (
    CONVOLUTIONS,
    TRANSPOSED,
    channel_axis,
    channels,
    describe,
    is_host,
    kept_elsewhere,
    meets_channels,
    named,
    recognize,
    replace,
    require_module,
    require_no_replicas,
    require_values,
    taken_for_granted,
    why_untouchable,
)
from steadynorm.models.probe import behaves
from steadynorm.models.weights import pads, scale_input, scale_output

Model = TypeVar("Model", bound=nn.Module)
Rewrite = Callable[[nn.Module, Tensor, Tensor], None]


def fold(
    model: Model, example_inputs: Any = None, *, inplace: bool = False
) -> tuple[Model, Changes]:
    """Merges every batch norm it safely can into a neighbour, for inference.

    In inference a batch norm is `y = scale·x + shift` per channel, so it can live in the weight and
    bias of a linear layer or convolution (plain, transposed, grouped, depthwise, dilated):

        before it:   W' = scale·W        b' = scale·b + shift
        after it:    W' = W·scale        b' = b + W·shift

    or in a batch norm before it. Computed in float64, stored in the weight's type and memory
    format. A batch norm's place is taken by `nn.Identity`, or by the activation it had inside.

    The graph of calls decides, not the order of names
    (see `steadynorm.models.graph`). Folded is
    only what provably gives the same: the output of the layer before goes to this batch norm alone;
    a convolution after it must not pad with zeros. Everything else is left and named in the
    changes, with the reason. Layers that were put in training mode, such as a dropout that samples
    in inference, are followed in that mode.

    Arguments:
        model: in inference (`model.eval()`).
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With them
            the model may be any Python code, shapes are checked, and both models are run on them
            and compared. Without them `torch.fx` must be able to follow the model, inputs are taken
            to have a batch axis, and a `BatchNorm1d` beside `nn.Linear` to act on (N, C).
        inplace: change the model given instead of a copy.

    Returns the folded model and the changes. The model given is left as it was unless `inplace`.
    A folded Hugging Face model refuses `save_pretrained`, whose files load into batch norms.

    Raises ValueError for a model in training, or one that `torch.fx` cannot follow without example
    inputs; RuntimeError if the folded model answers otherwise than the one given.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> folded, changes = fold(model)
    >>> print(changes)
    what    where  before          after     why
    folded  1      BatchNorm2d(8)  Identity  into 0
    >>> folded[1]
    Identity()

    `torch.nn.utils.fusion` folds one given pair, fails on grouped transposed convolutions and on
    `affine=False` after a linear layer, and does not ask where else a tensor goes.
    """
    require_module(model, "fold")
    require_no_replicas(model, "fold")
    if example_inputs is not None:
        require_values(model, "fold")
    if model.training:
        raise ValueError(
            "fold: `model` must be in inference, since a batch norm in training normalizes with "
            "the batch and cannot be folded; got a model in training. Call model.eval() first."
        )
    expected = None if example_inputs is None else answers(model, example_inputs, training=None)
    folded = model if inplace else copied(model, "fold")
    surgery = _Folding(folded, trace(folded, example_inputs, training=None))
    folded, changes = surgery.run()
    if expected is not None:
        compare(expected, answers(folded, example_inputs, training=None), "fold")
    if changes.tally().get("folded"):
        for part in folded.modules():
            if hasattr(part, "save_pretrained"):
                part.save_pretrained = _refuse_to_save
    return folded, changes


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of a folded model's `save_pretrained`: its file would load into batch norms."""
    raise RuntimeError(
        "save_pretrained: the batch norms of this model are folded, and from_pretrained would put "
        "new ones, with statistics 0 and 1, behind the folded weights. Save the model before "
        "sn.fold and fold it again after loading, or save model.state_dict() and load that into "
        "sn.fold(model)[0]."
    )


class _Folding:
    """One run of `fold` over one model and its graph."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model = model
        self.graph = graph
        self.names = {id(module): name for name, module in named(model)}
        self.kept = kept_elsewhere(model)

    def run(self) -> tuple[Any, Changes]:
        order = [module for _, module in named(self.model) if recognize(module) is not None]
        done: dict[nn.Module, Change] = {}
        for plan, rewrite in ((self.before, scale_output), (self.after, scale_input)):
            progress = True
            while progress:  # one batch norm gone may free its neighbour
                progress = False
                for module in order:
                    if module in done or isinstance(hosts := plan(module), str):
                        continue
                    done[module] = self.merge(module, hosts, rewrite)
                    progress = True
        for module in order:
            if module not in done:
                reasons = dict.fromkeys(str(plan(module)) for plan in (self.before, self.after))
                title = describe(module)
                done[module] = Change("left", self.name(module), title, title, "; ".join(reasons))
        return self.model, Changes(done[module] for module in order)

    def name(self, module: nn.Module) -> str:
        return self.names[id(module)]

    def merge(self, module: nn.Module, hosts: list[nn.Module], rewrite: Rewrite) -> Change:
        norm = recognize(module)
        assert norm is not None
        for host in hosts:
            rewrite(host, *norm.in_inference())
        after = (nn.Identity() if norm.activation is None else norm.activation).eval()
        calls = self.graph.calls(module)
        for call_ in calls:
            if norm.activation is None:
                self.graph.bypass(call_)
            else:
                call_.module = None
        self.model = replace(self.model, module, after)
        into = "into " + ", ".join(map(self.name, hosts)) + taken_for_granted(hosts, calls)
        return Change("folded", self.name(module), describe(module), type(after).__name__, into)

    def before(self, module: nn.Module) -> list[nn.Module] | str:
        """The layers before a batch norm that can take it, or why they cannot."""
        if reason := self.why_not(module):
            return reason
        hosts: dict[nn.Module, None] = {}
        for call_ in self.graph.calls(module):
            source = call_.origin()
            if source is None or source.module is None:
                made_by = "outside the model" if source is None else source.name
                return f"its input comes from {made_by}, not from a linear layer or convolution"
            hosts[source.module] = None
        for host in hosts:
            if reason := self.why_not_into(host, module) or _lost_in_half(
                host, module, scale_output
            ):
                return f"{self.name(host)} before it cannot take it: {reason}"
        return list(hosts)

    def after(self, module: nn.Module) -> list[nn.Module] | str:
        """The layers after a batch norm that can take it, or why they cannot."""
        if reason := self.why_not(module):
            return reason
        norm = recognize(module)
        assert norm is not None
        if norm.activation is not None:
            return "it applies an activation, so nothing after it can take it"
        hosts: dict[nn.Module, None] = {}
        order = {node: at for at, node in enumerate(self.graph.nodes)}
        for call_ in self.graph.calls(module):
            for user, axis in call_.ends(None if call_.shape is None else 1):
                if user.module is None or not is_host(user.module):
                    return f"its output goes to {user.name}, not to a linear layer or convolution"
                host = user.module
                reason = self.why_not_from(host, module, user, axis)
                if reason := reason or _lost_in_half(host, module, scale_input):
                    return f"{self.name(host)} after it cannot take it: {reason}"
                hosts[host] = None
                # Its input itself would go to that layer, with what was written into it meanwhile.
                between = self.graph.nodes[order[call_] + 1 : order[user]]
                if writer := next((node for node in between if node.writes), None):
                    return f"{writer.name}, called before {self.name(host)}, works in place"
        return list(hosts) or "nothing uses its output"

    def why_not(self, module: nn.Module) -> str | None:
        """Why a batch norm cannot be folded whatever stands beside it."""
        norm = recognize(module)
        assert norm is not None
        if reason := why_untouchable(module):
            return reason
        if norm.running_mean is None:
            return "it keeps no running statistics, and so normalizes with the batch in inference"
        if module.training and not norm.frozen:
            return "it is in training"
        if norm.kind == "other" and not behaves(module, norm):
            return f"{type(module).__name__} has its own forward, and it is not a batch norm's"
        if module in self.kept:
            return "an attribute of the model holds it too, in a list or the like"
        if any(id(t) in self.graph.touched for t in (*module.parameters(), *module.buffers())):
            return "its weights or statistics are also read outside it"
        calls = self.graph.calls(module)
        if not calls:
            return "it is not called"
        if not all(call_.plain for call_ in calls):
            return "it is called with more than its input (a residual or a mask)"
        return None

    def why_not_into(self, host: nn.Module, norm: nn.Module) -> str | None:
        """Why a layer cannot take the batch norm after it."""
        if not is_host(host):
            made = recognize(host)
            if made is None or made.activation is not None or self.why_not(host):
                return "it is no linear layer, convolution or plain batch norm"
        if reason := why_untouchable(host) or self.why_shared(host):
            return reason
        for call_ in self.graph.calls(host):
            axis = None if call_.shape is None else 1
            if is_host(host) and call_.shape is not None:
                axis = channel_axis(host, len(call_.shape))
            for user, place in call_.ends(axis):
                if user.module is not norm:
                    return f"its output also goes to {user.name}"
                unmet = place is None and is_host(host) and not meets_channels(host, norm)
                if unmet or place not in (None, 1):
                    return "the batch norm acts on another axis than its channels"
        if channels(host)[1] != channels(norm)[1]:
            return f"it has {channels(host)[1]} channels, the batch norm {channels(norm)[1]}"
        return None

    def why_not_from(
        self, host: nn.Module, norm: nn.Module, user: Node, axis: int | None
    ) -> str | None:
        """Why a layer cannot take the batch norm before it."""
        if reason := why_untouchable(host) or self.why_shared(host):
            return reason
        if isinstance(host, TRANSPOSED):
            return "a transposed convolution adds up a different number of values at the borders"
        if isinstance(host, CONVOLUTIONS) and host.padding_mode == "zeros" and pads(host):
            return "it pads with zeros, which the batch norm would have shifted"
        if any(call_.origin() is None or call_.origin().module is not norm  # type: ignore[union-attr]
               for call_ in self.graph.calls(host)):  # fmt: skip
            return "it is also called on something else"
        if channels(host)[0] != channels(norm)[0]:
            return f"it takes {channels(host)[0]} channels, the batch norm has {channels(norm)[0]}"
        shape = user.inputs[0].shape
        if axis is None and not meets_channels(host, norm):
            return "the batch norm acts on another axis than its channels"
        if axis is not None and shape is not None and axis != channel_axis(host, len(shape)):
            return "the batch norm acts on another axis than its channels"
        return None

    def why_shared(self, host: nn.Module) -> str | None:
        """Why changing a layer's weights would be felt elsewhere."""
        if any(id(parameter) in self.graph.touched for parameter in host.parameters()):
            return "its weights are also read outside it"
        return None


def _lost_in_half(host: nn.Module, norm: nn.Module, rewrite: Rewrite) -> str | None:
    """Why a layer in half precision cannot take a batch norm: float16 ends too early."""
    if all(parameter.dtype is not torch.float16 for parameter in host.parameters()):
        return None
    layers: list[Any] = [copy.deepcopy(host), copy.deepcopy(host).double()]
    for layer in layers:
        rewrite(layer, *recognize(norm).in_inference())  # type: ignore[union-attr]
    if not all(parameter.isfinite().all() for parameter in layers[0].parameters()):
        return "float16 cannot hold the weights that it would get"
    weights = [layer.weight.double() for layer in layers]
    if isinstance(host, TRANSPOSED):
        weights = [weight.transpose(0, 1) for weight in weights]
    rounded, expected = (weight.reshape(len(weight), -1) for weight in weights)
    off = (rounded - expected).norm(dim=1)
    if (off > 2**-9 * expected.norm(dim=1)).any():  # rounding alone: 2**-11
        return "float16 cannot tell the weights that it would get from zero"
    return None
