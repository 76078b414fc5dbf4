"""Reports made by hand, with what is hard to show: hostile names, numbers that are not finite."""

from __future__ import annotations

import numpy as np

from steadynorm.doctor import Finding, Report, Severity
from steadynorm.doctor.evidence.records import (
    Evidence,
    LossByMode,
    ModelData,
    ModelFacts,
    NormData,
    NormEvidence,
    NormState,
    NormUsage,
)
from steadynorm.doctor.evidence.training import Reading, TrainingRun
from steadynorm.doctor.rules import find_rule

SCRIPT = "<script>alert(1)</script>"
NAMES = ("stem.bn", SCRIPT, "body.0.bn", "body.1.bn", "head.bn")
CHANNELS = 6


def layer(index: int, name: str, *, data: bool = True) -> NormEvidence:
    """Running statistics that lie further off with depth: by `index`/10, and half as wide."""
    chance = np.random.default_rng(index)
    mean, var = chance.normal(size=CHANNELS), chance.uniform(0.5, 2.0, CHANNELS)
    shown = NormData(
        order=index, trains=True, samples=8, positions=4, values=96, calls=3, mean=mean, var=var,
        var_of_means=var / 8, inference_mean=mean, inference_var=var, worth_of_mean=4.0,
        worth_of_var=4.0,
    )  # fmt: skip
    state = NormState(
        CHANNELS, "torch", 1e-5, 0.1, np.ones(CHANNELS), np.zeros(CHANNELS),
        mean + index / 10, var / 4, {"running_mean": "float32"}, 120,
    )  # fmt: skip
    place = NormUsage(training=True, policy="Batch", moves=True, trained={"weight": True})
    return NormEvidence(name, "BatchNorm2d", state, place, shown if data else None)


def finding(code: str, severity: Severity, where: str, *, because: tuple[str, ...] = ()) -> Finding:
    rule = find_rule(code)
    return Finding(
        code, rule.name, severity, where, f"what {code} says of it, with 1.5", {"of_it": 1.5},
        rule.cure, f"cure({code!r})", rule.safe, because,
    )  # fmt: skip


def report() -> Report:
    """Two errors of one kind, one that follows from them, a remark: in this order."""
    losses = LossByMode(np.full(3, 0.5), np.full(3, 2.0), np.full(3, 0.75))
    data = ModelData(batches=3, samples=24, loss=losses, gap=1.5, mended=1.0)
    evidence = Evidence(
        "shop.models:resnet",
        tuple(layer(index, name) for index, name in enumerate(NAMES)),
        ModelFacts("ResNet", True, 1000, 1000),
        data,
        ("body.2.bn was not called",),
    )
    odd = Finding(
        "SN102", find_rule("SN102").name, Severity.INFO, "head.bn", "[red]not[/red] \x1b[31mfinite",
        {"largest": float("inf"), "none": float("nan"), "type": "float16"},
    )  # fmt: skip
    findings = (
        finding("SN101", Severity.ERROR, SCRIPT),
        finding("SN101", Severity.ERROR, "body.0.bn"),
        finding("SN301", Severity.WARNING, "", because=("SN101",)),
        odd,
    )
    return Report(findings, evidence, ("SN101", "SN102", "SN301"), ("SN401", "SN402"))


def sound() -> Report:
    return Report((), report().evidence, ("SN101", "SN102", "SN301"))


def weights_alone() -> Report:
    layers = tuple(layer(i, n, data=False) for i, n in enumerate(NAMES))
    return Report(
        (finding("SN101", Severity.ERROR, SCRIPT),), Evidence("old.pt", layers), ("SN101",),
        ("SN201", "SN301"),
    )  # fmt: skip


def empty() -> Report:
    return Report((), Evidence("empty.pt", ()), ("SN101",))


def watched(layers: int = 3) -> Report:
    """A run of 40 steps, one in 4 read; the last layer has no gradient and one bad reading."""
    names = tuple(f"layer{index}" for index in range(layers))
    bad = float("nan")
    readings = tuple(
        Reading(step, name, bad, bad, bad, 0.25, 0.5, bad, 2)
        if (step, name) == (20, names[-1])
        else Reading(step, name, 1.0 / (step + 1), 1.25, 0.125, 0.25, 0.5, 0.0625, 0)
        for step in range(0, 40, 4)
        for name in names
    )
    evidence = Evidence(
        "ResNet", tuple(layer(index, name, data=False) for index, name in enumerate(names)),
        ModelFacts("ResNet", True, 1000, 1000), run=TrainingRun(40, 4, names, readings),
    )  # fmt: skip
    return Report((finding("SN401", Severity.ERROR, names[-1]),), evidence, ("SN401",))
