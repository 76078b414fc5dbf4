"""The survey of architectures sees what is wrong, refused and right."""

from importlib import import_module
from typing import Any

import pytest
import torch
from tests.models.surgery.variants import VARIANTS
from torch import nn

from steadynorm.models.convert import convert

pytest.importorskip("monai", reason="an optional extra")
pytest.importorskip("transformers", reason="an optional extra")
survey = import_module("benchmarks.survey")
SOME = [
    "transformers ResNet (layer_type=bottleneck, hidden_act=silu, downsample_in_first_stage=True)",
    "transformers PatchTST ForClassification (pre_norm=True, activation_function=relu)",
    "MONAI VNet (act=elu, bias=False)",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_there_are_a_hundred() -> None:
    assert len(VARIANTS) >= 100


@pytest.mark.parametrize("name", SOME)
def test_variants(name: str) -> None:
    found = survey.examine(name, VARIANTS[name])
    assert found.wrong == found.reasons == ()
    assert found.norms == found.kept > 0
    assert 0 < found.largest < 1e-9


def test_a_wrong_conversion_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> Any:
        made, changes = convert(model)
        norm: Any = next(m for m in made.modules() if isinstance(m, nn.BatchNorm2d))
        norm.eps += 1e-5
        return made, changes

    monkeypatch.setattr(survey, "convert", wrong)
    found = survey.examine(SOME[0], VARIANTS[SOME[0]])
    assert {what.partition(":")[0] for what in found.wrong} == {
        "inference after convert",
        "outputs of a training step",
        "buffers of a training step",
        "gradients of a training step",
        "fold after convert",
    }


def test_an_error_is_wrong_and_a_refusal_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(model: nn.Module, inputs: Any = None) -> Any:
        raise ValueError("no")

    def breaks(model: nn.Module, inputs: Any = None) -> Any:
        made, changes = convert(model)
        made.forward = lambda *args, **kwargs: 1 / 0
        return made, changes

    monkeypatch.setattr(survey, "convert", refuses)
    monkeypatch.setattr(survey, "fold", breaks)
    found = survey.examine(SOME[0], VARIANTS[SOME[0]])
    assert found.reasons == ("convert refuses the model: no",)
    assert found.wrong == ("fold: ZeroDivisionError: division by zero",)


def test_differences() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.ones(2)
    assert survey.difference([nan], [nan]) == 0
    assert survey.difference([nan], [one]) == float("inf")
    assert survey.difference([one], [torch.ones(3)]) == float("inf")
    assert survey.difference([one], [one * 1.5]) == 0.5
