"""What follows a batch norm in a traced graph: a residual added, an activation, or neither."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.models.surgery.layers import DROPOUTS, activation_name, is_host, recognize

# Functions and methods that are an activation, with the keywords that leave it the same.
FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in ACTIVATIONS},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_), "relu"),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_), "sigmoid"),
    **dict.fromkeys((torch.tanh, torch.tanh_), "tanh"),
}
METHODS = {name + end: name for name in ("relu", "sigmoid", "tanh") for end in ("", "_")}
ADDS = (operator.add, torch.add)
ADDS_IN_PLACE = (operator.iadd,)
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul)


class Pattern(NamedTuple):
    """A batch norm's call and what can move into it.

    `gone`: the calls after it that this replaces, in order. `other`: the residual, if any, and
    `add`, where it is added. `activation`: its name; `module`: its module, where it is one.
    """

    call: fx.Node
    gone: list[fx.Node]
    add: fx.Node | None
    other: fx.Node | None
    activation: str | None
    module: nn.Module | None


class Open(NamedTuple):
    """The batch norm's output leaves the graph, so what follows is for an outer one to see."""


class Refused(NamedTuple):
    """Something follows that looks as if it could move into the batch norm, but cannot."""

    what: str
    why: str


Found = Pattern | Open | Refused | None


def find(call: fx.Node, modules: dict[str, nn.Module]) -> Found:
    """What follows one call of a batch norm."""
    if len(call.args) != 1 or call.kwargs:
        return None
    gone: list[fx.Node] = []
    user = _next(call, gone, modules)
    if user is None:
        return _several(gone[-1] if gone else call, modules)
    add = other = None
    if _adds(user):
        add, other = user, _other(user, gone[-1] if gone else call)
        if other is None or not _may_wait(call, add, modules):
            return Refused("residual after it", "the sum cannot be moved safely")
        gone.append(user)
        user = _next(add, gone, modules)
    name, module = (None, None) if user is None else activation(user, modules)
    if name is not None and user is not None:
        gone.append(user)
        return Pattern(call, gone, add, other, name, module)
    if add is not None:
        return Pattern(call, gone, add, other, None, None)
    if user is not None and user.op == "output":
        return Open()
    if isinstance(module, nn.Module):
        return Refused(f"{module} after it", "it is not one of our activations")
    return None


def activation(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str | None, Any]:
    """An activation's name, and its module if it is one; the module alone if it is none of ours."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module).__module__ == "torch.nn.modules.activation":
            hooked = module._forward_hooks or module._forward_pre_hooks
            return (None if hooked else activation_name(module)), module
        return None, None
    if node.op == "call_function" and node.target in FUNCTIONS:
        extra = {k: v for k, v in node.kwargs.items() if k not in ("inplace", "input")}
        alone = len(node.all_input_nodes) == 1 and len(node.args) <= 1
        defaults = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
        same = all(defaults.get(key) == value for key, value in extra.items())
        return (FUNCTIONS[node.target] if alone and same else None), None
    if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        return METHODS.get(str(node.target)), None
    return None, None


def _next(node: fx.Node, gone: list[fx.Node], modules: dict[str, nn.Module]) -> fx.Node | None:
    """The only user of a call, behind identities, which are noted; None if there are several."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or not _hands_on(modules[str(user.target)]):
            return user
        gone.append(user)
        node = user
    return None


def _hands_on(module: nn.Module) -> bool:
    """An identity, or a dropout that never drops."""
    return isinstance(module, nn.Identity) or (isinstance(module, DROPOUTS) and module.p == 0)


def _several(node: fx.Node, modules: dict[str, nn.Module]) -> Refused | None:
    """Several users, or none: worth a word only if one of them is an activation."""
    for user in node.users:
        name, _ = activation(user, modules)
        if name is not None:
            others = ", ".join(str(u) for u in node.users if u is not user)
            return Refused(f"{name} after it", f"its output also goes to {others}")
    return None


def _adds(node: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 2:
        return False
    if node.op == "call_function":
        return node.target in (*ADDS, *ADDS_IN_PLACE)
    return node.op == "call_method" and node.target in ("add", "add_")


def _other(add: fx.Node, mine: fx.Node) -> fx.Node | None:
    """The other addend, None if it is no tensor, or written into while others hold it."""
    first, second = add.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None
    writes = add.target in ADDS_IN_PLACE or add.target == "add_"
    fresh = first.op == "call_module" or first.target in ARITHMETIC
    if second is mine and writes and not (fresh and len(first.users) == 1):
        return None
    return second if first is mine else first


def _may_wait(call: fx.Node, add: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the batch norm may run where the sum stands, its input still being the same.

    So it is if nobody else holds the input, fresh from a layer; or if only layers that write into
    nothing run in between.
    """
    source = call.args[0]
    assert isinstance(source, fx.Node)

    def is_layer(node: fx.Node) -> bool:
        if node.op != "call_module":
            return False
        module = modules[str(node.target)]
        return is_host(module) or recognize(module) is not None or type(module) is nn.Identity

    if is_layer(source) and len(source.users) == 1:
        return True
    node = call.next
    while node is not add:
        if not is_layer(node) and node.op != "get_attr":
            return False
        node = node.next
    return True
