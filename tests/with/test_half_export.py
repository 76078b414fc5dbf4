"""A model cast to half precision leaves Python: torch.export, torch.jit.trace, ONNX."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Rounding of two convolutions' inputs, weights and outputs, relative to the largest output.
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def network() -> Any:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        sn.BatchNorm2d(8, statistics="steady", activation="relu"),
        nn.Conv2d(8, 4, 1),
        sn.BatchNorm2d(4),
    )
    with torch.no_grad():
        made[0].weight.mul_(1000)
        for _ in range(40):
            made(data())
    assert made[1].running_var.min() > 65504  # infinite in float16
    return made.eval()


def data() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=ROUNDING[dtype] * largest)


@HALVES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_programs_compute_what_the_float32_model_does(dtype: torch.dtype) -> None:
    made, x = network(), data()
    expected = made(x).detach()
    half, x_half = copy.deepcopy(made).to(dtype), x.to(dtype)
    assert_near(half(x_half).detach(), expected, dtype)
    program = torch.export.export(half, (x_half,))
    assert_near(program.module()(x_half).detach(), expected, dtype)
    assert_near(program.run_decompositions().module()(x_half).detach(), expected, dtype)
    assert_near(torch.jit.trace(half, (x_half,))(x_half).detach(), expected, dtype)


@HALVES
@pytest.mark.filterwarnings("ignore:.*in training for ever")
@pytest.mark.parametrize("policy", ["batch", "steady"])
def test_export_in_training(policy: str, dtype: torch.dtype) -> None:
    half = network().train().to(dtype)
    for layer in (half[1], half[3]):
        layer.statistics = policy
    x = data().to(dtype)
    program = torch.export.export(copy.deepcopy(half), (x,)).module()
    expected = half(x).detach()
    assert_near(program(x).detach(), expected.float(), dtype)
    moved = dict(program.named_buffers())["1.running_mean"]
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, half[1].running_mean, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "trace"])
@pytest.mark.parametrize("folded", [False, True])
def test_float16_onnx_runs_in_onnxruntime(dynamo: bool, folded: bool) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="an optional extra")
    made, x = network(), data()
    expected = made(x).detach()
    if folded:
        made, _ = sn.fold(made)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(made.half(), (x.half(),), file, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.half().numpy()})
    assert_near(torch.from_numpy(found), expected, torch.float16)
