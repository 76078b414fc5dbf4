"""Names, momentum, eps and the bias of the variance: torch, Keras and flax, each way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from steadynorm.models.formats import KERAS_NAMES, KERAS_RENORM_NAMES
from steadynorm.statistics import CONVENTIONS, MANY_BATCHES, convert_momentum, convert_variance

ROLES = ("weight", "bias", "mean", "var", "batches")
NAMES = {
    "torch": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    "keras": KERAS_NAMES,
    "flax": ("scale", "bias", "mean", "var", "num_batches_tracked"),
}
SEPARATORS = {"torch": ".", "keras": "/", "flax": "."}


class Converted(NamedTuple):
    """What came out, and in words what could not be kept as it was."""

    values: dict[str, Any]
    remarks: tuple[str, ...]


def convert_weights(
    weights: Mapping[str, Any],
    source: str,
    target: str,
    *,
    values_per_channel: int | Mapping[str, int] | None = None,
    count_batches: bool = False,
) -> Converted:
    """The batch normalization layers of a checkpoint under another framework's names.

    A layer is every prefix with a running mean and a running variance of one length. Its weight,
    bias and running mean are the same numbers everywhere. Its running variance is unbiased in
    torch and biased in Keras and flax: with n values per channel in a training batch
    (`values_per_channel`, for all layers or by prefix), the biased one is (n - 1)/n of the other.
    Left as it is, inference gives the same output in the new framework; converted, the statistics
    are what the new framework would have kept. Under `Steady` and `Running` this package's layers
    keep the biased variance in torch too: leave those as they are.

    Args:
        weights: arrays by name, names joined as `SEPARATORS` says; flax's by slashes too, and with
            the collections of `flax.linen`, `params` and `batch_stats`, in front.
        source: "torch", "keras" or "flax".
        target: likewise.
        values_per_channel: n above; without, the variance is left as it is, which is remarked.
        count_batches: keep the number of batches seen for Keras and flax too, where only this
            package's layers have a place for it, and only under policies that ask for it.

    Returns:
        The layers' arrays, and remarks on all that was not kept. Other weights are left out.

    Raises:
        ValueError: an unknown framework, a source without such a layer, an n below 1.

    >>> torch_layer = {
    ...     "1.weight": np.ones(2),
    ...     "1.bias": np.zeros(2),
    ...     "1.running_mean": np.zeros(2),
    ...     "1.running_var": np.array([4.0, 8.0]),
    ...     "1.num_batches_tracked": np.array(9),
    ... }
    >>> values, remarks = convert_weights(torch_layer, "torch", "keras", values_per_channel=4)
    >>> values["1/moving_variance"]
    array([3., 6.])
    >>> remarks
    ('1: num_batches_tracked (9) is left out: keras has no place for it.',)
    """
    names, new_names = _names(source, "source"), _names(target, "target")
    if source == "flax":
        weights = _without_collections(weights)
    layers = find_layers(weights, source)
    unnamed = _unnamed(weights) if source == "keras" else {}
    remarks = [_UNNAMED.format(prefix, len(arrays)) for prefix, arrays in unnamed.items()]
    if not layers:
        raise ValueError(
            f"weights hold no batch normalization layer of {source}: none has both "
            f"{names[2]!r} and {names[3]!r} of one length." + "".join(f" {r}" for r in remarks)
        )
    converted: dict[str, Any] = {}
    used = {name for arrays in unnamed.values() for name in arrays}
    for prefix in layers:
        found = {
            role: name
            for role, name in zip(ROLES, (join(prefix, n, source) for n in names), strict=True)
            if name in weights
        }
        used |= set(found.values()) | _renorms_own(weights, prefix, source, target, remarks)
        layer = {role: np.asarray(weights[name]) for role, name in found.items()}
        n = (
            values_per_channel.get(prefix)
            if isinstance(values_per_channel, Mapping)
            else values_per_channel
        )
        layer["var"] = _variance(layer["var"], n, source, target, prefix, remarks)
        _batches(layer, target, prefix, count_batches, remarks)
        new_prefix = prefix.replace(SEPARATORS[source], SEPARATORS[target])
        for role, name in zip(ROLES, new_names, strict=True):
            if role in layer:
                converted[join(new_prefix, name, target)] = layer[role]
    if others := len(weights) - len(used):
        remarks.append(f"{others} other arrays are left out: they are no batch normalization.")
    return Converted(converted, tuple(remarks))


def _without_collections(weights: Mapping[str, Any]) -> dict[str, Any]:
    """flax's arrays by the names of their layers, where linen's collections part a layer's."""
    dotted = {name.replace("/", "."): array for name, array in weights.items()}
    return {re.sub(r"^(params|batch_stats)\.", "", name): array for name, array in dotted.items()}


_UNNAMED = (
    "{}: {} arrays are left out: they may be a batch normalization with scale=False, center=False "
    "or renorm=True, but the file numbers its arrays and does not say which they are. Save the "
    "whole model as .keras, whose settings say."
)
# Keras's names for layers that keep two arrays of one length too.
_OTHERS = ("layer_normalization", "group_normalization")


def _unnamed(weights: Mapping[str, Any]) -> dict[str, list[str]]:
    """By prefix, numbered arrays that may be a batch normalization's, but do not say which."""
    groups: dict[str, list[str]] = {}
    for name in weights:
        prefix, _, last = name.rpartition(SEPARATORS["keras"])
        kind = prefix.rpartition(SEPARATORS["keras"])[2]
        if last.isdecimal() and not kind.startswith(_OTHERS):
            groups.setdefault(prefix, []).append(name)
    return {prefix: names for prefix, names in groups.items() if _may_be_a_layer(weights, names)}


def _may_be_a_layer(weights: Mapping[str, Any], names: list[str]) -> bool:
    shapes = [np.shape(weights[name]) for name in names]
    shapes = shapes[:-1] if shapes[-1] == () else shapes  # a count of batches
    # Two to seven arrays: the moving statistics, what is learned, and what renorm=True adds.
    return 2 <= len(shapes) <= 7 and len(set(shapes)) == 1 and len(shapes[0]) == 1


def _renorms_own(
    weights: Mapping[str, Any], prefix: str, source: str, target: str, remarks: list[str]
) -> set[str]:
    """The arrays that Keras keeps for `renorm=True` alone, which stay behind."""
    if source != "keras":
        return set()
    found = {name: join(prefix, name, source) for name in KERAS_RENORM_NAMES}
    found = {name: whole for name, whole in found.items() if whole in weights}
    if found:
        remarks.append(
            f"{prefix}: {', '.join(found)} of renorm=True are left out: {target} has no place for "
            f"them. Inference uses none of them."
        )
    return set(found.values())


def find_layers(weights: Mapping[str, Any], framework: str) -> list[str]:
    """The prefixes of a checkpoint's batch normalization layers, in its order."""
    _, _, mean, var, _ = _names(framework, "framework")
    prefixes = []
    for name, array in weights.items():
        prefix, _, last = ("" + SEPARATORS[framework] + name).rpartition(SEPARATORS[framework])
        prefix = prefix.removeprefix(SEPARATORS[framework])
        other = weights.get(join(prefix, var, framework))
        if last == mean and other is not None and np.shape(other) == np.shape(array):
            prefixes.append(prefix)
    return prefixes


def join(prefix: str, name: str, framework: str) -> str:
    """The name of a layer's array in a checkpoint."""
    return f"{prefix}{SEPARATORS[framework]}{name}" if prefix else name


def _names(framework: str, argument: str) -> tuple[str, ...]:
    if framework not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}; got {framework!r}.")
    return NAMES[framework]


def _variance(
    var: np.ndarray, n: int | None, source: str, target: str, prefix: str, remarks: list[str]
) -> np.ndarray:
    have, want = CONVENTIONS[source].keeps, CONVENTIONS[target].keeps
    if have == want:
        return var
    if n is None:
        remarks.append(
            f"{prefix}: the running variance stays as it is, {have} where {target} keeps it "
            f"{want}: inference gives the same output. To go on training as {target} would have "
            f"trained, give values_per_channel."
        )
        return var
    if n < 1:
        raise ValueError(f"values_per_channel must be at least 1; got {n} for {prefix!r}.")
    exact = convert_variance(var.astype(np.float64), n, source, target, xp=np)
    return np.asarray(exact, var.dtype)


def _batches(
    layer: dict[str, Any], target: str, prefix: str, count_batches: bool, remarks: list[str]
) -> None:
    if target == "torch":
        if "batches" not in layer:
            layer["batches"] = np.asarray(MANY_BATCHES, np.int64)
            remarks.append(
                f"{prefix}: the number of batches seen is not known: num_batches_tracked is "
                f"{MANY_BATCHES}, so that the next batch is one of many."
            )
        layer["batches"] = layer["batches"].astype(np.int64)
    elif count_batches:
        layer["batches"] = np.minimum(layer.get("batches", MANY_BATCHES), MANY_BATCHES).astype(
            np.int32
        )
    elif "batches" in layer:
        count = int(layer.pop("batches"))
        remarks.append(
            f"{prefix}: num_batches_tracked ({count}) is left out: {target} has no place for it."
        )


def convert_settings(settings: Mapping[str, Any], source: str, target: str) -> Converted:
    """The arguments of one framework's layer as the arguments of another's.

    `momentum`, `eps` or `epsilon`, and what is learned. What is not given is the source's default,
    and is written out, because the defaults differ.

    Args:
        settings: torch: momentum, eps, affine, bias; Keras: momentum, epsilon, center, scale;
            flax: momentum, epsilon, use_bias, use_scale. Others are refused.
        source: "torch", "keras" or "flax".
        target: likewise.

    Returns:
        The arguments, and remarks on what could not be kept.

    Raises:
        ValueError: an unknown framework or setting.

    >>> convert_settings({"momentum": 0.1}, "torch", "keras").values
    {'momentum': 0.9, 'epsilon': 1e-05, 'scale': True, 'center': True}
    """
    _names(source, "source"), _names(target, "target")
    here, there = CONVENTIONS[source], CONVENTIONS[target]
    given, remarks = dict(settings), []
    momentum = given.pop("momentum", here.momentum)
    eps = given.pop("eps" if source == "torch" else "epsilon", here.eps)
    if source == "torch":
        scale = given.pop("affine", True)
        center = scale and given.pop("bias", True)
    else:
        scale, center = (given.pop(name, True) for name in _LEARNED[source])
    if given:
        raise ValueError(
            f"settings must be those of {source} that have a counterpart; got {sorted(given)}."
        )
    if momentum is None:
        remarks.append(
            f"momentum=None averages over all batches; {target} has no such momentum: its default, "
            f"{there.momentum}, stands. This package's statistics='running' starts that way."
        )
        momentum = there.momentum
    else:
        momentum = round(convert_momentum(momentum, source, target), 12)
    if target == "torch":
        if center and not scale:
            remarks.append("torch learns no bias without a weight: the weight is 1, and learned.")
        values = {"momentum": momentum, "eps": eps, "affine": scale or center}
        return Converted(values | ({} if center or not scale else {"bias": False}), tuple(remarks))
    learned = dict(zip(_LEARNED[target], (scale, center), strict=True))
    return Converted({"momentum": momentum, "epsilon": eps, **learned}, tuple(remarks))


_LEARNED = {"keras": ("scale", "center"), "flax": ("use_scale", "use_bias")}
