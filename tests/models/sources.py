"""Blocks made from source text, so that `inspect` finds their source as it does a file's."""

from __future__ import annotations

import itertools
import linecache
import textwrap
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_NUMBERS = itertools.count()


def block_class(body: str, arguments: str = "x") -> type[nn.Module]:
    """A module class with this forward, whose layers are the keyword arguments of its making."""
    name = f"<block {next(_NUMBERS)}>"
    indented = textwrap.indent(textwrap.dedent(body), " " * 8)
    source = (
        "class Block(nn.Module):\n"
        "    def __init__(self, **layers):\n"
        "        super().__init__()\n"
        "        for name, layer in layers.items():\n"
        "            setattr(self, name, layer)\n"
        f"    def forward(self, {arguments}):\n{indented}\n"
    )
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"nn": nn, "torch": torch, "F": F, "__name__": __name__}
    exec(compile(source, name, "exec", dont_inherit=True), space)
    made: type[nn.Module] = space["Block"]
    return made


def block(body: str, arguments: str = "x", **layers: Any) -> nn.Module:
    """One block with `conv`, `bn` (3 to 4 channels), and what is given."""
    given = {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "relu": nn.ReLU(), **layers}
    return block_class(body, arguments)(**given)
