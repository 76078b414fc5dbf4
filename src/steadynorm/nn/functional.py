"""Batch normalization as a function over PyTorch tensors.

All other names are those of `torch.nn.functional`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels import dispatch
from steadynorm.kernels.activations import ActivationName
from steadynorm.kernels.checks import activation_name, nonfinite_name, numerics_name
from steadynorm.kernels.reference.gradient_memory import Memory
from steadynorm.kernels.spec import Call, statistics_dtype
from steadynorm.nn import checks, recomputation
from steadynorm.nn.synchronize import Replicas, Synchronize, Terms, process_group
from steadynorm.nn.training import TrainingStep
from steadynorm.statistics import Batch, Frozen, Ghost, Policy, PolicyName, policy_from

BATCH = Batch()


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    statistics: Policy | PolicyName = BATCH,
    activation: ActivationName | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    synchronize: Synchronize = False,
    nonfinite: str = "propagate",
    gradient_memory: Tensor | None = None,
    numerics: str = "device",
    owner: str = "batch_norm",
) -> Tensor:
    """Normalize each channel, scale and shift it; then add a residual and apply an activation.

        x̂ = (x - m)/√(u + eps)        y = activation(weight·x̂ + bias + residual)

    In inference, and with `Frozen()`, m and u are the running statistics; in training the policy
    `statistics` says (see `steadynorm.statistics.policies`). In training `running_mean`,
    `running_var` and `num_batches_tracked` are updated in place, once, even if activation
    checkpointing runs the call again; with `momentum` a: `running = (1 - a)·running + a·batch`,
    with the unbiased variance unless the policy keeps the biased one.

    Args:
        input: (N, C) or (N, C, *), any float type and memory format.
        running_mean: (C,), or None, with running_var, to use the batch in inference too.
        running_var: (C,) or None.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        training: whether the policy decides and the running statistics move.
        momentum: weight of the new batch; None averages over all batches.
        eps: added to the variance.
        num_batches_tracked: how many batches the running statistics have seen; integer scalar. 0
            beside statistics that are not 0 and 1 reads as "many": see docs/policies.md.
        statistics: a policy or its lower-case name.
        activation: None, or the name in `torch.nn.functional` of one that runs inside the layer:
            relu, silu, gelu and the others of `steadynorm.kernels.activations.ACTIVATIONS`.
        residual: of input's shape; added before the activation.
        mask: boolean, True where valid; broadcasts against input without its channel axis. Moments
            come from valid positions; every position is normalized.
        synchronize: True or a process group to pool moments over replicas.
        nonfinite: "propagate", or "skip" to keep a batch with NaN or infinity out of the running
            statistics.
        gradient_memory: (2, C), what `Steady(window=...)` remembers of the gradient; starts at 0,
            and moves in place in the backward pass.
        numerics: "device" lets PyTorch's own operator serve under `Batch` and in inference, on an
            accelerator with its error at large means, on CPU for small inputs; "exact" runs our
            own stages, which have derivatives beyond the second in training, too.
        owner: the name that errors begin with.

    Returns:
        Tensor of input's shape and type.

    Raises:
        ValueError: wrong shapes or values; one value per channel in training under a policy that
            needs two. Running statistics are untouched then.
        TypeError: wrong kinds of arguments.
        RuntimeError: types of input and parameters that do not go together (as in torch); a replica
            that stopped answering.

    >>> import torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    >>> batch_norm(x, None, None, training=True)
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])

    Differs from `torch.nn.functional.batch_norm`: subtracts the mean before scaling, so that a
    large mean costs no precision (on accelerators see `numerics`); an empty batch updates nothing.
    Keras and flax weigh the old average with `momentum` and keep the biased variance.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2; the policies name theirs.
    """
    settings = Settings.checked(statistics, momentum, eps, synchronize, nonfinite, numerics, owner)
    return normalize(
        input, running_mean, running_var, weight, bias, training, num_batches_tracked,
        activation_name(activation, owner), residual, mask, gradient_memory, settings, owner,
    )  # fmt: skip


class Settings(NamedTuple):
    """A layer's constants, checked; prepared whenever one of them changes, not in every call."""

    policy: Policy
    momentum: float | None
    eps: float
    synchronize: Synchronize
    skip_nonfinite: bool
    exact: bool
    remembers: bool
    """Whether the policy keeps a memory of the gradient."""

    @classmethod
    def checked(
        cls, statistics: Policy | PolicyName, momentum: float | None, eps: float,
        synchronize: Synchronize, nonfinite: str, numerics: str, owner: str,
    ) -> Settings:  # fmt: skip
        """From the arguments of `batch_norm`."""
        policy = policy_from(statistics)
        return cls(
            policy, momentum, eps, synchronize, nonfinite_name(nonfinite, owner) == "skip",
            numerics_name(numerics, owner) == "exact", policy.gradient_rate(1) is not None,
        )  # fmt: skip


def normalize(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    num_batches_tracked: Tensor | None,
    activation: ActivationName | None,
    residual: Tensor | None,
    mask: Tensor | None,
    gradient_memory: Tensor | None,
    settings: Settings,
    owner: str,
) -> Tensor:
    """`batch_norm` with its constants prepared."""
    policy, momentum, eps, synchronize, skip_nonfinite, exact, remembers = settings
    if input.ndim < 2 and input.numel() == 0:
        return input.clone()  # as torch does, though it has no channel axis
    checks.tensors(input, running_mean, running_var, weight, bias, owner)
    if residual is not None:
        checks.residual_shape(residual, input, owner)
    if mask is not None:
        mask = checks.expanded_mask(mask, input, owner)
    if eps <= 0:
        checks.epsilon(eps, owner, positive=training or running_mean is None)
    if running_mean is None and training and policy.needs_running:
        raise ValueError(
            f"{owner}: statistics={policy!r} needs running statistics; got none "
            f"(track_running_stats=False). Track them, or use sn.Batch() or sn.Ghost(); "
            f"to freeze a layer, sn.freeze(layer)."
        )
    if not training or isinstance(policy, Frozen):
        if running_mean is not None:
            mask = mask if torch.is_grad_enabled() else None  # the values do not depend on it
            return dispatch.normalize(
                Call(input, weight, bias, residual, mask, running_mean, running_var, None, None,
                     activation, None, eps, exact=exact)
            )  # fmt: skip
        # Nothing is tracked: the batch serves, as in torch.
        policy, synchronize, remembers = BATCH, False, False
    memory = replicas = groups = None
    if remembers:
        memory = _memory(gradient_memory, input, policy, owner)
    if synchronize is not False:
        group = process_group(synchronize, owner)
        if group is not None:
            replicas = Replicas(group, owner)
            tracked = running_mean is not None
            dtype = statistics_dtype(input)
            terms = Terms(policy, input.shape[1], dtype, tracked, skip_nonfinite)
            replicas.agree(running_mean if weight is None else weight, terms, input.device)
    if isinstance(policy, Ghost):
        alone = policy.lengths(input.shape[0]) if input.numel() else None
        groups = alone if replicas is None else replicas.divide(policy, input)
    few = groups is not None or input.numel() <= input.shape[1]
    if few and mask is None and replicas is None:
        checks.values_per_channel(input, groups, policy, owner)
    step = TrainingStep(
        input, weight, bias, residual, mask, running_mean, running_var,
        None if running_mean is None else num_batches_tracked, policy, activation, momentum, eps,
        groups, replicas, skip_nonfinite, memory, exact, owner,
    )  # fmt: skip
    if running_mean is not None:
        if recomputation.is_recomputation(running_mean):
            step.recompute()
        # Asked here: inside the autograd function gradient is always off.
        elif recomputation.may_be_recomputed():
            recomputation.expect(running_mean)
            if policy.needs_running:
                step.may_repeat, step.blends = True, False  # for `decide` to look after
    return dispatch.normalize(step)


def _memory(state: Tensor | None, input: Tensor, policy: Policy, owner: str) -> Memory:
    if state is None:
        raise ValueError(
            f"{owner}: statistics={policy!r} needs `gradient_memory`, zeros of shape "
            f"(2, {input.shape[1]}) at first. Pass it, or use sn.Steady(window=None)."
        )
    return Memory(state)


if TYPE_CHECKING:  # last, since a type checker counts the first of two equal names
    from torch.nn.functional import *  # type: ignore[assignment]  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(torch.nn.functional, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *dir(torch.nn.functional)})
