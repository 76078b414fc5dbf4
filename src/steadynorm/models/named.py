"""What a command names: a model, data, a function; a file, or something in a Python module.

A name is `package.module:thing`. Where a thing is called, the call may hold literals, such as
`timm.create_model('resnet18', num_classes=10)`; nothing in it is evaluated. The current folder is
searched too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from steadynorm.models.files import READERS, read_data


def thing(spec: str, option: str) -> Any:
    """What `package.module:name` names. Raises ValueError where there is no such thing."""
    if not all(spec.partition(":")):
        raise ValueError(f"{option} must be package.module:name; got {spec!r}.")
    return _resolved(spec, option)


def made(spec: str, option: str) -> Any:
    """What a name stands for, called if it can be; or what a call with literals returns.

    >>> made("torch.nn:Identity", "MODEL"), made("torch.nn.Linear(2, 3, bias=False)", "MODEL")
    (Identity(), Linear(in_features=2, out_features=3, bias=False))
    """
    name, call, _ = spec.partition("(")
    if not call:
        found = thing(spec, option)
        return found() if callable(found) else found
    args, kwargs = _literals(spec[len(name) :], spec, option)
    return _resolved(name.strip(), option)(*args, **kwargs)


def _literals(call: str, spec: str, option: str) -> tuple[list[Any], dict[str, Any]]:
    try:
        tree = ast.parse(f"f{call}", mode="eval").body
        if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
            raise ValueError("it is no call")
        if any(keyword.arg is None for keyword in tree.keywords):
            raise ValueError("it unpacks a mapping")
        args = [ast.literal_eval(node) for node in tree.args]
        return args, {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f"{option}: a call must hold literals alone (numbers, texts, lists, True, None); "
            f"got {spec!r}."
        ) from error


def _resolved(name: str, option: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {name!r} cannot be found: {error}.") from error


def is_file(spec: str) -> bool:
    """Whether a file is meant: it exists, or ends as files do that can be read."""
    return Path(spec).is_file() or Path(spec).suffix in READERS


def model(spec: str) -> Any:
    """The model that a name or a call makes. Raises TypeError if what is made is no model."""
    from torch import nn

    found = thing(spec, "MODEL") if "(" not in spec else None
    result = found if isinstance(found, nn.Module) else made(spec, "MODEL")
    if not isinstance(result, nn.Module):
        raise TypeError(f"MODEL must make a torch.nn.Module; {spec} made {type(result).__name__}.")
    return result


def batches(spec: str, network: Any, option: str = "--data") -> Any:
    """Batches: what a name or a call makes; what a file holds is one batch.

    Double precision in a file, NumPy's default, becomes the model's own type.
    """
    return [_for_model(read_data(Path(spec)), network)] if is_file(spec) else made(spec, option)


def example(spec: str | None, network: Any) -> Any:
    """Example inputs: the first batch of what `batches` gives; of a tuple or list, its first."""
    if spec is None:
        return None
    found = batches(spec, network)
    if not isinstance(found, Iterable):
        raise TypeError(f"--data must be an iterable of batches; {spec} is {found!r}.")
    first = next(iter(found), None)
    if first is None:
        raise ValueError(f"--data must hold at least one batch; {spec} holds none.")
    return first[0] if isinstance(first, tuple | list) and first else first


def _for_model(value: Any, network: Any) -> Any:
    import torch

    types = [p.dtype for p in network.parameters() if p.is_floating_point()]
    if isinstance(value, torch.Tensor):
        return value.to(types[0]) if types and value.dtype == torch.float64 else value
    if isinstance(value, dict):
        return {key: _for_model(part, network) for key, part in value.items()}
    return tuple(_for_model(part, network) for part in value)
