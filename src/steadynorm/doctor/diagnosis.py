"""`diagnose`, and the report it returns."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steadynorm._extras import needed_by
from steadynorm.doctor.evidence.keras_model import is_keras, probe_keras
from steadynorm.doctor.evidence.losses import loss_raised_by_calibration
from steadynorm.doctor.evidence.records import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules import all_rules, find_rule

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn


@dataclass(frozen=True, eq=False)
class Report:
    """What the rules found, worst first, and the evidence they judged.

    `findings`: by severity; one that another explains comes after it, whatever its own severity,
    and names it in `because`; then in the model's order of layers, then by code. The same evidence
    always gives the same order. `codes`: the rules that judged. `skipped`: those that had nothing
    to judge by, since no model or no batches were given. Prints as text, in colour under rich.
    """

    findings: tuple[Finding, ...]
    evidence: Evidence
    codes: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @property
    def worst(self) -> Severity | None:
        """The highest severity found, None where nothing was."""
        return max((finding.severity for finding in self.findings), default=None)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Writes the report as one page that needs nothing else, and returns its path.

        Raises ModuleNotFoundError where jinja2 is missing.
        """
        if find_spec("jinja2") is None:
            raise ModuleNotFoundError("Report.to_html needs jinja2: pip install jinja2.")
        from steadynorm.doctor.report.html import page

        page(self).write(Path(path))
        return Path(path)

    def to_json(self) -> str:
        """The report as JSON; its schema is in the documentation."""
        from steadynorm.doctor.report.json import to_json

        return to_json(self)

    def to_sarif(self) -> str:
        """The report as SARIF 2.1.0, which code-review tools read."""
        from steadynorm.doctor.report.sarif import to_sarif

        return to_sarif(self)

    def __str__(self) -> str:
        from steadynorm.doctor.report.text import to_text

        return to_text(self)

    def __rich__(self) -> RenderableType:
        from steadynorm.doctor.report.text import to_rich

        return to_rich(self)


def judge(evidence: Evidence, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Report:
    """What the rules say of evidence.

    `select`, `ignore`: codes, beginnings of codes, or names. Raises ValueError for one that is no
    rule's.
    """
    only, without = _prefixes(select, "select"), _prefixes(ignore, "ignore")
    chosen = [
        rule
        for rule in all_rules()
        if (not only or rule.code.startswith(only))
        and not (without and rule.code.startswith(without))
    ]
    gathered = ("model", "data", "run")
    available = {"state", *(part for part in gathered if getattr(evidence, part) is not None)}
    rules = [rule for rule in chosen if rule.needs in available]
    found = [_proved(finding, evidence) for rule in rules for finding in rule.check(evidence)]
    return Report(
        ordered(found, evidence),
        evidence,
        tuple(rule.code for rule in rules),
        tuple(rule.code for rule in chosen if rule.needs not in available),
    )


def _proved(finding: Finding, evidence: Evidence) -> Finding:
    """Calibration is safe where it does not raise the loss on the batches, or where there is
    nothing to lose. Without a loss the weights may have been trained with these statistics.

    Lines of code that call this package's tools are for torch; Keras and flax get none.
    """
    frameworks = {layer.state.framework for layer in evidence.layers}
    if "sn." in finding.line and frameworks - {"torch"}:
        return replace(finding, line="", safe=None)
    if not finding.safe or "sn.calibrate(" not in finding.line:
        return finding
    data = evidence.data
    if data is not None and (data.loss is not None or not data.outputs_finite):
        return replace(finding, safe=loss_raised_by_calibration(data) is None)
    return replace(finding, safe=False)


def ordered(findings: Iterable[Finding], evidence: Evidence) -> tuple[Finding, ...]:
    """The order of a report, with `because` filled in."""
    found = list(findings)
    by_code: dict[str, list[Finding]] = {}
    for finding in found:
        by_code.setdefault(finding.code, []).append(finding)
    explains = {rule.code: rule.explains for rule in all_rules()}
    position = {layer.name: number for number, layer in enumerate(evidence.layers)}

    def follow(cause: Finding) -> Iterator[Finding]:
        """What a finding explains: in its layer or a later one, or where either is the model's.

        Information says that nothing is wrong there, so it explains nothing that is.
        """
        start = position.get(cause.layer, -1)
        for other in chain.from_iterable(by_code.get(c, ()) for c in explains[cause.code]):
            behind = position.get(other.layer, -1) >= start or not other.layer
            if behind and (cause.severity > Severity.INFO or other.severity == Severity.INFO):
                yield other

    def weight(finding: Finding) -> Severity:
        """Its own severity, or that of the worst it explains: a cause comes first."""
        return max([finding.severity, *map(weight, follow(finding))])

    causes: dict[int, set[str]] = {id(finding): set() for finding in found}
    for cause in found:
        for other in follow(cause):
            causes[id(other)].add(cause.code)

    @cache
    def depth(code: str) -> int:
        return max((1 + depth(cause) for cause in by_code if code in explains[cause]), default=0)

    first = sorted(
        found, key=lambda f: (-weight(f), depth(f.code), position.get(f.layer, -1), f.code)
    )
    return tuple(replace(f, because=tuple(sorted(causes[id(f)]))) for f in first)


def _prefixes(codes: Iterable[str], argument: str) -> tuple[str, ...]:
    """Checked against the rules there are: a misspelt code would otherwise hide everything."""
    if isinstance(codes, str):
        raise TypeError(f"diagnose: `{argument}` must be a list of codes; got {codes!r}.")
    prefixes = tuple(find_rule(c).code if "-" in c else c.upper() for c in codes)
    for code in prefixes:
        if not code or not any(rule.code.startswith(code) for rule in all_rules()):
            raise ValueError(f"diagnose: `{argument}` names no rule: {code!r}.")
    return prefixes


def diagnose(
    target: nn.Module | str | PathLike[str] | Mapping[str, Any],
    batches: Iterable[Any] | None = None,
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
    optimizer: Any = None,
    exporting: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    name: str = "",
    progress: bool = True,
) -> Report:
    """Find what is wrong with a network's batch norms, and say what to do.

    A checkpoint shows the state of its layers: statistics that were never updated, are not finite
    or have a vanishing variance. A model also shows how its layers are connected and trained.
    Batches show whether the statistics fit the data, and what inference loses where they do not.

    Nothing changes: parameters, gradients, buffers, modes, hooks and random states are restored, on
    exceptions too, and batches stay as they are. The model is run on the batches in training and in
    inference.

    Args:
        target: a model; a checkpoint file (`.pt`, `.pth`, `.ckpt`, `.bin` read weights-only,
            `.safetensors`, `.npz`, `.h5`, `.keras`); or a state dict, tensors or arrays by name.
            Of a TorchScript, an exported or a Keras model (on any backend) the state alone is
            judged.
        batches: tensors; mappings of keyword arguments; tuples or lists, of which the first element
            is taken (inputs with labels); anything else with `forward`. A DataLoader, say. As they
            come in training: the size of a batch is part of what is judged.
        loss: called with the outputs and the targets: a batch's second element, or the batch itself
            where it is no pair. `torch.nn.functional.cross_entropy`, say. None takes the loss that
            the model returns, if it does.
        forward: calls the model: `lambda model, batch: model(batch.image, mask=batch.mask)`.
        against: other batches, those that the model will meet: is their distribution the same?
        max_batches: stop after so many.
        optimizer: the one that trains the model, or several, for their weight decay.
        exporting: the model is about to be exported or shipped as it is.
        select: codes, beginnings of codes ("SN1") or names of rules: only those judge.
        ignore: likewise: those do not.
        name: what the report calls a model; its class by default.
        progress: show how many forwards are done of how many, on a terminal; needs rich.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: a file that cannot be read, in one line; no batches; an unknown rule; batches
            for a checkpoint, a Keras model or a model on the meta device.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    >>> _ = model[1].running_var.fill_(float("inf"))
    >>> report = diagnose(model)
    >>> [(finding.code, finding.layer) for finding in report.findings]
    [('SN102', '1'), ('SN201', '1')]
    >>> report.findings[0].message
    'running_var is infinite in 3 of 3 channels'
    """
    of_models = {
        "batches": batches, "loss": loss, "against": against, "optimizer": optimizer,
        "forward": forward, "max_batches": max_batches, "exporting": exporting or None,
    }  # fmt: skip
    if is_keras(target):
        _refuse(
            of_models, "is for torch models; of a Keras model the layers' state alone is judged"
        )
        return judge(probe_keras(target), select=select, ignore=ignore)
    state = getattr(target, "state_dict", None)
    stored = state if isinstance(state, Mapping) else target  # torch.export's; a module's is called
    if isinstance(stored, str | PathLike | Mapping):
        _refuse(
            of_models,
            "needs a model to go with it; got a checkpoint alone. Load it into its model and "
            "diagnose that",
        )
        from steadynorm.doctor.evidence.checkpoint import probe_state

        with needed_by("steadynorm.diagnose"):
            return judge(probe_state(stored), select=select, ignore=ignore)
    with needed_by("steadynorm.diagnose"):
        from torch import nn

        from steadynorm.doctor.evidence.model import probe_model
        from steadynorm.doctor.evidence.passes import Forwards
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"diagnose: `target` must be a torch.nn.Module, a checkpoint's path or a state dict; "
            f"got {type(target).__name__}."
        )
    with bar(progress and batches is not None) as show:
        evidence = probe_model(
            target, batches, loss=loss, forward=forward, against=against,
            max_batches=max_batches, optimizer=optimizer, exporting=exporting, target=name,
            forwards=Forwards(show),
        )  # fmt: skip
    return judge(evidence, select=select, ignore=ignore)


def _refuse(arguments: Mapping[str, Any], why: str) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise ValueError(f"diagnose: `{argument}` {why}.")


@contextmanager
def bar(shown: bool) -> Iterator[Callable[[int, int], object]]:
    """A bar of forwards on the terminal while the block runs; yields what shows how many are done
    of how many.
    """
    if not shown or not sys.stderr.isatty() or find_spec("rich") is None:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # A console of its own, on stderr: the caller may have a bar on the usual one.
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("diagnose: forwards", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
