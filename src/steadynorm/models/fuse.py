"""Run a batch norm, the sum and the activation after it in one call, where a block runs them all.

The layers stay what they are: a batch norm without an activation, an activation, each right by
itself. What changes is the block that calls them. It gets a subclass of its class that merges the
calls:

- `nn.Sequential`, and subclasses with its forward: where an activation stands after a batch norm;
- any other class: where the source of its forward shows that nothing but an activation or a sum
  uses a batch norm's result (`steadynorm.models.rewrite`); branches, flags, defaults and
  everything else of the source stay.

Each merged call is decided when it runs: if the batch norm is no longer ours (another tool has
replaced it), if it or the activation has hooks, or the residual another shape or type, they are
called one after the other, as before. So is everything where the model is traced by `torch.fx`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.kernels.compat import has_global_hooks
from steadynorm.models import rewrite
from steadynorm.models.changes import Change, Changes
from steadynorm.models.layers import ACTIVATIONS, DROPOUTS, activation_name, is_host, named
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.nn.hooks import hooked

FUNCTIONS: dict[Any, str] = {
    **{getattr(F, name): name for name in ACTIVATIONS},
    **dict.fromkeys((torch.relu, torch.relu_, F.relu_), "relu"),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_), "sigmoid"),
    **dict.fromkeys((torch.tanh, torch.tanh_), "tanh"),
}

WRAPPERS: dict[Any, str] = {}
"""Forwards of other people's activations that only call one of these, found when models are fused:
transformers' `SiLUActivation`."""


class Fused:
    """Mixin of blocks that merge calls; `fused_from` is the block's own class.

    Pickled by that class; unpickling fuses it again, if its source is still the same.
    """

    fused_from: type[nn.Module]
    fused_sites: frozenset[rewrite.Site]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.fused_from, self.fused_sites), vars(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script takes instead: the block as it was."""
        plain: Any = self.fused_from.__new__(self.fused_from)
        vars(plain).update(vars(self))
        return plain  # type: ignore[no-any-return]

    @staticmethod
    def _call_fused(
        norm: Any, activation: Any, x: Any, residual: Any = None, order: str = ""
    ) -> Any:
        """`activation(norm(x) + residual)`, in one call where the layers allow it.

        `norm` may be a sequence that ends in a batch norm; `order` is how the sum was written.
        """
        merges = not has_global_hooks()
        while merges and (parts := _sequence(norm)) and not hooked(norm):
            for module in parts[:-1]:
                x = module(x)
            norm = parts[-1]
        name = None if activation is None else _name_of(activation)
        if (
            (activation is None or name is not None)
            and _is_plain(norm)
            and isinstance(x, Tensor)
            and (not order or _matches(residual, x))
            and merges
        ):
            return norm(x, residual=residual, activation=name)
        y = x if norm is None else norm(x)
        if order == "+=":
            y += residual
        elif order:
            y = y + residual if order == "+" else residual + y
        return y if activation is None else activation(y)


def _sequence(module: Any) -> list[nn.Module]:
    """The modules of an `nn.Sequential`, or of a subclass with its forward, in their order."""
    kind = module.fused_from if isinstance(module, Fused) else type(module)
    in_order = isinstance(module, nn.Sequential) and kind.forward is nn.Sequential.forward
    return _doing(module) if in_order and "forward" not in module.__dict__ else []


def _doing(sequence: nn.Module) -> list[nn.Module]:
    """The modules of a sequence that do anything."""
    return [module for module in sequence._modules.values() if not _hands_on(module)]  # type: ignore[misc]


def _hands_on(module: Any) -> bool:
    """An identity, or a dropout that never drops."""
    nothing = type(module) is nn.Identity or (type(module) in DROPOUTS and module.p == 0)
    return nothing and not hooked(module)


def _name_of(activation: Any) -> str | None:
    if isinstance(activation, nn.Module):
        if hooked(activation) or "forward" in activation.__dict__:
            return None
        return activation_name(activation) or WRAPPERS.get(type(activation).forward)
    return FUNCTIONS.get(activation)


def _is_plain(norm: Any) -> bool:
    """One of our layers, with nothing of its own after it and nothing that watches it."""
    return (
        isinstance(norm, SteadyNorm)
        and type(norm).forward is SteadyNorm.forward
        and "forward" not in norm.__dict__
        and norm.activation is None
        and not hooked(norm)
    )


def _matches(residual: Any, input: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
    )


def _unpickled(kind: Any, sites: frozenset[rewrite.Site]) -> Any:
    known = rewrite.sites(kind.forward) if sites else ()
    fits = not isinstance(known, str) and sites <= set(known)
    made = fused_class(kind, sites) if fits else kind
    return made.__new__(made)


@functools.cache
def fused_class(kind: Any, sites: frozenset[rewrite.Site]) -> Any:
    """A subclass of a block's class with a merged forward; without sites, `nn.Sequential`'s."""
    original = kind.forward
    merged = rewrite.merged(original, sites) if sites else _run_in_order

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Somebody may have given the class another forward since.
        run = merged if kind.forward is original else kind.forward
        return run(self, *args, **kwargs)

    content = {
        "forward": forward,
        "fused_from": kind,
        "fused_sites": sites,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind)(kind.__name__, (Fused, kind), content)


def _run_in_order(self: Any, input: Any) -> Any:
    """The forward of `nn.Sequential`, a batch norm with the activation after it."""
    modules = list(self._modules.values()) if has_global_hooks() else _doing(self)
    value = input
    at = 0
    while at < len(modules):
        if at + 1 < len(modules) and _last(modules[at]) is not None:
            value = self._call_fused(modules[at], modules[at + 1], value)
            at += 2
        else:
            value = modules[at](value)
            at += 1
    return value


def _has_class_of_ours(block: nn.Module) -> bool:
    """Whether nobody has made another class of it since, as FSDP and parametrizations do."""
    return isinstance(block, Fused) and "fused_from" in vars(type(block))


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """While it lasts, every block has its own class."""
    blocks: list[tuple[Any, Any]] = [
        (module, type(module)) for module in model.modules() if _has_class_of_ours(module)
    ]
    for block, kind in blocks:
        block.__class__ = kind.fused_from
    try:
        yield
    finally:
        for block, kind in blocks:
            block.__class__ = kind


def unfuse(model: nn.Module, changes: Changes | None = None) -> None:
    """Gives every block its own class again."""
    for name, block in named(model):
        if _has_class_of_ours(block):
            block.__class__ = block.fused_from  # type: ignore[assignment]
            if changes is not None:
                kind = type(block).__name__
                changes.append(Change("unfused", name, f"{kind}, merged calls", kind))


def fuse(model: nn.Module, changes: Changes) -> None:
    """Fuses what it can; adds what it did, and what it left, to the changes."""
    rows: dict[str, Change] = {}
    names = {module: name for name, module in named(model)}
    for block in names:
        if isinstance(block, Fused | SteadyNorm) or "forward" in vars(block):
            continue
        look = _look_at_sequence if type(block).forward is nn.Sequential.forward else _look_at_code
        fusing = _Block(block, names)
        sites = look(fusing)
        if sites is not None:
            try:
                kind: Any = type(block)
                block.__class__ = fused_class(kind, sites)
            except TypeError as error:  # a class that cannot be subclassed, or has other slots
                fusing.leave_all(str(error))
        for norm, row in fusing.rows.items():
            if norm not in rows or rows[norm].what == "left":
                rows[norm] = row
    changes.extend(rows[name] for name in names.values() if name in rows)


class _Block:
    """One block of a model, and what is said of its batch norms."""

    def __init__(self, block: nn.Module, names: dict[nn.Module, str]) -> None:
        self.module = block
        self.names = names
        self.rows: dict[str, Change] = {}

    def get(self, path: str) -> Any:
        found: Any = self.module
        for part in path.split("."):
            found = getattr(found, part, None)
        return found

    def say(self, norm: nn.Module, what: str, why: str | None) -> bool:
        """Notes that what follows a batch norm is fused, or why not; whether it is."""
        name = self.names[norm]
        if why is None:
            by = f"by {self.names[self.module]}"
            self.rows.setdefault(name, Change("fused", name, f"{what} after it", "one call", by))
        elif name not in self.rows:
            self.rows[name] = Change("left", name, f"{what} after it", f"{what} after it", why)
        return why is None

    def leave_all(self, why: str) -> None:
        for norm, row in self.rows.items():
            self.rows[norm] = Change("left", norm, row.before, row.before, why)


def _look_at_sequence(block: _Block) -> frozenset[rewrite.Site] | None:
    found = False
    for module, after in pairwise(_doing(block.module)):
        norm = _last(module)
        if norm is not None and _may_be_activation(after):
            found |= block.say(norm, str(_name_of(after) or after), _why_not(norm, after))
    return frozenset() if found else None


def _look_at_code(block: _Block) -> frozenset[rewrite.Site] | None:
    norms = [module for module in block.module.children() if _is_ours(module)]
    ends = [module for module in block.module.children() if _last(module) is not None]
    forward: Any = type(block.module).forward
    known = rewrite.sites(forward) if ends else ()
    if isinstance(known, str):
        for norm in norms:
            block.say(norm, "what follows", known)
        return None
    chosen = set()
    for site in known:
        norm = _last(block.get(site.norm))
        activation = _value_of(site.activation, block)
        if norm is None or not (site.activation is None or _may_be_activation(activation)):
            continue
        why = _why_not(norm, activation) or _why_not_moved(site, norm, block)
        words = ["residual"] * site.residual
        if activation is not None:
            words.append(str(_name_of(activation) or activation))
        if block.say(norm, " and ".join(words), why):
            chosen.add(site)
    return frozenset(chosen) or None


def _value_of(text: str | None, block: _Block) -> Any:
    """What the name of an activation stands for in a block's forward."""
    if text is None:
        return None
    first, _, rest = text.partition(".")
    function: Any = type(block.module).forward
    own = first == function.__code__.co_varnames[0]
    return block.get(rest) if own else _global_of(function, text)


def _global_of(function: Any, text: str) -> Any:
    first, *rest = text.split(".")
    return functools.reduce(
        lambda found, part: getattr(found, part, None), rest, function.__globals__.get(first)
    )


def _is_ours(norm: Any) -> bool:
    return isinstance(norm, SteadyNorm) and norm.activation is None


def _last(module: Any) -> Any:
    """The batch norm of ours that a module is, or that a sequence ends in; else None."""
    while (parts := _sequence(module)) and not hooked(module):
        module = parts[-1]
    return module if _is_ours(module) else None


def _may_be_activation(value: Any) -> bool:
    if isinstance(value, nn.Module):
        forward: Any = type(value).forward
        called = None if next(value.children(), None) else rewrite.returned_call(forward)
        function = None if called is None else _global_of(forward, called)
        if callable(function) and function in FUNCTIONS:
            WRAPPERS[forward] = FUNCTIONS[function]
        torchs = type(value).__module__ == nn.ReLU.__module__
        return torchs or forward in WRAPPERS or activation_name(value) is not None
    return callable(value) and value in FUNCTIONS


def _why_not(norm: nn.Module, activation: Any) -> str | None:
    if activation is not None and isinstance(activation, nn.Module) and hooked(activation):
        return "it has hooks, which would not run"
    if activation is not None and _name_of(activation) is None:
        return "it is not one of our activations"
    lazy = isinstance(norm, nn.modules.lazy.LazyModuleMixin)
    if hooked(norm) and not lazy:
        return "the batch norm has hooks, which would see it"
    return None


def _why_not_moved(site: rewrite.Site, norm: nn.Module, block: _Block) -> str | None:
    """Why a batch norm cannot run after the calls that stand between it and the sum."""
    if site.host is None:
        return None
    if block.get(site.norm) is not norm:
        return "what ends in the batch norm would have to run after other calls"
    host = block.get(site.host)
    if not (is_host(host) and type(host).__module__.startswith("torch.nn.")) or hooked(host):
        return f"something besides the batch norm may hold what {site.host} returns"
    for path in site.crossed:
        between = block.get(path)
        if between is not None and not isinstance(between, nn.Module):
            return f"{path}, called before the sum, is no module"
        if isinstance(between, nn.Module) and norm in set(between.modules()):
            return f"{path}, called before the sum, calls it too"
    return None
