"""One pass over the batches: what reaches each layer, and what normalizes it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.kernels.dispatch import stages_for
from steadynorm.models.calibration.layers import Layer
from steadynorm.nn import checks
from steadynorm.nn.batchnorm import SteadyNorm
from steadynorm.statistics import Moments, RunningStatistics, merge, update_average


class Measured(NamedTuple):
    """What has reached a layer: its moments in float64, in how many calls, of how many samples."""

    moments: Moments
    calls: int
    samples: int

    def joined(self, other: Measured) -> Measured:
        """Both together, as if measured at once."""
        return Measured(
            merge(self.moments, other.moments),
            self.calls + other.calls,
            self.samples + other.samples,
        )

    def cpu(self) -> Measured:
        """The same with its tensors on the CPU."""
        return self._replace(moments=Moments(*(part.cpu() for part in self.moments)))


class Mixture(NamedTuple):
    """How measured statistics become running statistics.

    `prior`: how many samples the statistics from before count for; None leaves them out.
    """

    prior: float | None

    def weight(self, samples: int) -> float:
        """The share of the measured statistics, n/(prior + n)."""
        return 1.0 if self.prior is None or samples == 0 else samples / (self.prior + samples)

    def kept(
        self, before: RunningStatistics, measured: Measured, *, unbiased: bool
    ) -> RunningStatistics:
        """The statistics to keep; `before` has no say, NaN or not, where it is left out."""
        if not self.prior:
            before = RunningStatistics(before.mean.new_zeros(()), before.var.new_zeros(()), None)
        weight = self.weight(measured.samples)
        return update_average(before, measured.moments, weight, unbiased=unbiased, xp=torch)


class Pass:
    """Layers normalized by the batch they meet, and measured; see `measuring`."""

    def __init__(self, layers: Sequence[Layer], mixture: Mixture) -> None:
        self.layers = layers
        self.mixture = mixture
        self.found: dict[str, Measured] = {}  # in the order of each layer's first call

    @torch.no_grad()
    def meet(self, layer: Layer, before: RunningStatistics, args: Any, kwargs: Any) -> None:
        """Measure one call's input, and let the layer normalize with what was measured."""
        module: Any = layer.module
        x = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] != len(module.running_mean):
            return  # the layer itself says best what is wrong
        mask = kwargs.get("mask") if isinstance(module, SteadyNorm) else None
        if mask is not None:
            mask = checks.expanded_mask(mask, x, type(module).__name__)
        part = Measured(_wide(stages_for(x).moments(x.detach(), mask=mask)), 1, x.shape[0])
        # As in training, the biased variance normalizes; a mixture does as it will in inference.
        unbiased = layer.unbiased and self.mixture.prior is not None
        now = self.mixture.kept(before, part, unbiased=unbiased)
        some = part.moments.count > 0
        for name, value, old in (
            ("running_mean", now.mean, before.mean),
            ("running_var", now.var, before.var),
        ):
            buffer = getattr(module, name)
            buffer.copy_(torch.where(some, value, old).to(buffer.dtype))
        if getattr(module, "nonfinite", None) == "skip":
            part = _without_nonfinite(part)
        so_far = self.found.get(layer.name)
        self.found[layer.name] = part if so_far is None else so_far.joined(part)


@contextmanager
def measuring(
    layers: Sequence[Layer], sources: Mapping[str, RunningStatistics], mixture: Mixture
) -> Iterator[Pass]:
    """While it lasts, each call of a layer is measured and normalized by its own batch.

    `sources`: by name, the running statistics that a batch is mixed with, and that normalize a
    batch without a value.

    The model is in inference mode: a pre-hook writes the batch's statistics to the layer's running
    ones, which then normalize it. So whatever the layer is (ours, torch's, a subclass with an
    activation, a synchronized one), nothing of training happens: no counter moves, no replica is
    waited for, and one value per channel is no error. The hooks stand last, so that they see what
    the layer sees.
    """
    run = Pass(layers, mixture)
    with ExitStack() as hooks, torch.no_grad(), eagerly():
        for layer in layers:
            hook = _hook(run, layer, sources[layer.name])
            handle = layer.module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield run


def _hook(run: Pass, layer: Layer, source: RunningStatistics) -> Callable[[Any, Any, Any], None]:
    where = _accumulator(layer.module.running_mean)  # type: ignore[arg-type]
    before = RunningStatistics(source.mean.to(where), source.var.to(where), None)

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        run.meet(layer, before, args, kwargs)

    return hook


def eagerly() -> AbstractContextManager[Any]:
    """No compiled code, which would not call the hooks."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    return nullcontext() if set_stance is None else set_stance("force_eager")


def _accumulator(tensor: Tensor) -> torch.device:
    """Where float64 lives: the tensor's device, if it has it."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _wide(part: Moments) -> Moments:
    """Moments in float64, where the mean needs no second half."""
    where = _accumulator(part.mean)
    count = torch.as_tensor(part.count, dtype=torch.float64, device=where).reshape(1)
    mean, low, var = (
        value.to(where, torch.float64) for value in (part.mean, part.mean_low, part.var)
    )
    return Moments(count, mean + low, var, torch.zeros_like(mean))


def _without_nonfinite(part: Measured) -> Measured:
    """Nothing at all if a value was NaN or infinite, which is what `nonfinite="skip"` asks."""
    count, mean, var, low = part.moments
    finite = mean.isfinite().all() & var.isfinite().all()
    moments = Moments(*(torch.where(finite, value, 0.0) for value in (count, mean, var, low)))
    return Measured(moments, part.calls, part.samples)
