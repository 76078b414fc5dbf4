"""What layers refuse or warn of in the same words whatever the framework: what came, what to do."""

from __future__ import annotations

import warnings
from typing import Any

from steadynorm.kernels.activations import ACTIVATIONS


def activation_name(activation: Any, owner: str) -> Any:
    """`activation`, if it is None or the name of one that runs inside the layer."""
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    kind = ValueError if isinstance(activation, str) else TypeError
    raise kind(
        f"{owner}: `activation` must be None or one of {', '.join(ACTIVATIONS)}; "
        f"got {activation!r}. Apply any other activation after the layer."
    )


def nonfinite_name(nonfinite: Any, owner: str) -> Any:
    """`nonfinite`, if it is "propagate" or "skip"."""
    if nonfinite not in ("propagate", "skip"):
        raise ValueError(f"{owner}: `nonfinite` must be 'propagate' or 'skip'; got {nonfinite!r}.")
    return nonfinite


def momentum_range(momentum: float, owner: str) -> None:
    """`momentum` is a weight, that of the old average, as in Keras and flax."""
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"{owner}: `momentum` must lie in [0, 1], the weight of the old average; "
            f"got {momentum!r}."
        )


def numerics_name(numerics: Any, owner: str) -> Any:
    """`numerics`, if it is "device" or "exact"."""
    if numerics not in ("device", "exact"):
        raise ValueError(f"{owner}: `numerics` must be 'device' or 'exact'; got {numerics!r}.")
    return numerics


def residual_shape(
    residual: tuple[object, ...], input: tuple[object, ...], name: str, owner: str
) -> None:
    """`residual` has the shape of the input, which the layer calls `name`."""
    if residual != input:
        raise ValueError(
            f"{owner}: `residual` must have the shape of `{name}`, {input}; got {residual}."
        )


def warn_of_export(policy: Any) -> None:
    """Say what a program that is exported in training cannot do."""
    warnings.warn(
        f"A layer is exported in training under statistics={policy!r}: its program normalizes as "
        f"in training for ever. Tools that switch exported programs to inference, as "
        f"quantization-aware training does, cannot switch it: for these use "
        f'statistics="batch" and a momentum, without a mask. For inference call model.eval() '
        f"before the export.",
        stacklevel=2,
    )


def check_export(policy: Any, *, grouped: bool, compiled: bool, onnx: bool) -> None:
    """Refuse, or warn of, what a program that is exported in training would do."""
    if grouped and not compiled:
        raise NotImplementedError(
            f"statistics={policy!r} in training: torch.jit.trace, and the ONNX export by it, would "
            f"keep the groups of this batch size for every other. Call model.eval() before, or use "
            f"torch.export."
        )
    if compiled or onnx:
        warn_of_export(policy)


# The compiler calls it as it traces, rather than look inside. As the public
# `torch.compiler.assume_constant_result` says, which would load the compiler at once.
warn_of_export._dynamo_marked_constant = True  # type: ignore[attr-defined]
