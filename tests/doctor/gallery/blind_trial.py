"""One trial of the blind gallery: plant, diagnose, cure, and what each was worth."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from tests.doctor.fixtures.case import Case
from tests.doctor.gallery.all_faults import FAULTS
from tests.doctor.gallery.blind import KINDS, Draw, Planted, healthy, sound
from tests.doctor.gallery.networks import digits
from torch import Tensor, nn
from torch.nn import functional as F

from steadynorm.doctor import Report, Severity
from steadynorm.doctor.fixes import Repair, acts, fix

SEEDS = 2
"""Healthy networks of each kind in a hundred of draws, in which faults are planted."""

GOLDEN = 0.618034

ACT_OF = {"converted": "convert", "dropped": "drop_redundant_bias", "calibrated": "calibrate"}
"""What did a change, by what the change says."""

Trial = dict[str, Any]


def trial(name: str, number: int) -> Trial:
    """Strengths spread evenly however many draws there are; places and networks are by chance.

    Each hundred of numbers has networks, digits and places of its own.
    """
    fault = FAULTS[name]
    chance = torch.Generator().manual_seed(crc32(name.encode()) + number)
    kind = list(KINDS)[int(torch.randint(len(KINDS), (1,), generator=chance))]
    seed = number - number % 100 + number % SEEDS
    sound = healthy(kind, seed)
    torch.manual_seed(number)
    planted = fault.plant(Draw(kind, seed, (0.5 + GOLDEN * number) % 1, chance))
    report = planted.case.diagnose()
    right = correct(planted.network, planted)
    lost = correct(planted.twin or sound) - right
    codes = list(dict.fromkeys(finding.code for finding in report.findings))
    return {
        "fault": name, "code": fault.code, "unit": fault.unit, "kind": kind, "number": number,
        "amount": planted.amount, "codes": codes, "cost": float(lost.mean()),
        "cost_error": interval(lost), **_cured(planted, report, right, fault.code),
    }  # fmt: skip


def interval(difference: Tensor) -> float:
    """2.58 standard errors of a mean over digits."""
    return 2.58 * float(difference.std()) / len(difference) ** 0.5


def _cured(planted: Planted, report: Report, before: Tensor, code: str) -> Trial:
    """What `--fix` gains in accuracy, its interval, and whether it acts on the fault or on what
    follows from it; none where it changes nothing.
    """
    case = planted.case
    if not isinstance(case, Case) or not isinstance(case.target, nn.Module):
        return {}
    acting = [finding for finding in report.findings if acts(finding)]
    if not acting:
        return {}
    fixed = fix(case.target, report, **case.given)
    if {change.what for change in fixed.changes} <= {"left"}:
        return {}
    gain = correct(fixed.model, planted) - before
    repair = Repair(report, case.given.get("batches"), case.given)
    made = {ACT_OF[change.what] for change in fixed.changes if change.what in ACT_OF}
    done = {(act, layer) for act in made for layer in repair.layers(act)}
    own = any(
        code in (finding.code, *finding.because)
        and done & {(act, finding.layer) for act in acts(finding)}
        for finding in acting
    )
    return {"gain": float(gain.mean()), "error": interval(gain), "own_cure": own}


@torch.no_grad()
def correct(network: nn.Module, planted: Planted | None = None) -> Tensor:
    """1 for each digit that inference reads rightly, of those that no network was trained on."""
    images, labels = digits()[2:]
    torch.manual_seed(0)
    x = F.interpolate(images, scale_factor=2)
    answer = network.eval()(x) if planted is None else planted.answers(network, planted.seen(x))
    return (answer.argmax(1) == labels).double()


def healthy_trial(number: int) -> list[str]:
    """The errors and warnings that a healthy network gets, and its training."""
    torch.manual_seed(number)
    findings = [f for seen in sound(number) for f in seen.diagnose().findings]
    return [finding.code for finding in findings if finding.severity > Severity.INFO]
