"""`diagnose`, and the report it returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules import all_rules, find_rule

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Report:
    """What the rules found, worst first, and the evidence they judged.

    A finding that another one explains comes after it and names it in `because`, whatever its own
    severity. Then the model's order of layers decides, then the code: the same evidence always
    gives the same order. `codes` are the rules that were asked.
    """

    findings: tuple[Finding, ...]
    evidence: Evidence
    codes: tuple[str, ...]

    @cached_property
    def worst(self) -> Severity | None:
        """The highest severity found, None where nothing was."""
        return max((finding.severity for finding in self.findings), default=None)

    def __str__(self) -> str:
        lines = [f"{self.evidence.target}: {len(self.findings)} findings"]
        for finding in self.findings:
            place = finding.layer or "(model)"
            lines += [
                f"{finding.code} {finding.severity} {place}: {finding.message}",
                f"    {finding.cure} {finding.line}",
            ]
        return "\n".join(lines)


def judge(evidence: Evidence, *, select: Iterable[str] = (), ignore: Iterable[str] = ()) -> Report:
    """What the rules say of evidence; `select` and `ignore` take codes or beginnings of codes."""
    only, without = _prefixes(select, "select"), _prefixes(ignore, "ignore")
    rules = [
        rule
        for rule in all_rules()
        if (not only or rule.code.startswith(only))
        and not (without and rule.code.startswith(without))
    ]
    found = [finding for rule in rules for finding in rule.check(evidence)]
    return Report(ordered(found, evidence), evidence, tuple(rule.code for rule in rules))


def ordered(findings: Iterable[Finding], evidence: Evidence) -> tuple[Finding, ...]:
    """The order of a report, with `because` filled in."""
    place = {layer.name: number for number, layer in enumerate(evidence.layers)}
    explains = {rule.code: rule.explains for rule in all_rules()}
    explained = [_explained(finding, list(findings), explains) for finding in findings]
    present = {finding.code for finding in explained}

    def weight(finding: Finding) -> Severity:
        """Its own severity, or that of the worst it explains: a cause comes first."""
        caused = [f.severity for f in explained if finding.code in f.because]
        return max([finding.severity, *caused])

    def depth(code: str, seen: frozenset[str] = frozenset()) -> int:
        causes = {c for c in present - seen if code in explains.get(c, ())}
        return max((1 + depth(cause, seen | {code}) for cause in causes), default=0)

    return tuple(
        sorted(
            explained,
            key=lambda f: (-weight(f), depth(f.code), place.get(f.layer, -1), f.code),
        )
    )


def _explained(
    finding: Finding, findings: list[Finding], explains: Mapping[str, tuple[str, ...]]
) -> Finding:
    """With the codes that explain it: in the same layer, or where either speaks of the model."""
    causes = {
        other.code
        for other in findings
        if finding.code in explains.get(other.code, ())
        and (other.layer == finding.layer or "" in (other.layer, finding.layer))
    }
    return replace(finding, because=tuple(sorted(causes)))


def _prefixes(codes: Iterable[str], argument: str) -> tuple[str, ...]:
    """Checked against the rules there are: a misspelt code would otherwise hide everything."""
    given = tuple(find_rule(c).code if "-" in c else c.upper() for c in codes)
    for code in given:
        if not any(rule.code.startswith(code) for rule in all_rules()):
            raise ValueError(f"diagnose: `{argument}` names no rule: {code!r}.")
    return given


def diagnose(
    target: nn.Module | str | Path | Mapping[str, Any],
    batches: Iterable[Any] | None = None,
    *,
    loss: Any = None,
    forward: Any = None,
    against: Iterable[Any] | None = None,
    max_batches: int | None = None,
    optimizer: Any = None,
    exporting: bool = False,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> Report:
    """Find what is wrong with a network's batch norms, and say what to do."""
    from torch import nn

    from steadynorm.doctor.probe import probe_model, probe_state

    if isinstance(target, nn.Module):
        evidence = probe_model(
            target,
            batches,
            loss=loss,
            forward=forward,
            against=against,
            max_batches=max_batches,
            optimizer=optimizer,
            exporting=exporting,
        )
    else:
        evidence = probe_state(target)
    return judge(evidence, select=select, ignore=ignore)
