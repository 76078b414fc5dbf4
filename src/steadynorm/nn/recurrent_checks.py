"""Arguments of the batch-normalized LSTM: refused before anything changes."""

from __future__ import annotations

from torch import Tensor

State = tuple[Tensor, Tensor]


def zeros(like: Tensor, shape: tuple[int, ...]) -> State:
    """Zeros for h and c."""
    return like.new_zeros(shape), like.new_zeros(shape)


def checked_state(hx: State, shape: tuple[int, ...], owner: str) -> State:
    """`hx` as (h, c), if both have that shape."""
    if not isinstance(hx, tuple | list) or len(hx) != 2:
        raise TypeError(f"{owner}: `hx` must be a pair of tensors (h, c); got {hx!r}.")
    for name, given in zip("hc", hx, strict=True):
        if given.shape != shape:
            raise ValueError(
                f"{owner}: `hx` must hold {name} of shape {shape}; got {tuple(given.shape)}."
            )
    return hx[0], hx[1]


def check_step(step: object, owner: str) -> None:
    """A time step is a whole number from 0 on."""
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{owner}: `step` must be a whole number from 0 on; got {step!r}.")


def given_length(max_length: int | None, owner: str) -> int:
    """`max_length`, which has no default that would be right."""
    if max_length is None:
        raise TypeError(
            f"{owner}: `max_length` is required, the number of time steps with statistics of their "
            f"own: usually the longest sequence's length. torch.nn.LSTM has no such argument."
        )
    return max_length


def positive(name: str, value: object, owner: str) -> None:
    """A size is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: `{name}` must be a whole number; got {value!r}.")
    if value < 1:
        raise ValueError(f"{owner}: `{name}` must be at least 1; got {value!r}.")
