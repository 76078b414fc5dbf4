"""What cases of several replicas are made with; `replica_worker.py` runs them."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    CASES["-".join([function.__name__, *map(str, arguments)])] = lambda: function(*arguments)
    return function


class Collectives(TorchDispatchMode):
    """Records the number of values in every collective that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in {"c10d", "_c10d_functional"} and "wait" not in func.__name__:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the caller judges it
        return error
    return None
