"""Everything sized like the input: two reductions, two maps, and the choice of who runs them."""

from __future__ import annotations


def use(backend: str, on: bool = True) -> None:
    """Let `backend` serve the calls that it supports, or, with `on=False`, no call.

    For the whole process. There is one to switch: "gpu", the Triton kernels, off until they have
    been measured; ValueError for any other. Where Triton cannot be imported, `explain` says so.

    >>> import steadynorm as sn
    >>> sn.kernels.use("gpu")
    >>> sn.kernels.use("gpu", on=False)
    """
    if backend != "gpu":
        raise ValueError(f"kernels.use: `backend` must be 'gpu'; got {backend!r}.")
    from steadynorm.kernels.gpu.backend import GPU

    GPU.on = bool(on)
