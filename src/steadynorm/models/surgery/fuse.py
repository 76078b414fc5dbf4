"""Move the activation and the residual after a batch norm into it.

Block by block, the innermost first, `torch.fx` traces a block's forward in training and in
inference. A batch norm whose output goes nowhere but into an activation, or into a sum and then an
activation, takes them in. What stood there goes in one of two ways:

- an activation module that serves only batch norms is replaced by `Fused`, an identity that
  remembers it: no code changes;
- otherwise (a function, a shared module, a residual) the block's forward is generated anew from
  its traced graph. The block keeps its object, attributes, `state_dict` keys, and gets a subclass
  of its class. A forward that differs between training and inference, has hooks on what it would
  call directly, or belongs to `nn.Sequential`, is left alone. Python values it reads (flags, sizes)
  are then those of the moment of conversion.

As everywhere in PyTorch, a block's own layers are taken to be called by that block.

Where `torch.fx` cannot follow a block and example inputs are given, the model is run on them once
in training and once in inference, and the first way is taken where an activation module was seen to
serve only batch norms. That shows the path these inputs take, as the change says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.models.surgery.changes import Change, Changes
from steadynorm.models.surgery.graph import (
    AtomTracer,
    Node,
    is_atom,
    trace,
)
from steadynorm.models.surgery.layers import activation_name, named, replace
from steadynorm.models.surgery.patterns import Found, Open, Pattern, Refused, find
from steadynorm.models.untouched import set_training, untouched
from steadynorm.nn.batchnorm import SteadyNorm

INSIDE = "fused_by_convert"
# What a run shows of sums and of activations that are functions.
OPERATORS = frozenset(f"{n}{e}" for n in ("add", "hardtanh", *ACTIVATIONS) for e in ("", "_"))


class Fused(nn.Identity):
    """Stands where an activation stood that runs inside the batch norm before it now."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # no submodule: nothing of it is in use

    def extra_repr(self) -> str:
        return f"{self.__dict__['original']}, inside the batch norm before it"


class Rewritten:
    """Mixin of blocks whose forward was generated; `rewritten_from` is the block's own class.

    Pickled by its own class and the names of its batch norms; unpickling generates it again.
    """

    rewritten_from: type[nn.Module]
    rewritten_norms: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.rewritten_from, dict(vars(self)), self.rewritten_norms)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def _rebuild(kind: type[nn.Module], state: dict[str, Any], norms: tuple[str, ...]) -> nn.Module:
    block = kind.__new__(kind)
    vars(block).update(state)
    rewrite(block, norms)
    return block


def fuse(model: nn.Module, changes: Changes, example_inputs: Any = None) -> nn.Module:
    """Fuses what it can; adds what it did, and what it left, to the changes."""
    fusing = _Fusing(model)
    blocks = [pair for pair in named(model) if not is_atom(pair[1])]
    for _, block in reversed(blocks):  # parents come first in `named`
        if not isinstance(block, nn.ModuleList | nn.ModuleDict):
            fusing.visit(block)
    if example_inputs is not None and any(fusing.open.values()):
        fusing.by_running(example_inputs)
    changes.extend(fusing.changes())
    return model


def unfuse(model: nn.Module, changes: Changes) -> nn.Module:
    """Undoes `fuse`: the blocks' own classes, the activations where they stood."""
    for module in list(model.modules()):
        if isinstance(module, Rewritten):
            module.__class__ = module.rewritten_from  # type: ignore[assignment]
        elif isinstance(module, Fused):
            model = replace(model, module, module.__dict__["original"])
    for name, module in named(model):
        if isinstance(module, SteadyNorm) and hasattr(module, INSIDE):
            what = getattr(module, INSIDE)
            module.activation = None
            delattr(module, INSIDE)
            changes.append(Change("unfused", name, "inside it", f"{what} after it"))
    return model


class _Fusing:
    """One run of `fuse`: which batch norms are still open, and what was done or not, and why."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in named(model)}
        self.paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths.setdefault(module, []).append(path)
        self.open: dict[nn.Module, str | None] = {
            module: None
            for module in self.names
            if isinstance(module, SteadyNorm) and module.activation is None
        }
        self.done: dict[nn.Module, Change] = {}

    def changes(self) -> list[Change]:
        for norm, reason in list(self.open.items()):
            if reason is not None:
                self.leave(norm, "what follows it", reason)
        return [self.done[module] for module in self.names if module in self.done]

    def leave(self, norm: nn.Module, what: str, why: str) -> None:
        self.open.pop(norm)
        self.done[norm] = Change("left", self.names[norm], what, what, why)

    def take_in(self, norm: nn.Module, pattern: Pattern, why: str) -> None:
        parts = ["residual"] if pattern.add is not None else []
        what = " and ".join([*parts, *filter(None, [pattern.activation])])
        self.close(norm, pattern.activation, what, why)

    def close(self, norm: nn.Module, activation: str | None, what: str, why: str) -> None:
        self.open.pop(norm)
        norm.activation = activation  # type: ignore[assignment]
        setattr(norm, INSIDE, what)
        self.done[norm] = Change("fused", self.names[norm], f"{what} after it", "inside it", why)

    def visit(self, block: nn.Module) -> None:
        """Fuses what the forward of one block shows."""
        norms = [module for module in block.modules() if module in self.open]
        if not norms:
            return
        try:
            graphs = trace_both(block, is_atom)
        except Exception as error:  # noqa: BLE001 - whatever a model's forward raises on symbolic values
            reason = str(error).split("\n")[0] or type(error).__name__
            reason = f"torch.fx cannot follow {type(block).__name__} ({reason.split('. ')[0]})"
            for norm in norms:
                self.open[norm] = self.open[norm] or reason
            return
        modules = dict(block.named_modules(remove_duplicate=False))
        patterns: dict[nn.Module, list[Pattern]] = {}
        taken: set[fx.Node] = set()
        for norm in sorted(norms, key=lambda norm: _last_call(graphs[0], norm, modules)):
            found = [find(call, modules) for g in graphs for call in _calls(g, {norm}, modules)]
            sums = {one.add for one in found if isinstance(one, Pattern) and one.add is not None}
            if taken & sums:
                self.open.pop(norm)  # two batch norms meet in this sum, and the other has taken it
                continue
            agreed = self.settle(norm, found)
            if agreed and self.contains(block, norm):
                patterns[norm] = agreed
                taken |= sums
        self.by_module(block, graphs, patterns, modules)
        if patterns and type(block).forward is not nn.Sequential.forward:
            self.by_rewriting(block, patterns)

    def contains(self, block: nn.Module, module: nn.Module) -> bool:
        """Whether a module stands in this block and nowhere else."""
        prefixes = tuple(f"{path}." if path else "" for path in self.paths[block])
        return all(path.startswith(prefixes) for path in self.paths[module])

    def settle(self, norm: nn.Module, found: list[Found]) -> list[Pattern]:
        """The patterns at all calls of a batch norm, if they agree; else closes its case."""
        if not found or all(isinstance(one, Open) for one in found):
            return []
        patterns = [one for one in found if isinstance(one, Pattern)]
        kinds = {(one.activation, one.add is None) for one in patterns}
        if len(patterns) < len(found) or len(kinds) > 1:
            refused = next((one for one in found if isinstance(one, Refused)), None)
            if refused is not None:
                self.leave(norm, *refused)
            elif patterns:
                self.leave(norm, "what follows it", "different things follow its calls")
            else:
                self.open.pop(norm)  # nothing follows that could move
            return []
        if norm._forward_hooks or norm._forward_pre_hooks:
            self.leave(norm, "what follows it", "it has forward hooks, which would see it")
            return []
        return patterns

    def by_module(
        self,
        block: nn.Module,
        graphs: list[fx.Graph],
        patterns: dict[nn.Module, list[Pattern]],
        modules: dict[str, nn.Module],
    ) -> None:
        """Takes in activation modules that serve nothing but these batch norms."""
        served: dict[nn.Module, list[nn.Module]] = {}
        for norm, found in patterns.items():
            module = found[0].module
            if module is not None and all(p.module is module and p.add is None for p in found):
                served.setdefault(module, []).append(norm)
        for module, norms in served.items():
            ends = {pattern.gone[-1] for norm in norms for pattern in patterns[norm]}
            calls = {call for graph in graphs for call in _calls(graph, {module}, modules)}
            if calls != ends or not self.contains(block, module):
                continue
            replace(self.model, module, Fused(module))
            for norm in norms:
                where = f"{self.names[module]} is an identity now"
                self.take_in(norm, patterns.pop(norm)[0], where)

    def by_running(self, example_inputs: Any) -> None:
        """Takes in activation modules that a run shows to serve nothing but batch norms."""
        try:
            graphs = [
                trace(self.model, example_inputs, training=training, atom=_layer_or_activation)
                for training in (True, False)
            ]
        except Exception as error:  # noqa: BLE001 - whatever the model's forward raises
            trouble = f"and it cannot be run in training ({str(error).splitlines()[0]})"
            for norm, earlier in self.open.items():
                self.open[norm] = earlier and f"{earlier}, {trouble}"
            return
        followed: dict[nn.Module, list[nn.Module]] = {}
        for norm, reason in list(self.open.items()):
            calls = [call for graph in graphs for call in graph.calls(norm)]
            if reason is None or not calls or norm._forward_hooks or norm._forward_pre_hooks:
                continue
            after = {_alone_after(call) for call in calls}
            if len(after) == 1 and (module := after.pop()) is not None:
                followed.setdefault(module, []).append(norm)
            elif not any(_might_move(user) for call in calls for user in call.users):
                self.open.pop(norm)  # nothing follows that could move
        for module, norms in followed.items():
            served = {call.inputs[0].module for graph in graphs for call in graph.calls(module)}
            if served != set(norms):
                continue
            replace(self.model, module, Fused(module))
            why = f"{self.names[module]} is an identity now, by a run on the example inputs"
            for norm in norms:
                self.close(norm, activation_name(module), str(activation_name(module)), why)

    def by_rewriting(self, block: nn.Module, patterns: dict[nn.Module, list[Pattern]]) -> None:
        """Takes in the rest by a new forward for the block."""
        name = self.names[block]
        names = tuple(n for n, module in block.named_modules() if module in patterns)
        reason = rewrite(block, names)
        for norm, found in patterns.items():
            if reason is None:
                self.take_in(norm, found[0], f"{name} has a generated forward")
            else:
                parts = ["residual"] if found[0].add is not None else []
                what = " and ".join([*parts, *filter(None, [found[0].activation])])
                self.leave(norm, f"{what} after it", f"{name} cannot be rewritten: {reason}")


def _layer_or_activation(module: nn.Module) -> bool:
    return is_atom(module) or activation_name(module) is not None


def _alone_after(call: Node) -> nn.Module | None:
    """The activation module that a batch norm's result goes to, if it goes nowhere else."""
    if len(call.users) != 1:
        return None
    (user,) = call.users
    module = user.module
    if module is None or not user.plain or activation_name(module) is None or _hooked(module):
        return None
    return module


def _might_move(user: Node) -> bool:
    """Whether what uses a batch norm's result looks like something that belongs inside it."""
    name = activation_name(user.module) if user.module is not None else user.name
    return name is not None and (user.module is not None or name.split(".")[-1] in OPERATORS)


def rewrite(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """Gives a block a forward in which the batch norms named take in what follows them.

    Returns why it cannot be, None if it was.
    """
    modules = dict(block.named_modules(remove_duplicate=False))
    norms = {modules[name] for name in names}

    if "forward" in vars(block):
        return "its forward was replaced on the object"
    # As little as possible is written out: only what holds a part of a pattern.
    written_out = {
        modules[path]
        for graph in trace_both(block, is_atom)
        for call in _calls(graph, norms, modules)
        if isinstance(pattern := find(call, modules), Pattern)
        for node in (call, *pattern.gone)
        for path in _path_to(node)
    }
    for module in written_out:
        if module is not block and _hooked(module):
            return f"{type(module).__name__} inside it has hooks, which would not run"
    graphs = trace_both(block, lambda module: module not in written_out)
    forwards = [_fused_forward(block, graph, norms, modules) for graph in graphs]
    if forwards[0].code != forwards[1].code:
        return "its forward differs between training and inference"
    kind = block.rewritten_from if isinstance(block, Rewritten) else type(block)
    earlier = block.rewritten_norms if isinstance(block, Rewritten) else ()
    content = {
        "forward": type(forwards[0]).forward,
        "rewritten_from": kind,
        "rewritten_norms": (*earlier, *names),
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
    }
    block.__class__ = type(kind.__name__, (Rewritten, kind), content)
    return None


def trace_both(block: nn.Module, leaf: Callable[[nn.Module], bool]) -> list[fx.Graph]:
    """The block's graphs in training and in inference."""
    graphs = []
    with untouched(block):
        for training in (True, False):
            set_training(block, training)
            graphs.append(AtomTracer(leaf).trace(block))
    return graphs


def _fused_forward(
    block: nn.Module, graph: fx.Graph, norms: set[nn.Module], modules: dict[str, nn.Module]
) -> fx.GraphModule:
    for call in _calls(graph, norms, modules):
        pattern = find(call, modules)
        assert isinstance(pattern, Pattern), f"{call} lost what followed it"
        fused = call
        if pattern.add is not None and pattern.other is not None:
            with graph.inserting_before(pattern.add):
                # A sum broadcasts; the layer wants the residual in its input's shape.
                residual = graph.call_method("expand_as", (pattern.other, call.args[0]))
                fused = graph.call_module(str(call.target), call.args, {"residual": residual})
        pattern.gone[-1].replace_all_uses_with(fused)
        for node in reversed(pattern.gone):
            graph.erase_node(node)
        if fused is not call:
            graph.erase_node(call)
    graph.lint()
    return fx.GraphModule(block, graph, type(block).__name__)


def _calls(graph: fx.Graph, wanted: set[nn.Module], modules: dict[str, nn.Module]) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_module" and modules[str(n.target)] in wanted]


def _path_to(node: fx.Node) -> list[str]:
    """The modules in whose forwards a call stands, by name; not the layer called."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return [path for path in stack if node.op != "call_module" or path != node.target]


def _last_call(graph: fx.Graph, module: nn.Module, modules: dict[str, nn.Module]) -> int:
    """For sorting by the last call, the latest first: there, a residual is ready already."""
    calls = set(_calls(graph, {module}, modules))
    return -max((place for place, node in enumerate(graph.nodes) if node in calls), default=-1)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
