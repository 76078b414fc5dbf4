"""A monitor's hooks, which stay with the model they were put on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class OwnHook:
    """A hook that a copy of the module, or a pickle, does not get.

    A copy of the module copies its hooks too: an average of weights taken while the monitor runs
    would be read with the model, and for ever. The copy gets `removes_itself` in its place.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, *args: Any) -> Any:
        """As the hook itself."""
        return self.hook(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _instead, ()


def removes_itself(module: nn.Module, *_: Any) -> None:
    """What a copy holds until its first call: takes itself out of the module's hooks."""
    own = [hooks for name, hooks in vars(module).items() if "hooks" in name]
    stale = {
        number for hooks in own for number, hook in list(hooks.items()) if hook is removes_itself
    }
    for hooks in own:
        for number in stale & hooks.keys():
            del hooks[number]


def _instead() -> Callable[..., None]:
    return removes_itself
