"""Apply the cures that are safe to a copy of a model, prove each, and diagnose the copy."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from steadynorm.doctor.diagnosis import Report, diagnose
from steadynorm.doctor.evidence.divergence import ENOUGH, independent_values
from steadynorm.doctor.evidence.losses import loss_change
from steadynorm.doctor.evidence.model import optimizers
from steadynorm.doctor.evidence.passes import CALLS, feeding, loss_of, read
from steadynorm.doctor.finding import Finding
from steadynorm.doctor.rules import find_rule
from steadynorm.kernels.spec import HALF
from steadynorm.models import bias
from steadynorm.models.calibrate import calibrate
from steadynorm.models.changes import Change, Changes
from steadynorm.models.convert import convert
from steadynorm.models.equivalence import copied
from steadynorm.models.files import write
from steadynorm.models.layers import GRANTED, unwrapped
from steadynorm.models.report import CalibrationReport, LayerReport
from steadynorm.models.untouched import set_training, untouched


class Fixed(NamedTuple):
    """The cured copy, what was done to it, and what the doctor says of it before and after."""

    model: nn.Module
    changes: Changes
    before: Report
    after: Report

    def write(self, path: str | Path) -> None:
        """Its state dict as .safetensors, or .pt; an old file stays whole until the new one is."""
        write(self.model.state_dict(), Path(path))

    def __str__(self) -> str:
        return f"{self.changes}\n\n{self.after}"


class Repair(NamedTuple):
    """A report, and the batches and the other arguments that it was made with."""

    report: Report
    batches: Iterable[Any] | None
    arguments: Mapping[str, Any]

    @property
    def max_batches(self) -> int | None:
        """How many batches may be read, where that was said."""
        limit: int | None = self.arguments.get("max_batches")
        return limit

    def read(self, model: nn.Module) -> list[Any]:
        """The batches that `diagnose` judges by."""
        return read(feeding(self.batches, model, max_batches=self.max_batches), "batches")

    def example(self, model: nn.Module) -> Callable[[nn.Module], Any]:
        """What calls a model on the first batch."""
        feed = feeding(self.batches, model, self.arguments.get("forward"))
        batch = self.read(model)[0]
        return lambda network: feed.forward(network, batch)

    def layers(self, act: str) -> list[str]:
        """The layers whose findings ask for an act and may have it, each once."""
        asked = (f for f in self.report.findings if act in acts(f))
        wanted = (f for f in asked if f.safe or (find_rule(f.code).safe and not self.decided(f)))
        return list(dict.fromkeys(finding.layer for finding in wanted))

    def decided(self, finding: Finding) -> bool:
        """Whether more than a missing loss speaks against a cure."""
        data = self.report.evidence.data
        return finding.safe is None or (data is not None and data.loss is not None)


def fix(
    model: nn.Module, report: Report, batches: Iterable[Any] | None = None, **arguments: Any
) -> Fixed:
    """Apply the safe cures of a report to a copy of the model, and diagnose the copy.

    A cure is safe where it leaves what the network computes as it was, or brings it to what its
    training meant. These are `convert` (statistics in float32, in layers that keep them so),
    `drop_redundant_bias` and `calibrate`, in this order. A finding asks for those that its line of
    code names; everything else is left for you to decide.

    Each is proved: where the mean loss of inference rises by more than two standard errors, it is
    taken back. Calibration must lower it by as much on batches held back, measured on one half and
    proved on the other; otherwise the statistics stay. Nothing is calibrated without a loss, unless
    inference gives NaN or infinity as it is: a network that was trained with frozen batch norms
    would be harmed. Nothing is calibrated either where `against` shows other data than `batches`.
    The model given stays as it was.

    Args:
        model: the one that was diagnosed.
        report: what `diagnose` said of it.
        batches: training data that can be read repeatedly (a list, a DataLoader). Without, nothing
            is calibrated. Layer by layer where batches are so small that one pass is not exact.
        arguments: the others of `diagnose`: loss, forward, against, max_batches, optimizer.

    Raises TypeError for batches that can be read only once, and as the cures do.

    >>> import torch, steadynorm as sn
    >>> from steadynorm.doctor import diagnose
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
    >>> _ = torch.nn.init.uniform_(model[1].bias)  # trained, but for the statistics
    >>> data = [5 + 2 * torch.randn(64, 4) for _ in range(9)]
    >>> loss = lambda output, batch: (output.std() - 1) ** 2
    >>> fixed = fix(model, diagnose(model, data, loss=loss), data, loss=loss)
    >>> fixed.before.findings[0].code, len(fixed.after.findings)
    ('SN101', 0)
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"fix: `batches` must be readable repeatedly, to measure and to look again; got "
            f"{type(batches).__name__}. Pass a list or a DataLoader."
        )
    cured = copied(unwrapped(model), "diagnose")
    repair = Repair(report, batches, arguments)
    seen = [] if batches is None else repair.read(cured)
    changes = Changes()
    for act, apply in ACTS.items():
        layers = repair.layers(act)
        if layers:
            trial = copied(cured, "diagnose")
            made = Changes(apply(trial, repair, layers))
            before, after = (_losses(network, seen, repair) for network in (cured, trial))
            reason = _worse(before, after)
            if reason is None:
                cured = trial
            else:
                made = Changes([_left(act, layers, f"taken back: {reason}")])
            changes.extend(made)
    optimizer = _of_copy(arguments.get("optimizer"), unwrapped(model), cured)
    again = diagnose(cured, batches, **{**arguments, "optimizer": optimizer})
    return Fixed(cured, changes, report, again)


def acts(finding: Finding) -> list[str]:
    """The functions of this package that a finding's line of code calls.

    >>> from steadynorm.doctor import Severity
    >>> acts(Finding("", "", Severity.INFO, "", "", line="sn.calibrate(model, batches)"))
    ['calibrate']
    """
    return re.findall(r"\bsn\.(\w+)\(", finding.line)


def _left(act: str, layers: list[str], reason: str) -> Change:
    what = {"calibrate": "running statistics", "drop_redundant_bias": "redundant biases"}
    unchanged = what.get(act, "layers")
    return Change("left", layers[0] or "(model)", unchanged, unchanged, reason)


def _worse(before: np.ndarray, after: np.ndarray) -> str | None:
    """Why a cure is to be taken back, by the loss on each batch; None where it is not."""
    change = loss_change(after, before)
    if change is None:
        lost = np.isfinite(before).all() and not np.isfinite(after).all()
        return "the loss of inference is no longer finite" if lost else None
    if change.clear(2):
        return f"the loss of inference rose from {change.after:.3g} to {change.before:.3g}"
    return None


def _no_better(before: np.ndarray, after: np.ndarray) -> str | None:
    """Why calibration has not proved itself, by the loss on each batch; None where it has."""
    change = loss_change(before, after)
    if change is None:
        return _worse(before, after)
    if change.before - change.after > 2 * change.error:
        return None
    return (
        f"the loss on batches held back does not clearly fall: {change.before:.3g} before, "
        f"{change.after:.3g} after"
    )


def _losses(model: nn.Module, batches: list[Any], repair: Repair) -> np.ndarray:
    """The loss of inference on each batch; none where there is no loss."""
    feed = feeding(batches, model, repair.arguments.get("forward"))
    found = []
    with untouched(model), torch.no_grad():
        for batch in batches:
            set_training(model, False)
            loss = loss_of(repair.arguments.get("loss"), feed.forward(model, batch), batch)
            found += [] if loss is None else [float(loss)]
    return np.array(found)


def _of_copy(argument: Any, model: nn.Module, cured: nn.Module) -> Any:
    """The optimizers as if they trained the copy, whose parameters go by the same names."""
    theirs = dict(cured.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    made = []
    for optimizer in optimizers(argument):
        same = copy.copy(optimizer)
        same.param_groups = [
            {**group, "params": [theirs[n] for p in group["params"]
                                 if (n := names.get(id(p), "")) in theirs]}
            for group in optimizer.param_groups
        ]  # fmt: skip
        made.append(same)
    return made or None


def _widen(model: nn.Module, _: Repair, layers: list[str]) -> Iterator[Change]:
    """Statistics in float32, in our layers, which keep them so when the model is cast again."""
    for name in layers:
        module: Any = model.get_submodule(name)
        if module.running_mean is None or module.running_mean.dtype in HALF:
            for change in convert(module, fuse=False, inplace=True)[1]:
                yield replace(change, where=name or change.where)


def _drop_bias(model: nn.Module, repair: Repair, layers: list[str]) -> Iterator[Change]:
    """By the calls of the first batch: what shapes show is not seen without it."""
    try:
        example = None
        if repair.batches is not None:
            example = repair.example(model)
        elif any(GRANTED in change.why for change in bias.drop_redundant_bias(model)[1]):
            raise ValueError("without batches nobody knows on which axis a linear layer works")
        yield from bias.drop_redundant_bias(model, example, inplace=True)[1]
    except ValueError as error:
        yield _left("drop_redundant_bias", layers, str(error))


def _calibrate(model: nn.Module, repair: Repair, layers: list[str]) -> Iterator[Change]:
    """Measured on all batches, once it has proved itself on those held back."""
    reason = _why_not_calibrate(repair)
    if reason is None:
        try:
            reason = _no_better_on_held_back(model, repair)
            if reason is None:
                yield from map(_calibrated, _measure(model, repair.batches, repair).moved)
        except ValueError as error:  # batches that are not finite
            reason = str(error)
    if reason is not None:
        yield _left("calibrate", layers, reason)


def _no_better_on_held_back(model: nn.Module, repair: Repair) -> str | None:
    batches = repair.read(model)
    before: list[np.ndarray] = []
    after: list[np.ndarray] = []
    for measured, proof in ((batches[::2], batches[1::2]), (batches[1::2], batches[::2])):
        trial = copied(model, "diagnose")
        _measure(trial, measured or batches, repair)
        for network, losses in ((model, before), (trial, after)):
            losses.append(_losses(network, proof, repair))
    return _no_better(np.concatenate(before), np.concatenate(after))


def _measure(model: nn.Module, batches: Any, repair: Repair) -> CalibrationReport:
    feed = feeding(batches, model, repair.arguments.get("forward"))
    passes: Any = "layerwise" if _wants_layerwise(repair) else "one"
    return calibrate(
        model, batches, forward=feed.forward, max_batches=repair.max_batches,
        passes=passes, synchronize=False, progress=False,
    )  # fmt: skip


def _calibrated(layer: LayerReport) -> Change:
    shift = layer.mean_shift
    off = f"off by {shift:.2g} std" if shift is not None and isfinite(shift) else "not finite"
    return Change("calibrated", layer.name, f"means {off}", "the data's", f"{layer.values} values")


def _why_not_calibrate(repair: Repair) -> str | None:
    """Why measuring the statistics is not safe after all, None where it is."""
    data = repair.report.evidence.data
    if repair.batches is None or data is None:
        return "no batches given"
    if any(finding.code == "SN306" for finding in repair.report.findings):
        return "the two sets of data differ: on which to measure is a decision"
    if data.loss is None and data.outputs_finite:
        return "no loss given: the weights may have been trained with these statistics"
    return None


def _wants_layerwise(repair: Repair) -> bool:
    """Where batches hold so few independent values that one pass is exact in one layer only."""
    evidence = repair.report.evidence
    few = any(independent_values(layer, evidence) < ENOUGH for layer in evidence.layers)
    try:
        return few and len(evidence.layers) * len(repair.batches) <= CALLS  # type: ignore[arg-type]
    except TypeError:
        return False


ACTS: dict[str, Callable[[nn.Module, Repair, list[str]], Iterator[Change]]] = {
    "convert": _widen,
    "drop_redundant_bias": _drop_bias,
    "calibrate": _calibrate,
}
"""By the function that a line of code names, in the order in which they are applied: statistics are
measured last."""
