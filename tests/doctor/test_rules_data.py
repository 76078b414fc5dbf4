"""Where the rules of data speak and how severely, on evidence made up to lie on either side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steadynorm.doctor import Finding, Severity
from steadynorm.doctor.evidence.divergence import divergence, running_divergence
from steadynorm.doctor.evidence.losses import loss_change
from steadynorm.doctor.evidence.records import (
    ClassScatter,
    Evidence,
    LossByMode,
    ModelData,
    ModelFacts,
    NormData,
    NormEvidence,
    NormState,
    NormUsage,
    Padding,
    Saturation,
    WeightGradient,
)
from steadynorm.doctor.rules import find_rule
from steadynorm.doctor.rules.sn309_batches_not_mixed import scatter_limit

INFO, WARNING, ERROR = Severity
ZEROS, ONES = np.zeros(8), np.ones(8)


def layer(name: str = "norm", policy: str = "Batch", **given: Any) -> NormEvidence:
    """A layer on 32 batches of 16 samples of mean 0 and variance 1, which its statistics are."""
    state = NormState(8, "torch", 1e-5, 0.1, ONES, ZEROS, ZEROS, ONES)
    fields = {"running_mean", "running_var"} & given.keys()
    state = replace(state, **{name: given.pop(name) for name in fields})
    place = NormUsage(training=False, policy=policy, moves=True, trained={})
    place = replace(place, synchronized=given.pop("synchronized", False))
    if "worth" in given:
        given |= dict.fromkeys(("worth_of_mean", "worth_of_var"), given.pop("worth"))
    data = NormData(
        order=given.pop("order", 0), trains=True, samples=16, positions=1, values=512, calls=32,
        mean=ZEROS, var=ONES, var_of_means=ONES / 16, inference_mean=ZEROS, inference_var=ONES,
        worth_of_mean=1.0, worth_of_var=1.0, effective=16.0,
    )  # fmt: skip
    return NormEvidence(name, "BatchNorm1d", state, place, replace(data, **given))


def evidence(*layers: NormEvidence, replicas: int = 1, **given: Any) -> Evidence:
    model = ModelFacts("Sequential", False, 1, 1, replicas=replicas)
    return Evidence("test", layers, model, ModelData(**{"batches": 32, "gap": 0.1, **given}))


def said(code: str, *layers: NormEvidence, **given: Any) -> list[Finding]:
    return list(find_rule(code).check(evidence(*layers, **given)))


def severity(code: str, *layers: NormEvidence, **given: Any) -> Severity | None:
    found = said(code, *layers, **given)
    assert len(found) <= 1
    return found[0].severity if found else None


def losses(
    training: float, inference: float, calibrated: float, scatter: float = 0.0
) -> LossByMode:
    """Of 16 batches, the differences' standard error being `scatter`."""
    wave = np.tile([1.0, -1.0], 8) * scatter * np.sqrt(15)
    return LossByMode(
        np.full(16, training), np.full(16, inference) + wave, np.full(16, calibrated)
    )  # fmt: skip


# --- the measures they share


def test_divergence_is_the_integral() -> None:
    """KL(N(0.3, 1.2²) ‖ N(1, 2²)), integrated."""
    x = np.linspace(-12, 12, 200_001)

    def density(mean: float, std: float) -> np.ndarray:
        return np.exp(-((x - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi) / std

    p, q = density(0.3, 1.2), density(1.0, 2.0)
    expected = np.sum(p * np.log(p / q)) * (x[1] - x[0])
    how = divergence(*map(np.array, ([1.0], [4.0], [0.3], [1.44])), 0.0, eps=0.0)
    assert how.kl[0] == pytest.approx(expected, rel=1e-6)
    assert how.shift[0] == pytest.approx(0.7 / 1.2)
    assert how.ratio[0] == pytest.approx(2 / 1.2)


def test_one_dead_channel_does_not_condemn_a_layer() -> None:
    wide = np.ones(128)
    var = wide.copy()
    var[0] = 0.0
    how = divergence(0 * wide, wide, 0 * wide, var, 0.0)
    assert how.kl[0] > 4
    assert not how.far


def test_little_data_is_no_evidence() -> None:
    """16 values in all know a mean to a quarter of a standard deviation."""
    shifted = layer(running_mean=0.25 * ONES)
    assert running_divergence(shifted).far  # type: ignore[union-attr]
    assert not running_divergence(replace(shifted, data=layer(values=16).data)).far  # type: ignore[union-attr]


def test_layers_that_somebody_holds_still_are_not_judged() -> None:
    assert running_divergence(layer(running_mean=ONES, trains=False)) is None
    assert running_divergence(layer(running_mean=np.nan * ONES)) is None


def test_gains_are_paired() -> None:
    after = np.linspace(1, 100, 16)
    gain = loss_change(after + 0.5, after)
    assert gain is not None
    assert gain.clear(100)
    assert gain.error == pytest.approx(0, abs=1e-12)
    assert loss_change(np.array([1.0, np.nan]), np.ones(2)) is None


# --- SN301 and SN302


@pytest.mark.parametrize(
    ("gap", "loss", "expected"),
    [
        (0.4, None, None),
        (0.6, None, INFO),  # no layer's statistics are off: the noise of single batches
        (0.6, losses(1.0, 1.0, 1.0), INFO),
        (0.6, losses(1.0, 0.5, 0.5), INFO),  # inference is the better one
        (0.4, losses(1.0, 1.15, 1.0), None),
        (0.4, losses(1.0, 1.25, 1.0), ERROR),
        (0.4, losses(1.0, 1.25, 1.0, scatter=0.1), None),
        (0.4, losses(0.001, 0.01, 0.001), None),  # ten times as much, and nothing
    ],
)
def test_sn301(gap: float, loss: LossByMode | None, expected: Severity | None) -> None:
    assert severity("SN301", layer(), gap=gap, loss=loss) is expected


def test_sn301_names_the_first_layer_by_calls() -> None:
    late = layer("early in the model", order=1, running_mean=ONES)
    first = layer("late in the model", order=0, running_mean=2 * ONES)
    (found,) = said("SN301", late, first, gap=0.6)
    assert (found.layer, found.evidence["first_layer"]) == ("", "late in the model")
    assert found.evidence["layers_affected"] == 2
    assert "first in 'late in the model': means 2 standard deviations off" in found.message


@pytest.mark.parametrize(
    ("shift", "loss", "expected"),
    [
        (0.15, None, None),
        (0.25, None, INFO),
        (0.4, None, WARNING),
        (1.5, None, ERROR),
        (1.5, losses(1, 1.0, 1.0), INFO),
        (1.5, losses(1, 1.04, 1.0), INFO),
        (0.4, losses(1, 1.1, 1.0), WARNING),
        (0.4, losses(1, 1.1, 1.0, scatter=0.06), INFO),
        (0.4, losses(1, 1.6, 1.0), ERROR),
    ],
)
def test_sn302(shift: float, loss: LossByMode | None, expected: Severity | None) -> None:
    assert severity("SN302", layer(running_mean=shift * ONES), loss=loss) is expected


def test_no_rule_advises_a_calibration_that_would_raise_the_loss() -> None:
    """As where a network was trained with its batch norms in inference mode."""
    initial = layer(mean=ONES, inference_mean=ONES)
    stale = layer(running_mean=ONES)
    for loss, advised in ((losses(1.4, 0.2, 1.3), False), (losses(0.2, 1.3, 0.2), True)):
        found = [*said("SN101", initial, gap=2.0, loss=loss)]
        for code in ("SN301", "SN302"):
            found += said(code, stale, gap=2.0, loss=loss)
        assert [finding.code for finding in found] == ["SN101", "SN301", "SN302"]
        for finding in found:
            assert ("sn.calibrate" in finding.line) is advised, finding.code
            assert ("the loss" in finding.cure) is not advised, finding.code
            assert bool(finding.safe) is advised, finding.code
    (told,) = said("SN302", stale, gap=2.0, loss=losses(1.4, 0.2, 1.3))
    assert told.cure == (
        "Do not calibrate: the loss would rise from 0.2 to 1.3. The weights fit the statistics "
        "that they have."
    )


# --- SN303 and SN304


@pytest.mark.parametrize(
    ("given", "replicas", "expected"),
    [
        ({"samples": 8}, 1, None),
        ({"samples": 7}, 1, WARNING),
        ({"samples": 3}, 1, ERROR),
        ({"samples": 2, "worth": 6.0, "positions": 64}, 1, None),
        ({"samples": 2, "worth": 1.5, "positions": 64}, 1, ERROR),
        ({"samples": 2, "policy": "Steady"}, 1, None),
        ({"samples": 2, "policy": "Frozen"}, 1, None),
        ({"samples": 2, "policy": "Ghost"}, 1, ERROR),
        ({"samples": 2, "trains": False}, 1, None),
        ({"samples": 2, "worth": None}, 1, None),
        ({"samples": 2, "synchronized": True}, 1, ERROR),
        ({"samples": 2, "synchronized": True}, 4, None),
    ],
)
def test_sn303(given: dict[str, Any], replicas: int, expected: Severity | None) -> None:
    assert severity("SN303", layer(**given), replicas=replicas) is expected


def test_sn303_names_the_smallest_batch_of_the_worst_layer() -> None:
    layers = [
        layer("wide", samples=2, worth=50.0, positions=64),
        layer("poor", order=1, samples=2, worth=3.0, positions=16),
        layer("worst", order=2, samples=2, worth=1.25, positions=4),
    ]
    (found,) = said("SN303", *layers)
    assert found.layer == "poor"
    assert found.evidence["worst_layer"] == "worst"
    assert found.evidence["smallest_batch"] == 7  # 8/1.25, rounded up
    assert "batches of at least 7, or pool them over replicas. Else train with Steady" in found.cure


def test_sn304_of_the_last_batch() -> None:
    assert severity("SN304", layer(), last_batch=1) is WARNING
    assert severity("SN304", layer(), last_batch=2) is None
    assert severity("SN304", layer(positions=64), last_batch=1) is None
    assert severity("SN304", layer(policy="Steady"), last_batch=1) is None
    assert severity("SN304", layer(single=(1, 8))) is ERROR


# --- SN305 to SN310


@pytest.mark.parametrize(
    ("share", "shift", "masked", "expected"),
    [
        (0.3, 0.5, False, WARNING), (0.3, 0.5, True, None),
        (0.04, 0.5, False, None), (0.3, 0.1, False, None),
    ],
)  # fmt: skip
def test_sn305(share: float, shift: float, masked: bool, expected: Severity | None) -> None:
    padding = Padding(share, ZEROS, ONES, shift * ONES, ONES, by_mask=False)
    assert severity("SN305", layer(padding=padding, masked=masked)) is expected


def test_sn306_says_which_set_the_statistics_fit() -> None:
    new = dict(reference_mean=ONES, reference_var=ONES)
    (fits_first,) = said("SN306", layer(**new))
    (fits_second,) = said("SN306", layer(**new, running_mean=ONES))
    assert "the running statistics fit the first set" in fits_first.message
    assert fits_first.line == "sn.calibrate(model, against)"
    assert "the running statistics fit the second set" in fits_second.message
    assert fits_second.line == "sn.calibrate(model, batches)"
    assert said("SN306", layer(reference_mean=0.1 * ONES, reference_var=ONES)) == []
    assert said("SN306", layer()) == []


def test_sn306_where_no_cure_could_be_tried() -> None:
    (finding,) = said(
        "SN306", layer(reference_mean=ONES, reference_var=ONES),
        loss=losses(0.5, 0.5, 0.5), cures={"none": np.full(16, 0.75)},
    )  # fmt: skip
    assert finding.message.endswith("tried on the second set, the loss is 0.75")


@pytest.mark.parametrize(("share", "expected"), [(0.5, None), (0.6, WARNING), (0.95, ERROR)])
def test_sn307(share: float, expected: Severity | None) -> None:
    assert severity("SN307", layer(saturation=Saturation("tanh", share, 0.0))) is expected


@pytest.mark.parametrize(
    ("first", "expected"), [(1e-3, None), (5e-5, WARNING), (5e-7, ERROR), (0.0, ERROR)]
)
def test_sn308(first: float, expected: Severity | None) -> None:
    """A quarter of the layers at either end: the largest of the first, the median of the last."""
    sizes = [first, 1e-9, 0.0, *(0.1 for _ in range(6)), 1e-3, 1.0, 1.0]
    found = [WeightGradient(str(index), size) for index, size in enumerate(sizes)]
    assert severity("SN308", layer(), gradients=tuple(found)) is expected
    assert severity("SN308", layer(), gradients=tuple(found[:2])) is None


@pytest.mark.parametrize(
    ("first", "first_input", "expected"),
    [
        (1e-3, 0.05, WARNING),
        (1e-3, 0.2, None),  # a branch beside a residual path
        (1e-3, None, None),
        (0.02, 0.05, None),
        (5e-5, 0.2, WARNING),
        (5e-7, 0.05, ERROR),
    ],
)
def test_sn308_by_the_inputs_too(
    first: float, first_input: float | None, expected: Severity | None
) -> None:
    inputs = (None, first_input, 0.3, 0.3, 1.0)
    sizes = zip((first, 1e-5, 0.1, 0.1, 1.0), inputs, strict=True)
    found = tuple(WeightGradient(str(index), *pair) for index, pair in enumerate(sizes))
    if first_input is None:
        found = tuple(replace(gradient, of_input=None) for gradient in found)
    assert severity("SN308", layer(), gradients=found) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"effective": 7.2}, WARNING),
        ({"effective": 7.9}, None),
        ({"effective": None}, None),
        ({"effective": 3.9, "samples": 7}, None),
        ({"effective": 3.9, "policy": "Steady"}, None),
        ({"effective": 3.9, "calls": 64}, None),  # twice a forward, on two kinds of input
        ({"effective": 30.0, "worth": 10.0}, WARNING),
        ({"effective": 10.0, "independent_channels": 2.0}, None),
        ({"effective": 10.0, "independent_channels": 8.0}, WARNING),
        ({"effective": 11.0, "independent_channels": 64.0}, None),  # sure, and of no weight
    ],
)
def test_sn309(given: dict[str, Any], expected: Severity | None) -> None:
    assert severity("SN309", layer(**given)) is expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (ClassScatter(16, 1.6, 1.3), WARNING),
        (ClassScatter(16, 1.6, 1.7), None),
        (ClassScatter(16, 1.4, 1.3), None),
        (ClassScatter(4, 1.6, 1.3), None),
    ],
)
def test_sn309_by_classes(classes: ClassScatter, expected: Severity | None) -> None:
    assert severity("SN309", layer(), class_scatter=classes) is expected
    assert severity("SN309", layer(policy="Steady"), class_scatter=classes) is None


def test_sn309_says_what_a_batch_counts_for_by_its_classes() -> None:
    (finding,) = said("SN309", layer(), class_scatter=ClassScatter(16, 4.0, 1.3))
    assert finding.message == (
        "a batch of 16 samples counts for 4: the numbers of each class in a batch scatter 2 times "
        "as far as those of mixed ones would"
    )
    assert finding.evidence == {"samples": 16, "count_for": 4.0}


def test_the_more_layers_are_looked_at_the_further_one_must_scatter() -> None:
    alike = {"effective": 9.4, "independent_channels": 6.0}
    assert scatter_limit(32, 6.0) < 16 / 9.4 < scatter_limit(32, 6.0, 60_000)
    assert severity("SN309", layer(**alike)) is WARNING
    others = (layer(str(number)) for number in range(60_000))
    assert severity("SN309", layer(**alike), *others) is None


def test_sn310() -> None:
    assert severity("SN310", layer("a"), layer("b"), first_nonfinite="b") is ERROR
    assert severity("SN310", layer("a")) is None


def test_without_batches_they_say_nothing() -> None:
    bare = Evidence("test", (replace(layer(), data=None),))
    for code in (f"SN3{number:02}" for number in range(1, 14)):
        assert list(find_rule(code).check(bare)) == []
