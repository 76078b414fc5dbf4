"""One trial of the blind gallery: plant, diagnose, cure, and what each was worth."""

from __future__ import annotations

from typing import Any

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.all_faults import FAULTS
from tests.doctor.gallery.blind import KINDS, Draw, Planted, healthy, sound
from tests.doctor.gallery.networks import digits
from tests.doctor.outside import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.doctor import Report, Severity
from steadynorm.doctor.fixes import acts, fix

SEEDS = 3
"""Healthy networks of each kind, in which faults are planted."""

GOLDEN = 0.618034

Trial = dict[str, Any]


def trial(name: str, number: int) -> Trial:
    """Strengths spread evenly however many draws there are; places and networks are by chance."""
    fault = FAULTS[name]
    chance = torch.Generator().manual_seed(1000 * list(FAULTS).index(name) + number)
    kind = list(KINDS)[int(torch.randint(len(KINDS), (1,), generator=chance))]
    torch.manual_seed(number)
    seed, strength = number % SEEDS, (0.5 + GOLDEN * number) % 1
    planted = fault.plant(Draw(kind, seed, strength, chance))
    report = planted.case.diagnose()
    right = correct(planted.network, planted)
    before = healthy(kind, seed)[1] if planted.twin is None else accuracy(planted.twin)
    codes = list(dict.fromkeys(finding.code for finding in report.findings))
    return {
        "fault": name, "code": fault.code, "unit": fault.unit, "kind": kind,
        "amount": planted.amount, "codes": codes, "cost": before - float(right.mean()),
        **_cured(planted, report, right),
    }  # fmt: skip


def _cured(planted: Planted, report: Report, before: Tensor) -> Trial:
    """What `--fix` gains in accuracy, and 2.58 standard errors of that; none where it changes
    nothing.
    """
    case = planted.case
    if not isinstance(case, Case) or not isinstance(case.target, nn.Module):
        return {}
    if not any(acts(finding) for finding in report.findings):
        return {}
    fixed = fix(case.target, report, **case.given)
    if {change.what for change in fixed.changes} <= {"left"}:
        return {}
    gain = correct(fixed.model, planted) - before
    return {"gain": float(gain.mean()), "error": 2.58 * float(gain.std()) / len(gain) ** 0.5}


@torch.no_grad()
def correct(network: nn.Module, planted: Planted) -> Tensor:
    """1 for each digit that inference reads rightly, of those that no network was trained on."""
    images, labels = digits()[2:]
    torch.manual_seed(0)
    x = planted.seen(F.interpolate(images, scale_factor=2))
    return (network.eval()(x).argmax(1) == labels).double()


def healthy_trial(number: int) -> list[str]:
    """The errors and warnings that a healthy network gets."""
    torch.manual_seed(number)
    findings = sound(number).diagnose().findings
    return [finding.code for finding in findings if finding.severity > Severity.INFO]
