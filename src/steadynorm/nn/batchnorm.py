"""Batch normalization layers that drop in for `torch.nn.BatchNorm1d`, `2d` and `3d`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import is_lazy

from steadynorm.kernels.activations import ActivationName
from steadynorm.kernels.checks import activation_name
from steadynorm.kernels.spec import HALF
from steadynorm.nn import checks
from steadynorm.nn.functional import Settings, normalize
from steadynorm.nn.synchronize import Synchronize
from steadynorm.statistics import Frozen, Policy, PolicyName


def _for_rebuilding(name: str) -> Any:
    """A setting that tools read to build another batch norm from one, which has no activation."""

    def read(layer: SteadyNorm) -> Any:
        inside = layer.__dict__.get("activation")
        if inside is not None:
            raise RuntimeError(
                f"{type(layer).__name__}: `{name}` is not given to other tools while the layer has "
                f"an activation inside: what they build from it would lose the {inside}. Use "
                f"sn.convert(model, synchronize=True), sn.freeze or sn.fold; or set `activation` "
                f"to None and put a module for it after the layer. To read it nevertheless: "
                f"vars(layer)[{name!r}]."
            )
        return layer.__dict__[name]

    def write(layer: SteadyNorm, value: Any) -> None:
        layer.__dict__[name] = value

    return property(read, write)


class SteadyNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three layers share; see `BatchNorm2d` for the documentation."""

    _axes: ClassVar[dict[int, str]]  # number of input axes -> their names

    num_features = _for_rebuilding("num_features")
    eps = _for_rebuilding("eps")
    _settings: Settings
    _memory_is_new = False

    def __dir__(self) -> list[str]:
        """What can be read: torch.jit.trace and inspect.getmembers read all of it."""
        names = super().__dir__()  # type: ignore[no-untyped-call]
        hidden = () if self.activation is None else ("num_features", "eps")
        return [name for name in names if name not in hidden]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        statistics: Policy | PolicyName = "batch",
        activation: ActivationName | None = None,
        synchronize: Synchronize = False,
        nonfinite: str = "propagate",
        numerics: str = "device",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set(affine and not bias, statistics, activation, synchronize, nonfinite, numerics)

    def _set(
        self,
        drops_bias: bool,
        statistics: Policy | PolicyName,
        activation: ActivationName | None,
        synchronize: Synchronize,
        nonfinite: str,
        numerics: str,
    ) -> None:
        if drops_bias:  # torch before 2.13 has no `bias` argument
            self.register_parameter("bias", None)
        self._widen_statistics()
        self.statistics: Policy = statistics  # type: ignore[assignment]  # a name becomes a policy
        self.activation = activation
        self.synchronize = synchronize
        self.nonfinite = nonfinite
        self.numerics = numerics

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are checked at construction and whenever they change, not in every call."""
        if name in checks.SETTINGS:
            value = checks.SETTINGS[name](value, type(self).__name__)
            if name == "statistics" and value.needs_running and not self.track_running_stats:
                raise ValueError(
                    f"{type(self).__name__}: statistics={value!r} needs running statistics; got "
                    f"track_running_stats=False. Track them, or use sn.Batch() or sn.Ghost()."
                )
        super().__setattr__(name, value)
        if name == "statistics":
            self._begin_gradient_memory()
        if name in checks.SETTINGS or name == "momentum":
            self._prepare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle; one of an earlier version holds no prepared settings."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def _prepare(self) -> None:
        """What a call needs of the settings, once all are there."""
        own = vars(self)
        if own.keys() >= checks.SETTINGS.keys() and "momentum" in own:
            self._settings = Settings.checked(
                self.statistics, self.momentum, own["eps"], self.synchronize, self.nonfinite,
                self.numerics, type(self).__name__,
            )  # fmt: skip

    def _begin_gradient_memory(self) -> None:
        """A buffer that is not saved, where the policy wants one: it fills within a window."""
        mean = self._buffers.get("running_mean")
        if self.statistics.gradient_rate(1) is None or mean is None or is_lazy(mean):
            return
        if "gradient_memory" not in self._buffers:
            dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
            memory = torch.zeros(2, len(mean), dtype=dtype, device=mean.device)
            self.register_buffer("gradient_memory", memory, persistent=False)
            self._memory_is_new = mean.is_meta

    def _forget_gradient(self) -> None:
        memory = self._buffers.get("gradient_memory")
        if memory is not None:
            memory.zero_()

    def reset_running_stats(self) -> None:
        """Running statistics as a new layer has them, and no memory of the gradient.

        Under `Frozen` they stay: `torch.optim.swa_utils.update_bn` resets every layer first, and
        nothing would fill them again.
        """
        if not self._is_frozen():
            super().reset_running_stats()
            self._forget_gradient()

    def reset_parameters(self) -> None:
        """Everything as a new layer has it, frozen statistics too."""
        if self._is_frozen():
            super().reset_running_stats()
        super().reset_parameters()

    def _is_frozen(self) -> bool:
        return isinstance(vars(self).get("statistics"), Frozen)  # none yet while it is made

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._widen_statistics()  # `assign=True` puts the loaded tensors in their place
        self._forget_gradient()

    def _first_memory(self, memory: Tensor) -> Tensor:
        """Zeros for a memory made on the meta device: who gave it memory wrote no values there."""
        mean = self.running_mean
        if mean is None or mean.is_meta:
            return memory
        self._memory_is_new = False
        if mean.device != memory.device:
            self.gradient_memory = memory = torch.zeros_like(memory, device=mean.device)
        return memory.zero_()

    def forward(
        self,
        input: Tensor,
        *,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        activation: ActivationName | None = None,
    ) -> Tensor:
        """Normalize `input`; see the class. `activation`: for this call, if the layer has none."""
        if input.ndim not in type(self)._axes:
            if _is_traced(input):
                node: Tensor = _as_one_node(self, input, residual, mask, activation)
                return node
            self._check_input_dim(input)
        training = self.training
        tracked = self.track_running_stats or not training
        parameters, buffers = self._parameters, self._buffers
        try:  # Module.__getattr__ costs 0.4 µs a name
            weight, bias = parameters["weight"], parameters["bias"]
            mean, var = buffers["running_mean"], buffers["running_var"]
            batches = buffers["num_batches_tracked"]
        except KeyError:  # where torch.nn.utils.parametrize has put a property in its place
            weight, bias, mean, var = self.weight, self.bias, self.running_mean, self.running_var
            batches = self.num_batches_tracked
        owner = type(self).__name__
        if activation is None:
            activation = self.activation
        else:
            activation_name(activation, owner)
        if not tracked:
            mean = var = batches = None
        memory = buffers.get("gradient_memory") if training else None
        if memory is not None and self._memory_is_new:
            memory = self._first_memory(memory)
        return normalize(
            input, mean, var, weight, bias, training, batches, activation, residual, mask, memory,
            self._settings, owner,
        )  # fmt: skip

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile this layer. Fold the model "
            f"first (sn.fold), turn it back (sn.convert(model, to='torch')), or use torch.export."
        )

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim in self._axes:
            return
        wanted = " or ".join(f"{n} axes {names}" for n, names in self._axes.items())
        fits = {2: "1d for (N, C)", 3: "1d for (N, C, L)", 4: "2d for (N, C, H, W)"}
        fits[5] = "3d for (N, C, D, H, W)"
        hint = f" Use BatchNorm{fits[input.ndim]}." if input.ndim in fits else ""
        raise ValueError(
            f"{type(self).__name__}: `input` must have {wanted}; got shape "
            f"{tuple(input.shape)}.{hint}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the running statistics float32 or wider when the module is cast to half."""
        names = ("running_mean", "running_var", "gradient_memory")
        wide = {name: self._buffers.get(name) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
            after = self._buffers.get(name)
            if before is None or after is None or after.dtype not in HALF:
                continue
            if before.dtype not in HALF:
                self._buffers[name] = before.to(after.device)
        return self

    def _widen_statistics(self) -> None:
        for name in ("running_mean", "running_var"):
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in HALF:
                self._buffers[name] = buffer.float()

    def extra_repr(self) -> str:
        settings: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if not self.statistics.uses_momentum:
            settings = settings.replace(f", momentum={self.momentum}", "")
        parts = [settings, f"statistics={self.statistics!r}"]
        if self.activation is not None:
            parts.append(f"activation={self.activation!r}")
        if self.synchronize is not False:
            parts.append("synchronize=True")
        if self.nonfinite != "propagate":
            parts.append(f"nonfinite={self.nonfinite!r}")
        if self.numerics != "device":
            parts.append(f"numerics={self.numerics!r}")
        return ", ".join(parts)


def _is_traced(input: Any) -> bool:
    return isinstance(input, fx.Proxy)


def _as_one_node(layer: SteadyNorm, input: Any, *optional: Any) -> Any:
    """One call of the layer in a graph that torch.fx traces, as of torch's own layers."""
    names = ("residual", "mask", "activation")
    given = {n: value for n, value in zip(names, optional, strict=True) if value is not None}
    path = input.tracer.path_of_module(layer)
    return input.tracer.create_proxy("call_module", path, (input,), given)


class BatchNorm1d(SteadyNorm, torch.nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L); see `BatchNorm2d`.

    >>> import torch, steadynorm as sn
    >>> layer = sn.BatchNorm1d(3, statistics="steady")
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]])).shape  # a batch of one
    torch.Size([1, 3])
    """

    _axes = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNorm2d(SteadyNorm, torch.nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W), in place of `torch.nn.BatchNorm2d`.

        x̂ = (x - m)/√(u + eps)        y = activation(weight·x̂ + bias + residual)

    per channel. In training the policy `statistics` chooses m and u; in inference they are the
    running statistics. Same parameters, buffers, `state_dict` keys and defaults as torch's layer,
    and a subclass of it. Every training forward updates `running_mean`, `running_var` and
    `num_batches_tracked` once; `momentum` a means `running = (1 - a)·running + a·batch`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None averages over all batches.
        affine: learn weight and bias; without, they are 1 and 0.
        track_running_stats: keep running statistics; without, the batch serves in inference too.
        device: where parameters and buffers are made.
        dtype: type of the parameters; running statistics are float32 or wider in any case.
        bias: False learns a weight without a bias.
        statistics: `sn.Batch()`, `sn.Steady()`, `sn.Running()`, `sn.Renorm()`, `sn.Ghost()`,
            `sn.Frozen()`, or a lower-case name.
        activation: None, or the name in `torch.nn.functional` of one that runs inside the layer:
            relu, silu, gelu and the others of `steadynorm.kernels.activations.ACTIVATIONS`.
        synchronize: True (the default process group) or a group: pool moments over replicas, on any
            backend of torch.distributed.
        nonfinite: "skip" keeps batches with NaN or infinity out of the running statistics.
        numerics: "device" lets PyTorch's own operator serve under `Batch` and in inference, on an
            accelerator with its error at large means, on CPU for small inputs; "exact" runs our
            own stages, which have derivatives beyond the second in training, too.

    Shapes: input, residual and output (N, C, H, W); mask broadcasts against (N, H, W).

    Raises:
        ValueError: wrong number of axes or channels, wrong mask or residual shape, unknown names,
            one value per channel in training under `Batch` or `Ghost`. Nothing is updated then.
        TypeError: a mask that is not boolean, a policy that is none.
        RuntimeError: `num_features` or `eps` is read while an activation is inside. Tools that
            build another layer from these two would lose it.

    >>> import torch, steadynorm as sn
    >>> layer = sn.BatchNorm2d(8, statistics=sn.Steady(), activation="relu")
    >>> x = torch.randn(2, 8, 4, 4)
    >>> y = layer(x, residual=x)
    >>> bool((y >= 0).all()), int(layer.num_batches_tracked)
    (True, 1)

    Differs from torch: the mean is subtracted before scaling, so that a large mean costs no
    precision (on accelerators see `numerics`); running statistics stay float32 under `.half()` and
    `.bfloat16()`; an empty batch or a refused one updates nothing; activation checkpointing updates
    once; under `Steady`, `Running` and `Renorm` a `num_batches_tracked` of 0 beside statistics that
    are not 0 and 1 reads as many. Keras and flax mean by `momentum` the weight of the old average,
    and keep the biased variance.

    Source: Ioffe & Szegedy 2015; the policies name theirs.
    """

    _axes = {4: "(N, C, H, W)"}


class BatchNorm3d(SteadyNorm, torch.nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); see `BatchNorm2d`.

    >>> import torch, steadynorm as sn
    >>> sn.BatchNorm3d(2)(torch.randn(2, 2, 3, 4, 5)).shape
    torch.Size([2, 2, 3, 4, 5])
    """

    _axes = {5: "(N, C, D, H, W)"}


class _Lazy(_LazyNormBase, SteadyNorm):
    """Waits for the first input to learn its number of channels; then becomes the plain layer."""

    num_features = 0  # what torch's lazy layers read and set

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        statistics: Policy | PolicyName = "batch",
        activation: ActivationName | None = None,
        synchronize: Synchronize = False,
        nonfinite: str = "propagate",
        numerics: str = "device",
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        self._set(affine and not bias, statistics, activation, synchronize, nonfinite, numerics)

    def initialize_parameters(self, input: Tensor) -> None:
        """Make parameters and statistics for input's channels."""
        super().initialize_parameters(input)
        self._widen_statistics()
        self._begin_gradient_memory()


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d, BatchNorm1d):
    """`BatchNorm1d` that learns `num_features` from its first input.

    >>> import torch, steadynorm as sn
    >>> layer = sn.LazyBatchNorm1d()
    >>> layer(torch.randn(4, 7)).shape, layer.num_features
    (torch.Size([4, 7]), 7)
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d, BatchNorm2d):
    """`BatchNorm2d` that learns `num_features` from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d, BatchNorm3d):
    """`BatchNorm3d` that learns `num_features` from its first input."""

    cls_to_become = BatchNorm3d
