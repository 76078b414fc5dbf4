"""Safe cures on a copy: what they mend, what they leave, and the file they write."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.doctor.fixtures.small import images, small
from tests.doctor.gallery.networks import accuracy, batches, fit, fresh, norms, trained
from tests.models.calibration.test_untouched import picture
from tests.models.surgery.test_models import relative
from torch import nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.doctor.fixes import ACTS, Fixed, acts, fix
from steadynorm.doctor.rules import all_rules
from steadynorm.models.changes import Change


def mended(model: nn.Module, *given: object, **named: object) -> Fixed:
    report = sn.diagnose(model, *given, **named)
    named.pop("select", None)
    return fix(model, report, *given, **named)


def codes(fixed: Fixed) -> tuple[list[str], list[str]]:
    before, after = ({f.code for f in r.findings} for r in (fixed.before, fixed.after))
    return sorted(before - after), sorted(after - before)


def test_statistics_never_updated_are_measured() -> None:
    network = trained("convolutional")
    for norm in norms(network):
        norm.reset_running_stats()
    data = batches()
    before, bad = picture(network), accuracy(network)
    fixed = mended(network, data, loss=F.cross_entropy)
    assert picture(network)["values"] == before["values"]
    assert {"SN101", "SN302", "SN301"} <= {f.code for f in fixed.before.findings}
    assert fixed.after.findings == ()
    assert [change.what for change in fixed.changes] == ["calibrated"] * 3
    assert bad < 0.9
    assert accuracy(fixed.model) > 0.95


def test_calibration_goes_layer_by_layer_where_batches_are_small() -> None:
    network = fit(fresh(), size=2, steps=300, rate=5e-4)
    data = batches(2, count=150)
    expected = copy.deepcopy(network)
    norms(network)[1].running_mean += 2  # else there is nothing to gain
    sn.calibrate(expected, data, passes="layerwise", progress=False)
    fixed = mended(network, data, loss=F.cross_entropy)
    for mine, theirs in zip(norms(fixed.model), norms(expected), strict=True):
        assert torch.equal(mine.running_mean, theirs.running_mean)
        assert torch.equal(mine.running_var, theirs.running_var)


def test_a_redundant_bias_goes_and_answers_stay() -> None:
    model = small()
    model[3].bias = nn.Parameter(torch.ones(4))
    model[4].running_mean += 1
    fixed = mended(model, select=["SN201"])
    assert "3.bias" not in fixed.model.state_dict()
    assert codes(fixed) == (["SN201"], [])
    with torch.no_grad():
        assert relative([model(images())], [fixed.model(images())]) < 1e-6


def test_freezing_is_left_to_the_user() -> None:
    """In a momentum encoder the parameters are held and the statistics are meant to move."""
    model = small()
    model[:2].requires_grad_(False)
    fixed = mended(model.train(), select=["SN203"])
    assert [f.safe for f in fixed.before.findings if f.code == "SN203"] == [False]
    assert (codes(fixed)[0], len(fixed.changes)) == ([], 0)
    before = norms(fixed.model)[0].running_mean.clone()
    fixed.model.train()(images())
    assert not torch.equal(norms(fixed.model)[0].running_mean, before)


def test_half_precision_statistics_become_float32_and_stay_so() -> None:
    model = small()
    model[1].running_mean = model[1].running_mean.half()
    model[1].running_var = model[1].running_var.half()
    fixed = mended(model, select=["SN109"])
    assert codes(fixed)[0] == ["SN109"]
    layer = fixed.model.bfloat16()[1]
    assert layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_var, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    # The one that had nothing wrong is torch's still.
    assert type(fixed.model[4]) is nn.BatchNorm2d


def test_without_batches_nothing_is_measured_and_it_says_so() -> None:
    model = small()
    model[1].reset_running_stats()
    fixed = mended(model)
    assert [(c.what, c.where, c.why) for c in fixed.changes] == [("left", "1", "no batches given")]


def test_statistics_that_the_weights_were_trained_with_are_left() -> None:
    """Batch norms held in inference mode all along: 0 and 1 are what the others learned with."""
    network = fresh()

    def hold(_: int) -> None:
        for norm in norms(network):
            norm.eval()

    fit(network, before=hold)
    fixed = mended(network, batches(), loss=F.cross_entropy)
    assert fixed.before.findings[0].code == "SN101"
    assert fixed.before.findings[0].line == "model.train()"
    assert "calibration alone would raise the loss from " in fixed.before.findings[0].cure
    assert [change.what for change in fixed.changes] in ([], ["left"])
    assert accuracy(fixed.model) == accuracy(network) > 0.97


def test_statistics_are_not_measured_on_shifted_data() -> None:
    network = trained("convolutional")
    pale = [(images / 3, labels) for images, labels in batches(seed=2)]
    fixed = mended(network, pale, loss=F.cross_entropy, against=batches())
    assert {"SN306", "SN302"} <= {f.code for f in fixed.before.findings}
    assert [(change.what, change.why[:24]) for change in fixed.changes] == [
        ("left", "the two sets of data dif")
    ]


def test_batches_that_are_not_finite_are_left_with_the_reason() -> None:
    network = trained()
    norms(network)[0].reset_running_stats()
    data = batches()
    data[2][0][0] = torch.nan
    (change,) = mended(network, data).changes
    assert (change.what, change.where) == ("left", "2")
    assert "the input of '2' must be finite" in change.why


def test_batches_that_can_be_read_once_are_refused() -> None:
    report = sn.diagnose(small(), [images()])
    with pytest.raises(TypeError, match="`batches` must be readable repeatedly"):
        fix(small(), report, iter([images()]))


def test_no_more_batches_are_read_than_asked_for() -> None:
    class Endless:
        read = 0

        def __iter__(self) -> Iterator[object]:
            for batch in itertools.cycle(batches()):
                self.read += 1
                assert self.read < 1000
                yield batch

    network = trained()
    for norm in norms(network):
        norm.reset_running_stats()
    fixed = mended(network, Endless(), loss=F.cross_entropy, max_batches=8)
    assert {change.what for change in fixed.changes} == {"calibrated"}
    expected = copy.deepcopy(network)
    sn.calibrate(expected, batches()[:8], progress=False)
    for mine, theirs in zip(norms(fixed.model), norms(expected), strict=True):
        assert torch.equal(mine.running_mean, theirs.running_mean)


def test_a_healthy_model_is_left_alone() -> None:
    data = [images(64) for _ in range(1)]
    model = small()
    sn.calibrate(model, data, progress=False)
    fixed = mended(model, data)
    assert (len(fixed.changes), str(fixed.changes)) == (0, "nothing to do")


def test_every_safe_cure_is_one_that_can_be_applied() -> None:
    from steadynorm.doctor.fixes import ACTS

    for rule in all_rules():
        finding = rule.finding(None, "", {})
        if rule.safe:
            assert set(acts(finding)) <= set(ACTS), rule.code
            assert acts(finding), rule.code


@pytest.mark.parametrize("name", ["mended.pt", "mended.safetensors"])
def test_the_file_is_replaced_whole(tmp_path: Path, name: str) -> None:
    model = small()
    path = tmp_path / name
    path.write_bytes(b"what was there before")
    fixed = mended(model, select=["SN201"])
    fixed.write(path)
    held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert held.keys() == fixed.model.state_dict().keys()
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_calibration_is_left_where_the_loss_would_rise() -> None:
    """A network trained on with statistics held far from the data's."""
    network = fresh()
    for norm in norms(network):
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(4.0)

    def hold(_: int) -> None:
        for norm in norms(network):
            norm.eval()

    fit(network, before=hold)
    report = sn.diagnose(network, batches(), loss=F.cross_entropy)
    safe = [replace(f, line="sn.calibrate(model, batches)", safe=True) for f in report.findings]
    fixed = fix(network, replace(report, findings=tuple(safe)), batches(), loss=F.cross_entropy)
    (change,) = fixed.changes
    assert change.what == "left"
    assert change.why.startswith("the loss on batches held back does not clearly fall: ")


def test_calibration_is_left_where_nothing_is_gained() -> None:
    """A network trained on 2 samples at a time, whose averages are as good as measured ones."""
    network = fit(fresh(), size=2, steps=300, rate=5e-4)
    fixed = mended(network, batches(2, count=150), loss=F.cross_entropy)
    assert "calibrate" in {act for finding in fixed.before.findings for act in acts(finding)}
    (change,) = fixed.changes
    assert change.what == "left"
    assert change.why.startswith("the loss on batches held back does not clearly fall: ")
    for mine, theirs in zip(norms(fixed.model), norms(network), strict=True):
        assert torch.equal(mine.running_mean, theirs.running_mean)


@pytest.mark.parametrize(
    ("value", "reason"), [(0.0, "inference rose from "), (torch.nan, "inference is no longer fin")]
)
def test_a_cure_that_makes_it_worse_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, value: float, reason: str
) -> None:
    """Whatever the cure: the loss of inference before and after decides."""

    def spoil(model: nn.Module, _: object, layers: list[str]) -> Iterator[Change]:
        with torch.no_grad():
            model[-1].weight.fill_(value)  # type: ignore[index]
        yield Change("dropped", layers[0], "", "", "")

    network = trained("convolutional")
    network[0].register_parameter("bias", nn.Parameter(torch.zeros(network[0].out_channels)))
    monkeypatch.setitem(ACTS, "drop_redundant_bias", spoil)
    fixed = mended(network, batches(), loss=F.cross_entropy)
    (change,) = fixed.changes
    assert (change.what, change.where) == ("left", "1")
    assert change.why.startswith(f"taken back: the loss of {reason}")
    assert accuracy(fixed.model) == accuracy(network)
