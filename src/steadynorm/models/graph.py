"""Who hands a tensor to whom: the graph of calls that surgery decides by.

Two makers, one form. Without example inputs `torch.fx` traces the model: what it finds holds for
every input, and it knows no shapes. With example inputs the model is run once and every call is
recorded, down to single operators: that works for any Python code and knows the shapes, and it
shows the one path these inputs take.
"""

from __future__ import annotations

import copy
import operator
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from steadynorm.models.fuse import unfused
from steadynorm.models.layers import DROPOUTS, is_host, recognize, unwrapped
from steadynorm.models.observe import eagerly
from steadynorm.models.untouched import set_training, untouched
from steadynorm.nn.hooks import hooked


@dataclass(eq=False)
class Node:
    """One call of a layer (`module` given) or of an operator, and who uses what it returned."""

    name: str
    module: nn.Module | None = None
    inputs: list[Node] = field(default_factory=list)
    users: list[Node] = field(default_factory=list)
    plain: bool = True
    """A layer called with one tensor, the result of `inputs[0]`, and with nothing else."""
    shape: tuple[int, ...] | None = None
    """Of the result, where known."""
    axes: dict[int, int] | None = None
    """For an operator that only rearranges: where each axis of `inputs[0]` goes."""
    writes: bool = False
    """Whether it may write into a tensor that it is given."""

    def ends(self, axis: int | None) -> Iterator[tuple[Node, int | None]]:
        """Every true user behind operators that only rearrange, and where the axis has gone.

        An axis is None where shapes are not known, and -1 once it no longer exists by itself.
        """
        for user in self.users:
            if user.axes is None:
                yield user, axis
            else:
                yield from user.ends(None if axis is None else user.axes.get(axis, -1))

    def origin(self) -> Node | None:
        """The node whose values `inputs[0]` holds, looked for behind what only rearranges."""
        node = self.inputs[0] if self.inputs else None
        while node is not None and node.axes is not None:
            node = node.inputs[0]
        return node


@dataclass
class Graph:
    """The calls in order, and the ids of parameters that something besides their layer read."""

    nodes: list[Node]
    touched: set[int]

    def calls(self, module: nn.Module) -> list[Node]:
        return [node for node in self.nodes if node.module is module]

    def bypass(self, node: Node) -> None:
        """Takes out a call that is now an identity."""
        source = node.inputs[0]
        source.users.remove(node)
        for user in node.users:
            user.inputs = [source if given is node else given for given in user.inputs]
            source.users.append(user)
        self.nodes.remove(node)


def is_atom(module: nn.Module) -> bool:
    """Layers that surgery deals with; a graph never looks inside."""
    return is_host(module) or recognize(module) is not None


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    training: bool | None = False,
    atom: Callable[[nn.Module], bool] = is_atom,
) -> Graph:
    """The graph of `model` in inference, or in training; the model is left as it was.

    `example_inputs`: as `call` takes them. `training`: None leaves every module in its own mode.
    `atom`: what is one node, with its module; what is not is looked into.

    Raises ValueError where `torch.fx` cannot follow the model and no example inputs are given.
    """
    with untouched(model), unfused(model), torch.no_grad():
        set_training(model, training)
        model = unwrapped(model)  # DistributedDataParallel itself reads and writes the buffers
        if example_inputs is None:
            return _traced(model, atom)
        return _recorded(model, example_inputs, atom)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """Calls the model with a tensor, a tuple of positional or a dict of keyword arguments.

    Or hands it to a function that calls it.
    """
    return _called(model, _copied(example_inputs))


def _copied(example_inputs: Any) -> Any:
    """Example inputs that a model may write into."""
    return example_inputs if callable(example_inputs) else copy.deepcopy(example_inputs)


def _called(model: nn.Module, example_inputs: Any) -> Any:
    if callable(example_inputs):
        return example_inputs(model)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, tuple | list):
        return model(*example_inputs)
    return model(example_inputs)


def tensors(value: Any, depth: int = 6) -> Iterator[Tensor]:
    """Every tensor in a nest of sequences, mappings and plain objects."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item, depth - 1)
    elif depth and isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from tensors(item, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from tensors(vars(value), depth - 1)


# --- by torch.fx


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is; torch.fx alone would record `x + y` and lose the aliasing."""


def _in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
for _name in _IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


_TRACING = threading.Lock()  # torch.fx patches nn.Module for the whole process


class _Tracer(fx.Tracer):
    """Follows everything but torch's own layers, batch norms and what `atom` names."""

    def __init__(self, atom: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._atom = atom
        self._leaves: set[nn.Module] = set()
        self.touched: set[int] = set()
        self._thread = threading.get_ident()

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        # Asked beforehand: while tracing, a look at a parameter would itself be recorded.
        self._leaves = {m for m in root.modules() if is_atom(m) or self._atom(m)} - {root}
        with _TRACING:
            return super().trace(root, concrete_args)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or super().is_leaf_module(m, module_qualified_name)

    # Other threads run their models meanwhile, and come here by what torch.fx has patched.

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        self.touched.update(id(tensor) for tensor in tensors(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def _traced(model: nn.Module, atom: Callable[[nn.Module], bool]) -> Graph:
    if atom(model):
        start, end = Node("outside the model"), Node("output")
        only = Node("", model, [start], [end])
        start.users, end.inputs = [only], [only]
        return Graph([start, only, end], set())
    tracer = _Tracer(atom)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(
            f"torch.fx cannot follow {type(model).__name__} ({reason}). Give `example_inputs` "
            "(on the command line, --data), so that the model can be run and its calls recorded."
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    nodes: dict[fx.Node, Node] = {}
    touched = tracer.touched
    order: list[Node] = []
    for entry in graph.nodes:
        module = modules[str(entry.target)] if entry.op == "call_module" else None
        idle = isinstance(module, nn.Identity) or (
            isinstance(module, DROPOUTS) and not module.training
        )
        if module is not None and idle and not hooked(module):
            nodes[entry] = nodes[entry.args[0]]
            continue
        if entry.op == "get_attr":
            found = operator.attrgetter(str(entry.target))(model)
            touched.update(id(tensor) for tensor in tensors(found))
        node = Node(_named(entry), module if module and atom(module) else None)
        node.plain = len(entry.args) == 1 and not entry.kwargs
        node.writes = _may_write(entry, module)
        nodes[entry] = node
        order.append(node)
        if not _reads_only_metadata(entry):
            given: list[fx.Node] = []  # all_input_nodes would name one given twice only once
            fx.map_arg((entry.args, entry.kwargs), given.append)
            for source in given:
                node.inputs.append(nodes[source])
                nodes[source].users.append(node)
    return Graph(order, touched)


def _named(entry: fx.Node) -> str:
    """A module's path, an argument's name, or `add()`, which no module is called."""
    if entry.op not in ("call_function", "call_method"):
        return str(entry.target)
    return f"{getattr(entry.target, '__name__', entry.target)}()"


def _may_write(entry: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call works in place, by its name or by what it is told."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if entry.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(entry.target, "__name__", entry.target))
    flags = [entry.kwargs.get("inplace"), *entry.args]
    told = "out" in entry.kwargs or any(flag is True for flag in flags)
    return told or name.endswith("_") or name in _IN_PLACE


def _reads_only_metadata(entry: fx.Node) -> bool:
    if entry.op == "call_function" and entry.target is getattr:
        return entry.args[1] in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")
    return entry.op == "call_method" and entry.target in ("size", "dim", "numel", "stride")


# --- by running


class _Recorder(TorchDispatchMode):
    """Sees every operator outside the layers that surgery deals with."""

    def __init__(self, model: nn.Module, atom: Callable[[nn.Module], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.atom = atom
        self.names = {id(module): name for name, module in model.named_modules()}
        self.owned = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.touched: set[int] = set()
        self.nodes: list[Node] = []
        self.makers: Any = WeakIdKeyDictionary()
        self.made: list[tuple[Node, weakref.ref[Tensor]]] = []
        self.inside = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            given = list(tensors([args, kwargs or {}]))
            self.touched.update(id(tensor) for tensor in given if id(tensor) in self.owned)
            node = Node(str(func.overloadpacket), writes=func._schema.is_mutable)
            self.add(node, given, result)
            if len(given) == 1 and isinstance(result, Tensor):
                node.axes = _moved_axes(func, args, given[0].shape, result.shape)
        return result

    def add(self, node: Node, given: list[Tensor], result: Any) -> Node:
        for tensor in given:
            if tensor not in self.makers:  # came from outside the model
                self.makers[tensor] = Node("outside the model", shape=tuple(tensor.shape))
                self.nodes.append(self.makers[tensor])
            source = self.makers[tensor]
            node.inputs.append(source)
            source.users.append(node)
        for tensor in tensors(result):
            node.shape = tuple(tensor.shape)
            self.makers[tensor] = node
            self.made.append((node, weakref.ref(tensor)))
        self.nodes.append(node)
        return node

    def enter(self, module: nn.Module, args: Any) -> None:
        self.inside += self.atom(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if not self.atom(module):
            return
        self.inside -= 1
        if not self.inside and id(module) in self.names:
            given = list(tensors([args, kwargs]))
            plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            self.add(Node(self.names[id(module)], module, plain=plain), given, result)


def _recorded(model: nn.Module, example_inputs: Any, atom: Callable[[nn.Module], bool]) -> Graph:
    recorder = _Recorder(model, atom)
    hooks = [
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave, with_kwargs=True),
    ]
    given = _copied(example_inputs)  # before, or the copying itself would be recorded
    try:
        with eagerly(), warnings.catch_warnings(), recorder:
            # The hooks are meant to fire for what torch.compile made, too.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            result = _called(model, given)
    finally:
        for hook in hooks:
            hook.remove()
            # torch 2.13 forgets this table, and then warns at every compilation of global hooks.
            _global_forward_hooks_with_kwargs.pop(hook.id, None)
    # Whatever outlives the run is held by the caller or by the model, and so has one more user.
    output = Node("output")
    for node, reference in recorder.made:
        tensor = reference()
        if tensor is not None and recorder.makers[tensor] is node:
            node.users.append(output)
            output.inputs.append(node)
    del result
    return Graph([*recorder.nodes, output], recorder.touched)


_SAME = {"alias", "detach", "clone", "contiguous", "lift_fresh"}
_RESHAPES = {"view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "_reshape_alias", "flatten"}


def _moved_axes(
    func: Any, args: Any, old: Sequence[int], new: Sequence[int]
) -> dict[int, int] | None:
    """Where each axis goes in an operator that only rearranges, else None."""
    name = func.overloadpacket.__name__
    if name in _SAME:
        return {axis: axis for axis in range(len(old))}
    if name == "t" and len(old) == 2:
        return {0: 1, 1: 0}
    if name == "transpose":
        axes = list(range(len(old)))
        first, second = args[1], args[2]
        axes[first], axes[second] = axes[second], axes[first]
        return {old_axis: axis for axis, old_axis in enumerate(axes)}
    if name == "permute":
        return {old_axis % len(old): axis for axis, old_axis in enumerate(args[1])}
    if name in _RESHAPES:
        # An axis lives on where the same number of values lies before and inside it.
        places = {(prod(new[:axis]), size): axis for axis, size in enumerate(new) if size > 1}
        kept = {axis: places.get((prod(old[:axis]), size)) for axis, size in enumerate(old)}
        return {axis: place for axis, place in kept.items() if place is not None}
    return None
