"""Replace running statistics by population statistics, or mix them with those of new data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from steadynorm.models import batches as feeding
from steadynorm.models.batches import Forward
from steadynorm.models.layers import batch_norms, require_module, unwrapped
from steadynorm.models.population import Mixture, Population
from steadynorm.models.progress import Progress
from steadynorm.models.replicas import ReplicaGroup
from steadynorm.models.report import CalibrationReport
from steadynorm.models.untouched import set_training, untouched
from steadynorm.nn.synchronize import Synchronize, process_group

Passes = Literal["one", "layerwise"]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    device: Any = None,
    passes: Passes = "one",
    synchronize: Synchronize = True,
    progress: bool = True,
) -> CalibrationReport:
    """Replace running statistics by population statistics of `batches`; the weights are held still.

        running_mean = Σx/n        running_var = Σ(x - running_mean)²/n, times n/(n - 1) if unbiased

    per channel, over all n values of all batches that reach the layer, calls and replicas; valid
    ones where the layer was given a mask. Batches count by their values, so their sizes do not
    matter. The variance is unbiased or biased as the layer's policy keeps it (torch: unbiased).

    While it measures, the model is in inference mode (dropout off), and no batch norm trains:

    - passes="one": every layer normalizes each batch by that batch's own mean and biased variance,
      whatever its policy, as training with `Batch` does. One pass. The first layer's result is
      exact for any split into batches; later layers meet inputs that depend on the split, so use
      batches as large as in training or larger.
    - passes="layerwise": a layer is measured once all before it have their final statistics and
      normalize with them, as in inference. As many passes as layers, exact for any split, batches
      of one included. (A layer that feeds itself, in a recurrence, normalizes by its batch
      meanwhile.)

    Changes only `running_mean`, `running_var`, and `num_batches_tracked`, in place. The last is how
    many batches the statistics stand for and Renorm's clock: it is raised to the number of calls
    measured if that is more, never lowered. Modes, all other buffers and the random state are put
    back; an exception or Ctrl-C puts back everything. Each pass starts from the same random state,
    so a shuffling loader repeats its batches in every pass.

    Layers with `Frozen()`, frozen look-alikes, layers in inference mode inside a model in training
    mode, layers without running statistics, layers that hold the same ones as another, and layers
    that no batch reaches are left and named.

    Args:
        model: a module; wrappers (torch.compile, DistributedDataParallel) are seen through.
        batches: tensors; mappings of keyword arguments; tuples or lists, of which the first element
            is taken (inputs with labels); anything else with `forward`. A DataLoader, say.
        forward: calls the model: `lambda model, batch: model(batch.image, mask=batch.mask)`.
        max_batches: stop after so many.
        device: where batches go; None is the model's.
        passes: "one" or "layerwise".
        synchronize: pool over replicas, where torch.distributed is initialized: True for the
            default group, or a group; all its processes must call. They may hold different numbers
            of batches. False measures this process alone.
        progress: show a bar on a terminal.

    Raises:
        TypeError: batches of a kind that needs `forward`, or that cannot be read again for
            passes="layerwise".
        ValueError: no batches; NaN or infinity in a layer's input (our layers with
            `nonfinite="skip"` leave such batches out); unknown settings.
        RuntimeError: another replica failed.

    >>> import torch, steadynorm as sn
    >>> model = torch.nn.Sequential(torch.nn.Dropout(), sn.BatchNorm1d(1))
    >>> report = sn.calibrate(model, [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    >>> model[1].running_mean, model[1].running_var, int(model[1].num_batches_tracked)
    (tensor([3.]), tensor([7.]), 2)
    >>> print(report)
    layer  kind         status      values  mean off, std  largest  std before/after
    1      BatchNorm1d  calibrated       3          1.134    1.134             0.378

    Differs from `torch.optim.swa_utils.update_bn`: that runs the whole model in training mode,
    weighs every batch alike, averages variances within batches without the spread between their
    means, and overwrites layers held in inference mode.

    Source: Ioffe & Szegedy 2015, Alg. 2; Wu & Johnson 2021, section 3 ("PreciseBN").
    """
    return _run(
        "calibrate", model, batches, forward, max_batches, device, passes, synchronize, progress,
        Mixture(None),
    )  # fmt: skip


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    prior: float = 16,
    forward: Forward | None = None,
    max_batches: int | None = None,
    device: Any = None,
    passes: Passes = "one",
    synchronize: Synchronize = True,
    progress: bool = True,
) -> CalibrationReport:
    """Mix running statistics with those of shifted data, without labels.

        mean = (prior·running_mean + n·target_mean)/(prior + n)
        var  = (prior·running_var  + n·target_var) /(prior + n)

    with n the target's samples that reach the layer (not its values; with a mask, samples that have
    a valid position). As in the paper the variances are mixed without a term for the distance of
    the means. `prior=0` takes the target's statistics alone. While it measures, a layer normalizes
    each batch with the mixture for that batch, so one batch gives the paper's procedure; with
    passes="layerwise", layers before the measured one normalize with their final mixture. Calling
    it again mixes with what the first call left.

    Args:
        model, batches, forward, max_batches, device, passes, synchronize, progress: as `calibrate`.
        prior: how many samples the statistics in the model count for.

    Raises:
        ValueError: running statistics that are not finite (use `calibrate`), and as `calibrate`.

    >>> import torch, steadynorm as sn
    >>> model = sn.BatchNorm1d(1)  # running statistics 0 and 1
    >>> report = sn.adapt(model, [torch.tensor([[4.0], [6.0]])], prior=6)
    >>> model.running_mean, model.running_var  # a quarter of 5 and of 2
    (tensor([1.2500]), tensor([1.2500]))

    Everything else is as in `calibrate`.

    Source: Schneider et al. 2020 (their N is `prior`).
    """
    if isinstance(prior, bool) or not isinstance(prior, int | float):
        raise TypeError(f"adapt: `prior` must be a number; got {prior!r}.")
    if not (prior >= 0 and math.isfinite(prior)):
        raise ValueError(f"adapt: `prior` must be finite and at least 0; got {prior!r}.")
    return _run(
        "adapt", model, batches, forward, max_batches, device, passes, synchronize, progress,
        Mixture(prior),
    )  # fmt: skip


def _run(
    owner: str,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    max_batches: int | None,
    device: Any,
    passes: Passes,
    synchronize: Synchronize,
    progress: bool,
    mixture: Mixture,
) -> CalibrationReport:
    require_module(model, owner)
    if passes not in ("one", "layerwise"):
        raise ValueError(f"{owner}: `passes` must be 'one' or 'layerwise'; got {passes!r}.")
    model = unwrapped(model)
    feed = feeding.checked(
        batches, forward, max_batches, device, again=passes == "layerwise", model=model, owner=owner
    )
    layers = batch_norms(model, owner)
    replicas = ReplicaGroup(process_group(synchronize, owner), owner)
    work = Population(owner, model, feed, layers, mixture, replicas)
    if not work.movable:
        return work.report(0, 0)
    with untouched(model) as original, Progress(progress and replicas.leads, feed) as bar:
        set_training(model, False)
        work.start()
        run = work.layerwise if passes == "layerwise" else work.once
        seen, rounds = run(original, bar)
        original.restore()
        work.write()
        original.accept_buffers(model.buffers())
    return work.report(seen, rounds)
