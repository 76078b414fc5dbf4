"""Apply the cures that are safe to a copy of a model, and look again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from steadynorm.doctor.diagnosis import Report, diagnose
from steadynorm.doctor.evidence.divergence import ENOUGH, known
from steadynorm.doctor.evidence.losses import loss_raised_by_calibration
from steadynorm.doctor.finding import Finding
from steadynorm.models.calibration.functions import calibrate
from steadynorm.models.calibration.layers import unwrapped
from steadynorm.models.calibration.report import LayerReport
from steadynorm.models.surgery import bias, freezing
from steadynorm.models.surgery.changes import Change, Changes
from steadynorm.models.surgery.conversion import HALF, convert
from steadynorm.models.surgery.copying import copied
from steadynorm.models.surgery.files import write_weights

LAYERWISE = 4096  # calls of the model that measuring layer by layer may take


class Fixed(NamedTuple):
    """The mended copy, what was done to it, and what the doctor says of it before and after."""

    model: nn.Module
    changes: Changes
    before: Report
    after: Report

    def write(self, path: str | Path) -> None:
        """Its state dict as .safetensors, or .pt: beside the file and then in its place."""
        write_weights(self.model.state_dict(), Path(path))

    def __str__(self) -> str:
        return f"{self.changes}\n\n{self.after}"


class Repair(NamedTuple):
    """A copy under repair, its findings and its data."""

    model: nn.Module
    findings: tuple[Finding, ...]
    batches: Iterable[Any] | None
    report: Report
    given: Mapping[str, Any]

    def layers(self, act: str) -> list[str]:
        """The layers whose findings ask for an act, each once."""
        return list(dict.fromkeys(f.layer for f in self.findings if act in acts(f)))


def fix(
    model: nn.Module, report: Report, batches: Iterable[Any] | None = None, **given: Any
) -> Fixed:
    """Apply the safe cures of a report to a copy of the model, and diagnose the copy.

    A cure is safe where it leaves what the network computes as it was, or brings it to what its
    training meant. These are: `convert` (statistics in float32, in layers that keep them so),
    `freeze` (statistics held still where the parameters are), `drop_redundant_bias`, and
    `calibrate`, in this order. A finding asks for those that its line of code names; everything
    else is left for you to decide. Nothing is calibrated where the loss would rise, as it does
    where the weights were trained with the statistics that there are, or where `against` shows
    other data than `batches`. The model given stays as it was.

    Args:
        model: the one that was diagnosed.
        report: what `diagnose` said of it.
        batches: training data that can be read repeatedly (a list, a DataLoader). Without, nothing
            is calibrated. Layer by layer where batches are so small that one pass is not exact.
        given: the other arguments of `diagnose`: loss, forward, against, max_batches, optimizer.

    Raises TypeError for batches that can be read only once, and as the cures do.

    >>> import torch, steadynorm as sn
    >>> from steadynorm.doctor import diagnose
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8))
    >>> _ = torch.nn.init.uniform_(model[1].bias)  # trained, but for the statistics
    >>> data = [5 + 2 * torch.randn(64, 4) for _ in range(9)]
    >>> fixed = fix(model, diagnose(model, data), data)
    >>> fixed.before.findings[0].code, len(fixed.after.findings)
    ('SN101', 0)
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            f"fix: `batches` must be readable repeatedly, to measure and to look again; got "
            f"{type(batches).__name__}. Pass a list or a DataLoader."
        )
    mended = copied(unwrapped(model), "diagnose")
    safe = tuple(finding for finding in report.findings if finding.safe)
    repair = Repair(mended, safe, batches, report, given)
    changes = Changes()
    for act, apply in ACTS.items():
        if repair.layers(act):
            changes.extend(apply(repair))
    again = {name: value for name, value in given.items() if name != "optimizer"}
    return Fixed(mended, changes, report, diagnose(mended, batches, **again))


def acts(finding: Finding) -> list[str]:
    """The functions of this package that a finding's line of code calls.

    >>> from steadynorm.doctor import Severity
    >>> acts(Finding("", "", Severity.INFO, "", "", line="sn.calibrate(model, batches)"))
    ['calibrate']
    """
    return re.findall(r"\bsn\.(\w+)\(", finding.line)


def _widen(repair: Repair) -> Iterator[Change]:
    """Statistics in float32, in our layers, which keep them so when the model is cast again."""
    for name in repair.layers("convert"):
        module: Any = repair.model.get_submodule(name)
        if module.running_mean is not None and module.running_mean.dtype not in HALF:
            continue
        _, changes = convert(module, fuse=False, inplace=True)
        yield from _at(name, changes)


def _at(name: str, changes: Changes) -> Iterator[Change]:
    """Changes of a layer that was given alone, by its name in the model."""
    yield from (replace(change, where=name or change.where) for change in changes)


def _freeze(repair: Repair) -> Iterator[Change]:
    for name in repair.layers("freeze"):
        _, changes = freezing.freeze(repair.model.get_submodule(name))
        yield from _at(name, changes)


def _drop_bias(repair: Repair) -> Iterator[Change]:
    try:
        yield from bias.drop_redundant_bias(repair.model, inplace=True)[1]
    except ValueError as error:
        yield Change("left", "(model)", "redundant biases", "redundant biases", str(error))


def _calibrate(repair: Repair) -> Iterator[Change]:
    where = repair.layers("calibrate")[0] or "(model)"
    reason = _why_not_calibrate(repair)
    passes: Any = "layerwise" if _wants_layerwise(repair) else "one"
    if reason is None and repair.batches is not None:
        try:
            done = calibrate(
                repair.model, repair.batches, forward=repair.given.get("forward"),
                passes=passes, synchronize=False, progress=False,
            )  # fmt: skip
        except ValueError as error:  # batches that are not finite
            reason = str(error)
        else:
            yield from map(_calibrated, done.moved)
    if reason is not None:
        yield Change("left", where, "running statistics", "running statistics", reason)


def _calibrated(layer: LayerReport) -> Change:
    shift = layer.mean_shift
    off = f"off by {shift:.2g} std" if shift is not None and isfinite(shift) else "not finite"
    return Change("calibrated", layer.name, f"means {off}", "the data's", f"{layer.values} values")


def _why_not_calibrate(repair: Repair) -> str | None:
    """Why measuring the statistics anew is not safe after all, None where it is."""
    if repair.batches is None:
        return "no batches given"
    if any(finding.code == "SN306" for finding in repair.report.findings):
        return "the two sets of data differ: on which to measure is a decision (sn.adapt)"
    worse = loss_raised_by_calibration(repair.report.evidence.data)
    if worse is not None:
        return (
            f"the loss would rise from {worse.after:.3g} to {worse.before:.3g}: the weights were "
            f"trained with these statistics"
        )
    return None


def _wants_layerwise(repair: Repair) -> bool:
    """Where batches know too little: as `calibrate` says, one pass is then exact in the first
    layer only.
    """
    evidence = repair.report.evidence
    layers = evidence.layers
    small = any(known(layer, evidence) < ENOUGH for layer in layers)
    try:
        calls = len(layers) * len(repair.batches)  # type: ignore[arg-type]
    except TypeError:
        return False
    return small and calls <= LAYERWISE


ACTS: dict[str, Callable[[Repair], Iterator[Change]]] = {
    "convert": _widen,
    "freeze": _freeze,
    "drop_redundant_bias": _drop_bias,
    "calibrate": _calibrate,
}
"""By the function that a line of code names, in the order in which they are applied: statistics are
measured last."""
