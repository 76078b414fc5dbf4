"""Models that a tool cannot work on are refused, and left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import steadynorm as sn

X = torch.randn(4, 3, 6, 6)


def with_inputs(tool: str, model: nn.Module) -> Any:
    if tool == "calibrate":
        return sn.calibrate(model, [X], progress=False)
    return getattr(sn, tool)(model, example_inputs=X)


@pytest.mark.parametrize("tool", ["convert", "fold", "drop_redundant_bias", "calibrate"])
def test_lazy_models_are_refused_before_they_run(tool: str) -> None:
    """A run would turn the lazy layers into plain ones, and only half of that could be undone."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    with pytest.raises(ValueError, match=rf"{tool}: every part of `model` must .*; '0' is lazy"):
        with_inputs(tool, model)
    assert [type(part) for part in model] == [nn.LazyConv2d, nn.LazyBatchNorm2d]
    assert model(X).shape == (4, 4, 4, 4)


@pytest.mark.parametrize("tool", ["convert", "fold", "drop_redundant_bias", "calibrate"])
def test_models_without_values_are_refused_before_they_run(tool: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().to("meta")
    with pytest.raises(ValueError, match=rf"{tool}: `model` must hold values; those of '0' are on"):
        with_inputs(tool, model)


@pytest.mark.parametrize("tool", ["fold", "drop_redundant_bias"])
def test_replicas_are_refused(tool: str) -> None:
    """Their wrapper would go on waiting for the gradients and buffers that are gone."""
    kind = nn.parallel.DistributedDataParallel
    wrapped = kind.__new__(kind)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=rf"{tool}: `model` must not be wrapped .*model\.module"):
        getattr(sn, tool)(wrapped.eval())


def test_without_inputs_lazy_layers_are_left_and_named() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval()
    (change,) = sn.fold(model)[1]
    assert change.why == "it is lazy and has not seen an input yet"
    (change,) = sn.drop_redundant_bias(model)[1]
    assert change.why == "it is lazy and has not seen an input yet"
    assert [f.code for f in sn.diagnose(model).findings] == []


@pytest.mark.parametrize("unflattened", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_exported_models_are_refused(ours: bool, unflattened: bool) -> None:
    """They hold no layers: the weight of a batch norm would get weight decay as any other."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = torch.export.export(sn.convert(model)[0] if ours else model, (X,))
    exported = torch.export.unflatten(program) if unflattened else program.module()
    calls = {
        "convert": sn.convert,
        "fold": sn.fold,
        "freeze": sn.freeze,
        "calibrate": lambda m: sn.calibrate(m, [X]),
        "parameter_groups": lambda m: sn.parameter_groups(m, weight_decay=0.1),
    }
    for tool, call in calls.items():
        with pytest.raises(TypeError) as raised:
            call(exported)  # type: ignore[operator]
        assert str(raised.value) == (
            f"{tool}: `model` must not be made by torch.export, which keeps operators and no "
            f"layers to recognize; '1' holds the statistics of a batch norm. Give the model from "
            f"before torch.export.export."
        )
    sn.convert(torch.export.export(nn.Linear(3, 4), (torch.randn(2, 3),)).module())
