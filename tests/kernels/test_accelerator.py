"""What an accelerator is given: passes over the input, operations, and who serves a call.

On meta tensors, and fake ones that say they are on a GPU: both have layouts and no values.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.autograd import by_device
from steadynorm.kernels.reference.closed_form import REFERENCE
from steadynorm.kernels.reference.torch_arrays import moments_at_once
from steadynorm.kernels.spec import Call

ROOT = Path(__file__).parents[2]


def _launches():
    path = ROOT / "benchmarks" / "launches.py"
    spec = importlib.util.spec_from_file_location("launches", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


launches = _launches()
OPERATOR, EXACT = ("Batch", "torch.nn"), ("Batch, exact", "Steady")
# (passes, large operations) of forward, backward, inference, by case; float32.
BY_OPERATOR = {
    "BN": ((3, 1), (5, 1), (2, 1)),
    "BN + ReLU": ((5, 2), (8, 2), (4, 2)),
    "BN + add + ReLU": ((8, 3), (8, 2), (7, 3)),
}
BY_STAGES = {
    "BN": ((8, 5), (14, 7), (4, 2)),
    "BN + ReLU": ((10, 6), (17, 8), (6, 3)),
    "BN + add + ReLU": ((13, 7), (17, 8), (9, 4)),
}
HALF_BY_STAGES = {  # in passes of a half-precision tensor: intermediates are float32
    "BN": ((16, 6), (26, 8), (10, 3)),
    "BN + ReLU": ((20, 7), (29, 9), (14, 4)),
    "BN + add + ReLU": ((25, 8), (29, 9), (19, 5)),
}
SMALL = {
    "torch.nn": (1, 0, 0),
    "Batch": (1, 0, 0),
    "Batch, exact": (22, 17, 9),
    "Steady": (64, 78, 0),
}


@pytest.mark.parametrize("layout", launches.LAYOUTS)
@pytest.mark.parametrize("dtype", launches.DTYPES, ids=str)
@pytest.mark.parametrize("case", launches.CASES)
@pytest.mark.parametrize("policy", launches.POLICIES)
def test_passes_and_operations(policy, case, dtype, layout):
    counts = launches.count(policy, case, dtype, layout)
    stages = BY_STAGES if dtype == torch.float32 else HALF_BY_STAGES
    expected = BY_OPERATOR[case] if policy in OPERATOR else stages[case]
    if policy == "Steady":  # the running statistics alone normalize in inference
        expected = (*expected[:2], BY_OPERATOR[case][2])
    assert tuple((c.passes, c.large) for c in counts) == expected
    assert tuple(c.small for c in counts) == SMALL[policy]


def test_the_counter_sees_a_second_pass():
    x = torch.empty(launches.SHAPE, device="meta")
    with launches.Counter(x) as counter:
        (x - x.mean((0, 2, 3), keepdim=True)).relu_()
    assert counter.count == (5, 3, 0)


@pytest.mark.parametrize("policy", ["Batch", "Steady"])
def test_nothing_waits_for_the_device(policy):
    """A value read on the host would raise: meta tensors have none."""
    layer = launches.layer_for(policy, "relu")
    x, residual, grad = launches.tensors(torch.float32, "channels_last", True)
    torch.autograd.grad(layer(x, residual=residual), [x, residual], grad)


# Who serves a call --------------------------------------------------------------------------------


def arguments(dtype=torch.float32, device="meta", parameters=torch.float32):
    x = torch.empty(8, 64, 16, 16, dtype=dtype, device=device)
    weight, bias = (torch.empty(64, dtype=parameters, device=device) for _ in range(2))
    mean, var = (torch.empty(64, device=device) for _ in range(2))
    return x, weight, bias, mean, var


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("dtype", launches.DTYPES, ids=str)
def test_a_plain_call_is_the_devices_own_operator(dtype, last, training):
    x, *rest = arguments(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    assert dispatch.explain(x, *rest, training=training).kernel == "aten"
    assert dispatch.explain(x, training=True).kernel == "aten"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"numerics": "exact"}, 'numerics="exact" asks for our own stages'),
        ({"statistics": "steady"}, "more is asked than PyTorch's operator does"),
    ],
    ids=str,
)
def test_what_its_operator_may_not_serve(settings, why):
    said = dispatch.explain(*arguments(), **settings)
    assert said.kernel == "reference"
    assert said.refusals["aten"] == why
    assert said.refusals["cpu"]


def test_without_a_device_exact_keeps_small_calls_from_its_operator():
    x = torch.randn(2, 16, 4, 4)
    assert dispatch.explain(x).kernel == "aten"
    said = dispatch.explain(x, numerics="exact")
    assert said.kernel == "cpu"
    assert said.refusals["aten"] == 'numerics="exact" asks for our own stages'


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
def test_a_model_cast_to_half_keeps_the_operator(kept):
    layer = sn.BatchNorm2d(64, device="meta").to(kept)
    x = torch.empty(8, 64, 16, 16, dtype=kept, device="meta", requires_grad=True)
    y = layer(x)
    assert dispatch.explain(x, *layer.parameters(), layer.running_mean, layer.running_var) == (
        "aten",
        {
            "traced": "PyTorch neither compiles nor transforms this call",
            "gpu": "the input is not on a GPU",
        },
    )
    assert y.dtype == kept
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], torch.empty_like(y))
    assert [g.dtype for g in gradients] == [kept] * 3


def test_types_that_its_operator_refuses():
    x, weight, bias, mean, var = arguments(torch.float64, parameters=torch.float64)
    said = dispatch.explain(x, weight, bias, mean, var)
    assert said.refusals["aten"] == "a type of the running statistics that its operator refuses"
    said = dispatch.explain(torch.empty(8, 64, device="meta"), weight, bias)
    assert said.refusals["aten"] == "types of input and parameters that its operator refuses"


def test_half_precision_under_autocast_keeps_the_operator():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x, *rest = arguments(torch.bfloat16)
        assert dispatch.explain(x, *rest).kernel == "aten"
        assert launches.layer_for("Batch", "relu")(x).dtype == torch.bfloat16


def test_a_fake_tensor_says_why_it_takes_the_reference():
    """Its class is not Tensor, so no kernel is sure to read it; the stages run anywhere."""
    with FakeTensorMode(), torch.no_grad():  # autograd asks for the device itself
        said = dispatch.explain(*arguments(device="cuda"))
        assert said.kernel == "reference"
        assert said.refusals["aten"] == "the input is a FakeTensor"
        layer = sn.BatchNorm2d(64, activation="relu", device="cuda").eval()
        y = layer(torch.empty(8, 64, 16, 16, device="cuda"))
        assert (y.device.type, y.shape) == ("cuda", (8, 64, 16, 16))


# Exact stages and the setting ---------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5, 1e6])
@pytest.mark.parametrize("last", [True, False])
def test_the_stages_that_exact_runs_are_exact_at_any_mean(mean, last, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", (REFERENCE,))
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(16, 8, 14, 14, generator=seed) + mean
    x = x.to(memory_format=torch.channels_last) if last else x
    grad = torch.randn(x.shape, generator=seed)
    wide = x.double()
    var, center = torch.var_mean(wide, (0, 2, 3), correction=0, keepdim=True)
    rho = (var + 1e-5).rsqrt()
    expected = (wide - center) * rho
    inner = (grad * expected).mean((0, 2, 3), keepdim=True)
    dx = rho * (grad - grad.double().mean((0, 2, 3), keepdim=True) - expected * inner)
    x.requires_grad_()
    y = sn.BatchNorm2d(8, numerics="exact")(x)
    y.backward(grad)
    assert (y - expected).abs().max() < 2e-6
    assert (x.grad - dx).abs().max() < 2e-6


def test_numerics_is_a_setting_of_the_layer():
    layer = sn.BatchNorm2d(3, numerics="exact")
    assert "numerics='exact'" in repr(layer)
    assert "numerics" not in repr(sn.BatchNorm2d(3))
    assert sn.LazyBatchNorm2d(numerics="exact").numerics == "exact"
    message = "BatchNorm2d: `numerics` must be 'device' or 'exact'; got 'fast'."
    for change in (
        lambda: sn.BatchNorm2d(3, numerics="fast"),
        lambda: setattr(layer, "numerics", "fast"),
    ):
        with pytest.raises(ValueError) as caught:
            change()
        assert str(caught.value) == message
    assert layer.numerics == "exact"
    with pytest.raises(ValueError, match="batch_norm: `numerics` must be 'device' or 'exact'"):
        sn.functional.batch_norm(torch.ones(2, 3), None, None, training=True, numerics="fast")


def test_conversion_carries_numerics_or_says_that_it_is_lost():
    net = torch.nn.Sequential(sn.BatchNorm2d(3, numerics="exact"))
    steady, _ = sn.convert(net, statistics="steady")
    assert steady[0].numerics == copy.deepcopy(steady)[0].numerics == "exact"
    theirs, changes = sn.convert(net, to="torch")
    assert type(theirs[0]) is torch.nn.BatchNorm2d
    assert not hasattr(theirs[0], "numerics")
    assert changes[0].why == "numerics='exact' is lost"
    assert sn.convert(theirs)[0][0].numerics == "device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 3), (4, 3, 5, 2)])
def test_moments_in_one_pass_are_those_of_the_values(shape, dtype):
    """Mean, variance, and the gradient that the mean's part `mean_low` carries."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 1).to(dtype)
    wide = x.double().requires_grad_()
    axes = tuple(i for i in range(len(shape)) if i != 1)
    mean, var = wide.mean(axes), wide.var(axes, correction=0)
    weights = torch.randn(2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((mean * weights[0] + var * weights[1]).sum(), wide)

    live = x.clone().requires_grad_()
    found = moments_at_once(live)
    exact = 1e-12 if dtype is torch.float64 else 1e-6
    assert found.count == x.numel() // 3
    assert not found.mean.requires_grad
    torch.testing.assert_close((found.mean + found.mean_low).double(), mean, rtol=exact, atol=exact)
    torch.testing.assert_close(found.var.double(), var, rtol=exact, atol=exact)
    loss = (found.mean_low * weights[0] + found.var * weights[1]).sum()
    (grad,) = torch.autograd.grad(loss, live)
    loose = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(grad.double(), expected, rtol=loose, atol=loose)


def test_moments_in_one_pass_keep_an_infinite_mean():
    x = torch.tensor([[1.0, 2.0], [float("inf"), 4.0]])
    found = moments_at_once(x)
    assert found.mean.tolist() == [float("inf"), 3.0]
    assert found.mean_low.tolist() == [0.0, 0.0]


def test_compiled_calls_on_a_device_take_its_numerics_where_eager_ones_do():
    x = torch.empty(8, 3, 4, 4, device="meta")
    buffers = (torch.empty(3, device="meta"), torch.empty(3, device="meta"))
    plain = {"running_mean": buffers[0], "running_var": buffers[1], "momentum": 0.1}
    assert by_device(Call(x, policy=sn.Batch(), **plain))
    assert not by_device(Call(x, policy=sn.Batch(), exact=True, **plain))
    assert not by_device(Call(x, policy=sn.Steady(), **plain))
    assert not by_device(Call(torch.zeros(8, 3, 4, 4), policy=sn.Batch(), momentum=0.1))
    assert not by_device(Call(x[:0], policy=sn.Batch(), **plain))
