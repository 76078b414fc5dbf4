"""The layers that these tools deal with, recognized by what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm.kernels import activations
from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SteadyNorm
from steadynorm.statistics import Frozen, Policy, RunningStatistics
from steadynorm.statistics import fold as scale_and_shift

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
)  # fmt: skip
OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
"""Ours for each of torch's layers: inputs have as many axes."""
TORCH_FORWARDS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)


class Norm(NamedTuple):
    """What a batch norm is made of, whoever wrote it.

    `kind`: "ours", "torch", or "other" for a class with a forward of its own.
    `activation`: the module it applies last, None if none. `frozen`: its statistics never move.
    """

    kind: str
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    activation: nn.Module | None
    frozen: bool

    def in_inference(self) -> tuple[Tensor, Tensor]:
        """Scale and shift per channel in float64, `y = scale·x + shift`."""
        mean, var, weight, bias = (
            None if t is None else exact(t)
            for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return scale_and_shift(mean, var, weight, bias, self.eps)


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU, since not every device has it.

    Raises ValueError for a tensor without values.
    """
    if tensor.is_meta:
        raise ValueError(
            "`model` must hold values to compute with; got a tensor on the meta device. Move it "
            "with model.to_empty(device=...) and load its weights first."
        )
    return tensor.detach().to("cpu", torch.float64)


def recognize(module: nn.Module) -> Norm | None:
    """A batch norm of any make, else None; judged by structure, so that none is imported."""
    frozen = False
    if isinstance(module, _BatchNorm):
        kind = "torch" if type(module).forward in TORCH_FORWARDS else "other"
        if isinstance(module, SteadyNorm):
            kind, frozen = "ours", isinstance(module.statistics, Frozen)
        if isinstance(module, _LazyNormBase) and module.has_uninitialized_params():
            return Norm(kind, vars(module)["eps"], None, None, None, None, None, frozen)
    elif "BatchNorm" in type(module).__name__ and _holds_statistics(module):
        # Frozen ones keep weight and bias as buffers, or not at all.
        kind, frozen = "other", "weight" not in module._parameters
    else:
        return None
    # DETR's is in its forward; `behaves` checks it.
    eps: Any = vars(module).get("eps", getattr(type(module), "eps", 1e-5))
    weight, bias, mean, var = (
        getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var")
    )
    return Norm(kind, eps, weight, bias, mean, var, _activation(module), frozen)


def _holds_statistics(module: nn.Module) -> bool:
    mean, var = (module._buffers.get(name) for name in ("running_mean", "running_var"))
    return mean is not None and var is not None and mean.ndim == 1 and mean.shape == var.shape


# What a module must have set to be the activation that runs inside a layer.
_SETTINGS: dict[str, dict[str, Any]] = {
    "relu6": {"min_val": 0.0, "max_val": 6.0},
    "leaky_relu": {"negative_slope": activations.LEAKY_SLOPE},
    "gelu": {"approximate": "none"},
    "elu": {"alpha": 1.0},
}
ACTIVATIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (getattr(nn, row.module), _SETTINGS.get(name, {}))
    for name, row in activations.ACTIVATIONS.items()
}
"""By the layers' own names: the module, and the settings that it must have."""
_NAME_OF = {kind: name for name, (kind, _) in ACTIVATIONS.items()}


def _activation(module: nn.Module) -> nn.Module | None:
    """The activation a batch norm applies itself: ours by its name, timm's as a submodule."""
    name = getattr(module, "activation", None)
    if isinstance(name, str) and name in ACTIVATIONS:
        return ACTIVATIONS[name][0]()
    inner = getattr(module, "act", None)
    return inner if isinstance(inner, nn.Module) and not isinstance(inner, nn.Identity) else None


def activation_name(module: nn.Module) -> str | None:
    """The layers' name for an activation module, None where they have none for it."""
    name = _NAME_OF.get(type(module))
    if name is None or "forward" in module.__dict__:
        return None
    settings = ACTIVATIONS[name][1]
    return name if all(getattr(module, key) == value for key, value in settings.items()) else None


def is_host(module: nn.Module) -> bool:
    """A layer whose weight can take a scale per channel: convolution, transposed, linear."""
    return isinstance(module, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))


REPLACED = "its forward has been replaced"
"""Why a layer stays whose `forward` is an attribute of the object: what that does is not known."""


def why_untouchable(module: nn.Module) -> str | None:
    """Why the weights of a layer cannot be rewritten, None where they can."""
    if "forward" in vars(module):
        return REPLACED
    if _uninitialized(module):
        return "it is lazy and has not seen an input yet"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which would see other values"
    if parametrize.is_parametrized(module):
        return "its weights are parametrized"
    if not is_host(module):
        return None
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    kind = next(k for k in (*CONVOLUTIONS, *TRANSPOSED, nn.Linear) if isinstance(module, k))
    parts = {"forward", "_conv_forward"} if isinstance(module, CONVOLUTIONS) else {"forward"}
    if any(getattr(type(module), part) is not getattr(kind, part) for part in parts):
        return f"{type(module).__name__} has its own forward"
    return None


def channel_axis(host: nn.Module, axes: int) -> int:
    """The axis of its channels in a tensor with that many axes."""
    return axes - 1 - (len(host.kernel_size) if isinstance(host, _ConvNd) else 0)


def meets_channels(host: nn.Module, norm: nn.Module) -> bool:
    """Whether a batch norm beside a layer can act on its channels, by how many axes each takes."""
    axes = 2 + (len(host.kernel_size) if isinstance(host, _ConvNd) else 0)
    for kind, ours in OURS.items():
        refuses = (kind._check_input_dim, SteadyNorm._check_input_dim)
        if isinstance(norm, kind) and type(norm)._check_input_dim in refuses:
            return axes in ours._axes
    return True


GRANTED = "; inputs are taken to be (N, C), since no example inputs were given"


def taken_for_granted(hosts: Iterable[nn.Module], calls: Iterable[Any]) -> str:
    """What the changes say of a batch norm beside linear layers whose inputs' shapes are not known.

    Over (N, L, C), which a linear layer takes too, a `BatchNorm1d` acts on L. `calls`: of a graph.
    """
    unknown = any(call.shape is None for call in calls)
    if unknown and any(isinstance(host, nn.Linear) for host in hosts):
        return GRANTED
    return ""


def channels(module: nn.Module) -> tuple[int, int]:
    """Channels in and channels out."""
    if isinstance(module, _ConvNd):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    mean = recognize(module).running_mean  # type: ignore[union-attr]
    return (0, 0) if mean is None else (len(mean), len(mean))


def describe(module: nn.Module) -> str:
    """A batch norm in a table: its class and number of channels."""
    mean = recognize(module).running_mean  # type: ignore[union-attr]
    size = vars(module).get("num_features") if mean is None else len(mean)
    return f"{type(module).__name__}({size})"


def require_module(model: object, owner: str) -> None:
    """Raises TypeError for what is no model, or one that torch.jit or torch.export has made."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{owner}: `model` must be a torch.nn.Module; got {type(model).__name__}.")
    scripted = next((n for n, part in named(model) if isinstance(part, torch.jit.ScriptModule)), "")
    if scripted:
        raise TypeError(
            f"{owner}: `model` must not be compiled by torch.jit, which keeps no layers to "
            f"recognize; {scripted!r} is. Give the model from before torch.jit.script or trace."
        )
    exported = next((n for n, part in named(model) if _is_exported(part)), "")
    if exported:
        raise TypeError(
            f"{owner}: `model` must not be made by torch.export, which keeps operators and no "
            f"layers to recognize; {exported!r} holds the statistics of a batch norm. Give the "
            f"model from before torch.export.export."
        )


def _is_exported(module: nn.Module) -> bool:
    """Whether it is what torch.export, or its unflatten, has left of a batch norm."""
    kind = type(module)
    left = kind is nn.Module or kind.__module__.startswith("torch.export.")
    return left and _holds_statistics(module)


def require_no_replicas(model: nn.Module, owner: str) -> None:
    """Raises ValueError for what DistributedDataParallel wraps: it holds the parameters and buffers
    that were there when it was made, and waits for those that are gone.
    """
    kind = nn.parallel.DistributedDataParallel
    if found := [name for name, part in named(model) if isinstance(part, kind)]:
        raise ValueError(
            f"{owner}: `model` must not be wrapped by DistributedDataParallel, which holds on to "
            f"parameters and buffers that this removes; {found[0]!r} is. Give the model inside, "
            f"model.module."
        )


def require_values(model: nn.Module, owner: str) -> None:
    """Raises ValueError for a model that is about to be run and lacks values.

    Lazy parts would create them in the first run, and change their class: neither can be undone.
    """
    for name, part in named(model):
        if _uninitialized(part):
            raise ValueError(
                f"{owner}: every part of `model` must have its parameters; {name!r} is lazy and "
                f"has not seen an input yet. Run the model on one batch first."
            )
        if any(tensor.is_meta for tensor in _own_tensors(part)):
            raise ValueError(
                f"{owner}: `model` must hold values; those of {name!r} are on the meta device. "
                f"Load its weights first (model.to_empty(device='cpu'), load_state_dict)."
            )


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first name in the model; the model itself is "(model)"."""
    for name, module in model.named_modules():
        yield name or "(model)", module


def kept_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Modules that a model holds as plain attributes, too, where `replace` does not reach them."""

    def inside(value: Any, depth: int) -> Iterator[nn.Module]:
        if isinstance(value, nn.Module):
            yield value
        elif depth and isinstance(value, list | tuple | set | dict):
            for item in value.values() if isinstance(value, dict) else value:
                yield from inside(item, depth - 1)

    return {
        found
        for module in model.modules()
        for name, value in vars(module).items()
        if name != "_modules"
        for found in inside(value, 4)
    }


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts `new` wherever `old` stands, under every name it has; returns the model.

    A wrapper of torch.compile around `old` goes too: it would go on calling that.
    """
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            wraps = child is not None and child._modules.get("_orig_mod") is old
            if child is old or wraps:
                parent._modules[name] = new
    return model


# --- the batch norms of a model whose statistics can be measured


class NormLayer(NamedTuple):
    """A batch norm of a model; `left` says why its statistics stay as they are, None if they move.

    `unbiased`: whether it keeps the unbiased variance.
    """

    name: str
    module: nn.Module
    left: str | None
    unbiased: bool

    def running(self) -> tuple[Tensor, Tensor]:
        """The buffers of its running mean and variance."""
        module: Any = self.module
        return module.running_mean, module.running_var

    @property
    def statistics(self) -> RunningStatistics:
        """A copy of its running statistics in float64, on the CPU: not every device has it."""
        mean, var = (t.detach().to("cpu", torch.float64, copy=True) for t in self.running())
        return RunningStatistics(mean, var, None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper.

    DistributedDataParallel would broadcast buffers in every forward: overwriting what is measured,
    and waiting for ever where replicas hold different numbers of batches.
    """
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def batch_norms(model: nn.Module, owner: str) -> list[NormLayer]:
    """Every batch norm once, in the order of the model. Raises ValueError as `require_values`."""
    require_values(model, owner)
    found = []
    for name, module in named(model):
        norm = recognize(module)
        if norm is None:
            continue
        policy = getattr(module, "statistics", None)
        unbiased = policy.unbiased if isinstance(policy, Policy) else True
        frozen = norm.frozen or isinstance(policy, Frozen)
        found.append(NormLayer(name, module, _why_left(model, module, frozen), unbiased))
    shared = shared_buffers(model)
    for at, layer in enumerate(found):
        if layer.left is None and not shared.isdisjoint(map(id, layer.running())):
            found[at] = layer._replace(left=SHARES_STATISTICS)
    return found


SHARES_STATISTICS = "another layer holds the same running statistics"
"""Why the statistics of a layer stay as they are: what fits one would be wrong for the other."""


def shared_buffers(model: nn.Module) -> set[int]:
    """The ids of the buffers that several modules of a model hold."""
    held = Counter(
        id(b) for module in model.modules() for b in {*module._buffers.values()} - {None}
    )
    return {buffer for buffer, count in held.items() if count > 1}


def _why_left(model: nn.Module, module: nn.Module, frozen: bool) -> str | None:
    if frozen:
        return "frozen"
    if not isinstance(module, _BatchNorm):
        return "no torch.nn batch norm; convert the model first"
    if module.running_mean is None or module.running_var is None:
        return "keeps no running statistics"
    if model.training and not module.training:
        return "held in inference mode while the model is in training mode"
    return None


def _uninitialized(module: nn.Module) -> bool:
    return any(is_lazy(tensor) for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers."""
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]
