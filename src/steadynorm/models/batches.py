"""What a batch may be, and how a model is called on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steadynorm.models.graph import tensors

Forward = Callable[[nn.Module, Any], Any]


class Batches(NamedTuple):
    """The batches of one call, and what to do with each."""

    source: Iterable[Any]
    forward: Forward
    limit: int | None
    device: torch.device
    owner: str

    def run(self, model: nn.Module) -> Iterator[None]:
        """Call the model on a copy of one batch after the other, since it may write into what it is
        given; yields after each.
        """
        for batch in islice(iter(self.source), self.limit):
            self.forward(model, cloned(moved(batch, self.device)))
            yield

    def __len__(self) -> int:
        """How many there are; TypeError where the source cannot say."""
        count = len(self.source)  # type: ignore[arg-type]
        return count if self.limit is None else min(count, self.limit)


def checked(
    batches: Iterable[Any],
    forward: Forward | None,
    max_batches: int | None,
    device: Any,
    *,
    again: bool,
    model: nn.Module,
    owner: str,
) -> Batches:
    """The arguments of one call as `Batches`; `again` requires that they can be read repeatedly."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{owner}: `batches` must be an iterable of batches, such as a DataLoader or a list; "
            f"got {type(batches).__name__}. For a single batch pass [batch]."
        )
    if again and isinstance(batches, Iterator):
        raise TypeError(
            f"{owner}: passes='layerwise' reads `batches` once per layer; got "
            f"{type(batches).__name__}, which can be read only once. Pass a list or a DataLoader, "
            f"or passes='one'."
        )
    if forward is not None and not callable(forward):
        raise TypeError(f"{owner}: `forward` must be callable as (model, batch); got {forward!r}.")
    if max_batches is not None:
        if isinstance(max_batches, bool) or not isinstance(max_batches, int):
            raise TypeError(f"{owner}: `max_batches` must be an int or None; got {max_batches!r}.")
        if max_batches < 1:
            raise ValueError(f"{owner}: `max_batches` must be at least 1; got {max_batches}.")
    target = device_of(model) if device is None else torch.device(device)
    return Batches(batches, forward or default_forward, max_batches, target, owner)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    tensors = (tensor for part in (model.parameters, model.buffers) for tensor in part())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def default_forward(model: nn.Module, batch: Any) -> Any:
    """`model(tensor)`, `model(**mapping)`; of a tuple or list, its first element."""
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    raise TypeError(
        f"batches: each must be a tensor, a mapping of keyword arguments, or a tuple or list whose "
        f"first element is one of these; got {type(batch).__name__}. Say how to call the model: "
        f"forward=lambda model, batch: model(...)."
    )


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`; what holds no tensors stays the same object."""
    return _rebuilt(batch, "to", device)


def cloned(batch: Any) -> Any:
    """A copy of a batch that a model may write into; what holds no tensors is not copied."""
    return _rebuilt(batch, "clone")


def _rebuilt(batch: Any, method: str, *args: Any, depth: int = 6) -> Any:
    """The batch with `part.method(*args)` for every part of it that has that method: tensors, and
    what knows itself how, such as packed sequences and graphs.
    """
    own = getattr(batch, method, None)
    if callable(own):
        return own(*args)
    if not depth or next(tensors(batch), None) is None:
        return batch

    def inside(part: Any) -> Any:
        return _rebuilt(part, method, *args, depth=depth - 1)

    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inside, batch))
    if type(batch) in (tuple, list):
        return type(batch)(map(inside, batch))
    if isinstance(batch, Mapping):
        parts = {key: inside(value) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return parts
        rebuilt = copy(batch)
        rebuilt.update(parts)
        return rebuilt
    if not hasattr(batch, "__dict__"):
        return batch
    rebuilt = copy(batch)  # a dataclass, say
    vars(rebuilt).update({name: inside(value) for name, value in vars(batch).items()})
    return rebuilt
