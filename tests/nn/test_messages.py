"""Every refusal says which argument, what was required, what came, what to do; nothing moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import steadynorm as sn
from steadynorm.kernels.activations import ACTIVATIONS

TOO_FEW = (
    "Use a larger batch, or statistics=sn.Steady(), sn.Running() or sn.Frozen(), which work with "
    "one value."
)


def call(layer: Any, *shape: int, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    return layer(torch.ones(shape, dtype=dtype), **extra)


REFUSED_CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], type[Exception], str]] = {
    "axes 2d": (
        lambda: sn.BatchNorm2d(64),
        lambda layer: call(layer, 8, 64),
        ValueError,
        "BatchNorm2d: `input` must have 4 axes (N, C, H, W); got shape (8, 64). "
        "Use BatchNorm1d for (N, C).",
    ),
    "axes 1d": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 2, 3, 4, 5),
        ValueError,
        "BatchNorm1d: `input` must have 2 axes (N, C) or 3 axes (N, C, L); "
        "got shape (2, 3, 4, 5). Use BatchNorm2d for (N, C, H, W).",
    ),
    "axes 3d": (
        lambda: sn.BatchNorm3d(3),
        lambda layer: call(layer, 3),
        ValueError,
        "BatchNorm3d: `input` must have 5 axes (N, C, D, H, W); got shape (3,).",
    ),
    "channels": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 5, 4),
        ValueError,
        "BatchNorm1d: `input` must have 3 channels on axis 1, as `running_mean` has; "
        "got shape (5, 4).",
    ),
    "channels in inference": (
        lambda: sn.BatchNorm1d(3).eval(),
        lambda layer: call(layer, 5, 4),
        ValueError,
        "BatchNorm1d: `input` must have 3 channels on axis 1, as `running_mean` has; "
        "got shape (5, 4).",
    ),
    "one value": (
        lambda: sn.BatchNorm2d(3),
        lambda layer: call(layer, 1, 3, 1, 1),
        ValueError,
        "BatchNorm2d: training needs more than one value per channel; got input of shape "
        f"(1, 3, 1, 1). {TOO_FEW}",
    ),
    "one value in a ghost": (
        lambda: sn.BatchNorm1d(3, statistics=sn.Ghost(1)),
        lambda layer: call(layer, 4, 3),
        ValueError,
        "BatchNorm1d: training needs more than one value per channel in a group of Ghost(size=1); "
        f"got input of shape (4, 3). {TOO_FEW}",
    ),
    "mask kind": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 4, 3, mask=[True] * 4),
        TypeError,
        "BatchNorm1d: `mask` must be a boolean tensor, True where valid; got list. "
        "Use mask.bool().",
    ),
    "mask type": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 4, 3, mask=torch.ones(4)),
        TypeError,
        "BatchNorm1d: `mask` must be a boolean tensor, True where valid; got torch.float32. "
        "Use mask.bool().",
    ),
    "mask shape": (
        lambda: sn.BatchNorm2d(3),
        lambda layer: call(layer, 4, 3, 2, 2, mask=torch.ones(4, 3, 2, 2).bool()),
        ValueError,
        "BatchNorm2d: `mask` must broadcast against `input` without its channel axis, (4, 2, 2); "
        "got (4, 3, 2, 2).",
    ),
    "residual kind": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 4, 3, residual=1.0),
        TypeError,
        "BatchNorm1d: `residual` must be a tensor; got float.",
    ),
    "residual shape": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 4, 3, residual=torch.ones(3)),
        ValueError,
        "BatchNorm1d: `residual` must have the shape of `input`, (4, 3); got (3,).",
    ),
    "type of input": (
        lambda: sn.BatchNorm1d(3),
        lambda layer: call(layer, 4, 3, dtype=torch.float64),
        RuntimeError,
        "BatchNorm1d: `input` of type torch.float64 does not go with parameters of type "
        "torch.float32: they must be of one type, or input float16 or bfloat16 and the parameters "
        "float32. Convert the one or the other.",
    ),
    "whole numbers": (
        lambda: sn.BatchNorm1d(3, affine=False),
        lambda layer: call(layer, 4, 3, dtype=torch.int64),
        RuntimeError,
        "BatchNorm1d: `input` must be of a floating-point type; got torch.int64.",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CALLS)
@pytest.mark.parametrize("policy", [None, sn.Steady()], ids=["own policy", "steady"])
def test_a_refused_call(name: str, policy: sn.Steady | None) -> None:
    make, act, kind, message = REFUSED_CALLS[name]
    layer = make()
    if policy is not None:
        if name.startswith("one value"):
            pytest.skip("Steady works with one value")
        layer.statistics = policy
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(kind) as refused:
        act(layer)
    assert str(refused.value) == message
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


POLICY_NAMES = "'batch', 'steady', 'running', 'renorm', 'ghost', 'frozen'"
ACTIVATION_NAMES = ", ".join(ACTIVATIONS)

REFUSED_SETTINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"statistics": "steddy"},
        ValueError,
        f"statistics must be one of {POLICY_NAMES} or a policy; got 'steddy'.",
    ),
    (
        {"statistics": sn.Steady},
        TypeError,
        "statistics must be a policy such as sn.Steady() or its lower-case name; got "
        "<class 'steadynorm.statistics.policies.steady.Steady'>. Write Steady().",
    ),
    (
        {"statistics": 3},
        TypeError,
        "statistics must be a policy such as sn.Steady() or its lower-case name; got 3.",
    ),
    (
        {"activation": "swish"},
        ValueError,
        f"BatchNorm2d: `activation` must be None or one of {ACTIVATION_NAMES}; got 'swish'. "
        "Apply any other activation after the layer.",
    ),
    (
        {"activation": torch.relu},
        TypeError,
        f"BatchNorm2d: `activation` must be None or one of {ACTIVATION_NAMES}; got "
        f"{torch.relu!r}. Apply any other activation after the layer.",
    ),
    (
        {"nonfinite": "ignore"},
        ValueError,
        "BatchNorm2d: `nonfinite` must be 'propagate' or 'skip'; got 'ignore'.",
    ),
    (
        {"synchronize": "nccl"},
        TypeError,
        "BatchNorm2d: `synchronize` must be True, False or a torch.distributed process group; "
        "got 'nccl'.",
    ),
    (
        {"eps": -1e-5},
        ValueError,
        "BatchNorm2d: `eps` must be above 0 in training and at least 0 in inference; got -1e-05.",
    ),
    (
        {"statistics": "running", "track_running_stats": False},
        ValueError,
        "BatchNorm2d: statistics=Running() needs running statistics; got "
        "track_running_stats=False. Track them, or use sn.Batch() or sn.Ghost().",
    ),
]


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED_SETTINGS)
def test_a_refused_setting(settings: dict[str, Any], kind: Any, message: str) -> None:
    """At construction, and when it is assigned later: the layer is as before then."""
    settings = dict(settings)
    with pytest.raises(kind) as refused:
        sn.BatchNorm2d(3, **settings)
    assert str(refused.value) == message
    layer = sn.BatchNorm2d(3, track_running_stats=settings.pop("track_running_stats", True))
    before = repr(layer)
    ((name, value),) = settings.items()
    with pytest.raises(kind) as refused:
        setattr(layer, name, value)
    assert str(refused.value) == message
    assert repr(layer) == before


def test_a_policy_may_be_assigned_by_its_name() -> None:
    layer = sn.BatchNorm2d(3)
    layer.statistics = "steady"  # type: ignore[assignment]
    assert layer.statistics == sn.Steady()


@pytest.mark.parametrize("policy", ["batch", "steady", "running", "renorm", "ghost", "frozen"])
def test_momentum_is_shown_where_the_policy_uses_it(policy: str) -> None:
    text = repr(sn.BatchNorm2d(3, momentum=0.25, statistics=policy))
    assert ("momentum=0.25" in text) is (policy not in {"steady", "frozen"})


REFUSED_POLICIES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sn.Steady(prior=-1), ValueError, "Steady: `prior` must be at least 0; got -1."),
    (lambda: sn.Steady(horizon="1"), TypeError, "Steady: `horizon` must be a number; got '1'."),
    (lambda: sn.Ghost(0), ValueError, "Ghost: `size` must be at least 1; got 0."),
    (lambda: sn.Ghost(2.5), TypeError, "Ghost: `size` must be a whole number; got 2.5."),
    (lambda: sn.Renorm(r_max=0.5), ValueError, "Renorm: `r_max` must be at least 1; got 0.5."),
    (
        lambda: sn.Renorm(d_max=float("nan")),
        ValueError,
        "Renorm: `d_max` must be at least 0; got nan.",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED_POLICIES)
def test_a_refused_policy(make: Callable[[], Any], kind: Any, message: str) -> None:
    with pytest.raises(kind) as refused:
        make()
    assert str(refused.value) == message


def test_the_function_speaks_under_its_own_name() -> None:
    x, one = torch.ones(4, 3), torch.ones(3)
    refused: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: sn.functional.batch_norm(x, one, None, training=True),
            "batch_norm: `running_mean` and `running_var` go together; got only running_mean.",
        ),
        (
            lambda: sn.functional.batch_norm(x, None, None, training=True, statistics="steady"),
            "batch_norm: statistics=Steady(prior=16, horizon=640, window=16) needs running "
            "statistics; got none (track_running_stats=False). Track them, or use sn.Batch() or "
            "sn.Ghost(); to freeze a layer, sn.freeze(layer).",
        ),
        (
            lambda: sn.functional.batch_norm(torch.ones(3), one, one),
            "batch_norm: `input` must have at least 2 axes (N, C, ...); got shape (3,).",
        ),
        (
            lambda: sn.functional.batch_norm(x, one, one, torch.ones(2)),
            "batch_norm: `input` must have 2 channels on axis 1, as `weight` has; "
            "got shape (4, 3).",
        ),
        (
            lambda: sn.functional.batch_norm(x, one, one, training=True, momentum=None),
            "momentum=None averages over all batches and needs their number; got "
            "num_batches_tracked=None. Pass it, or a momentum.",
        ),
    ]
    for act, message in refused:
        with pytest.raises(ValueError) as error:
            act()
        assert str(error.value) == message
