"""The GPU kernels in the checked interpreter against float64: policies, options, hard inputs."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import truth
from tests.kernels.gpu import cases
from tests.kernels.gpu.cases import Case, Step, Tensors, check, numpy
from tests.kernels.gpu.checked import checked
from torch.fx.experimental.proxy_tensor import make_fx

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu import stages
from steadynorm.kernels.reference.torch_arrays import reference

pytestmark = [
    pytest.mark.usefixtures("nan_in_fresh_memory", "gpu"),
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning"
    ),  # NumPy's, of lanes that count for nothing
]

FIRST, LAST = {"tile": (2, 16), "split": 2}, {"tile": (16, 8), "split": 3, "last": True}
LAYOUTS = {"first": FIRST, "last": LAST}
POLICIES = [
    sn.Batch(), sn.Steady(prior=4, window=None), sn.Steady(prior=16, window=16), sn.Running(),
    sn.Renorm(warmup=1, r_ramp=2, d_ramp=2), sn.Ghost(3),
]  # fmt: skip
BF16, F16 = torch.bfloat16, torch.float16
ONE = [{"last": False}, {"last": True}]  # a program holds a whole channel: one launch each way
BRANCHES = [{}, {"activation": "relu"}, {"activation": "relu", "residual": True}]

CASES = [
    *(Case((5, 2, 5, 4), policy, **cut, **branch, mean=3.0, steps=2)
      for policy, cut, branch in product(POLICIES, LAYOUTS.values(), BRANCHES[::2])),
    *(Case((7, 3, 5, 4), policy, **one, activation="relu", residual=True, mean=1e6, steps=2)
      for policy, one in product(POLICIES[:5], ONE)),
    *(Case((7, 3, 20), **one, mask=mask, mean=3.0) for one, mask in product(ONE, ("some", "none"))),
    Case((200, 20), sn.Steady(prior=16, window=16), activation="gelu", residual=True),
    Case((16, 3, 7, 7), activation="tanh", dtype=BF16),
    *(Case((7, 3, 20), policy, **cut, activation="relu", residual=True, mean=1e6, steps=1)
      for policy, cut in product(POLICIES, LAYOUTS.values())),
    *(Case((6, 2, 20), policy, **cut, mask=mask, mean=mean, steps=2)
      for policy, cut, mask, mean in (
          (POLICIES[0], FIRST, "some", 1e6), (POLICIES[0], LAST, "some", 1e6),
          (POLICIES[1], FIRST, "first", 1e4), (POLICIES[2], LAST, "some", 3.0),
          (POLICIES[4], FIRST, "some", 3.0), (POLICIES[5], LAST, "some", 3.0),
          (POLICIES[1], FIRST, "none", 0.0), (POLICIES[3], LAST, "none", 0.0))),
    *(Case((4, 3, 6), activation=name, residual=residual, **cut)
      for (name, residual), cut in zip(
          product([*ACTIVATIONS], [False, True]), [FIRST, LAST] * len(ACTIVATIONS), strict=True)),
    *(Case((6, 3, 24), dtype=dtype, mean=3.0, **branch, last=last)
      for dtype, branch, last in product((BF16, F16), BRANCHES[1:], (False, True))),
    Case((6, 3, 24), sn.Steady(window=None), dtype=BF16, parameters=BF16, activation="silu"),
    # Odd planes, one row, one channel, columns without positions, 3d, no parameters.
    Case((5, 4, 49), mean=1e6, tile=(2, 16), split=2),
    Case((5, 4, 49), mean=1e6, tile=(16, 8), split=3, last=True),
    Case((1, 5, 300), mean=-1e6, tile=(2, 64)),
    Case((300, 5), mean=-1e6, tile=(64, 8), split=2),
    Case((3, 1, 13, 11), activation="relu", residual=True),
    Case((33, 9, 7), activation="relu6", residual=True, last=True),
    Case((2, 3, 3, 4, 5), sn.Steady(), affine=False),
    Case((4, 6, 10), momentum=None, steps=3),
    Case((4, 6, 10), sn.Running(), momentum=None, steps=3, last=True),
    Case((4, 6, 10), sn.Ghost(2), momentum=None, steps=2),
    # A first row 50 standard deviations away, one zero among 1e6, drift; lanes of 64 turns.
    Case((128, 2, 64), mean=1e6, tile=(2, 64), split=1),
    Case((128, 2, 64), mean=1e6, tile=(2, 64), split=1, spoil="first_far"),
    Case((128, 8, 32), mean=1e6, tile=(16, 8), split=2, spoil="first_far", last=True),
    Case((64, 8, 8), mean=1e6, tile=(16, 8), split=32, spoil="first_far", last=True),
    Case((64, 2, 32), mean=1e6, tile=(2, 32), split=32, spoil="first_far"),
    Case((128, 2, 64), mean=1e6, tile=(2, 64), split=1, spoil="one_zero"),
    Case((1024, 8), mean=1e6, tile=(16, 8), split=1, spoil="drift"),
    Case((32, 2, 128), mean=1e6, tile=(4, 128), split=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_steps(case, monkeypatch):
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    check(case, seed=CASES.index(case))


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(), sn.Ghost(3)], ids=repr)
@pytest.mark.parametrize("std", [1e-13, 1e15])
def test_gradients_are_right_at_any_scale(std, policy):
    """ρ³ is outside float32; no factor, product or sum of the closed form is."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 2, 20, generator=draw) + 3).mul(std).requires_grad_()
    grad = torch.randn(6, 2, 20, generator=draw)
    layer = sn.BatchNorm1d(2, eps=1e-30, statistics=policy)
    layer(x).backward(grad)
    memory = None if policy.gradient_rate(1) is None else np.zeros((2, 2))
    running, setting = truth.Running(np.zeros(2), np.ones(2)), truth.Setting(eps=1e-30)
    arrays = (numpy(x), policy, running, setting)
    expected = truth.train(*arrays, grad=numpy(grad), memory=memory)
    np.testing.assert_allclose(numpy(x.grad) * std, expected.dx * std, atol=2e-6)


def test_there_are_enough_cases():
    assert len(CASES) >= 60
    assert len({str(case) for case in CASES}) == len(CASES)


# Inference ----------------------------------------------------------------------------------------


def in_inference(case):
    tensors = Tensors(case)
    with torch.no_grad():
        tensors.layer.running_mean.uniform_(-1, 1)
        tensors.layer.running_var.uniform_(0.5, 2)
    layer = tensors.layer.eval()
    running = truth.Running(numpy(layer.running_mean), numpy(layer.running_var), 0)
    extra = None if tensors.residual is None else numpy(tensors.residual)
    return tensors, truth.infer(
        numpy(tensors.x), running, tensors.setting(case), residual=extra, grad=numpy(tensors.grad)
    )


@pytest.mark.parametrize("branch", BRANCHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inference_is_one_launch(layout, branch, monkeypatch):
    case = Case((5, 4, 20), **LAYOUTS[layout], **branch)
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    tensors, expected = in_inference(case)
    before = {k: v.clone() for k, v in tensors.layer.state_dict().items()}
    named = {"x": tensors.x, "residual": tensors.residual}
    stages.plan_of(tensors.x)
    with torch.no_grad(), checked(3, **named) as watch, cases.Counter() as counter:
        y = tensors.layer(tensors.x, residual=tensors.residual)
    assert (watch.launches, counter.seen) == (["apply"], [])
    assert cases.passes(watch, case_bytes(tensors)) == 2 + case.residual
    cases.close(y, expected.y, 1e-6, "y")
    assert all(torch.equal(v, before[k]) for k, v in tensors.layer.state_dict().items())


def case_bytes(tensors):
    return tensors.x.numel() * tensors.x.element_size()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("branch", BRANCHES, ids=str)
def test_gradients_in_inference(branch, frozen):
    case = Case((5, 4, 20), **branch)
    tensors, expected = in_inference(case)
    inputs = tensors.inputs()
    right = [expected.dx, *[expected.dresidual] * case.residual, expected.dweight, expected.dbias]
    if frozen:  # nothing asks for the parameters' gradients: no reduction
        tensors.layer.requires_grad_(False)
        inputs, right = inputs[:-2], right[:-2]
    with checked(4) as watch:
        y = tensors.layer(tensors.x, residual=tensors.residual)
        tensors.layer.running_mean.zero_()  # moved before the backward
        found = torch.autograd.grad(y, inputs, tensors.grad)
    assert watch.launches == ["apply", *["reduce_grad"] * (not frozen), "apply_grad"]
    for a, b in zip(found, right, strict=True):
        cases.close(a, b, 1e-6, "gradient")


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(), sn.Ghost(3), sn.Frozen()], ids=str)
@pytest.mark.parametrize("branch", [*BRANCHES, {"activation": "silu", "residual": True}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_padding_holds_enters_no_gradient(layout, branch, policy):
    """Where the upstream gradient is 0; the truth is padding of zeros."""
    case = Case((6, 2, 20), policy, **LAYOUTS[layout], **branch, mask="some")
    found = []
    for fill in (float("nan"), 0.0):
        tensors = Tensors(case)
        valid = tensors.mask.unsqueeze(1)
        x, residual = (
            t if t is None else torch.where(valid, t.detach(), fill).requires_grad_()
            for t in (tensors.x, tensors.residual)
        )
        y = tensors.layer(x, residual=residual, mask=tensors.mask)
        inputs = [x, *([] if residual is None else [residual]), *tensors.layer.parameters()]
        found.append(torch.autograd.grad(y, inputs, tensors.grad * valid))
        found[-1] += tuple(tensors.layer.buffers())
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


# Bits, passes through one graph, derivatives of derivatives ---------------------------------------


@pytest.mark.parametrize("policy", [sn.Steady(prior=16, window=16), sn.Ghost(5)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_programs_leaves_the_same_bits(layout, policy, monkeypatch):
    cut = {**LAYOUTS[layout], "split": 5}
    case = Case((12, 2, 12), policy, mean=1e6, activation="relu", residual=True, **cut)
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    found = set()
    for seed in range(3):
        tensors = Tensors(case)
        step = Step(case, tensors, seed)
        kept = (step.y, *step.gradients, *tensors.layer.buffers())
        found.add(b"".join(t.detach().contiguous().numpy().tobytes() for t in kept))
    assert len(found) == 1


def test_later_backward_passes_move_the_memory_no_further():
    case = Case((6, 3, 10), sn.Steady(prior=16, window=16))
    tensors = Tensors(case)
    y = tensors.layer(tensors.x.requires_grad_())
    first = torch.autograd.grad(y, tensors.x, tensors.grad, retain_graph=True)[0]
    memory = tensors.layer.gradient_memory.clone()
    assert memory.any()
    again = torch.autograd.grad(y, tensors.x, tensors.grad)[0]
    assert torch.equal(first, again)
    assert torch.equal(tensors.layer.gradient_memory, memory)


@pytest.mark.parametrize("split", [None, 2])
def test_a_channel_whose_gradient_overflowed_keeps_its_memory(split, monkeypatch):
    case = Case((6, 3, 10), sn.Steady(prior=16, window=16), split=split)
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    tensors = Tensors(case)
    for _ in range(2):
        before = tensors.layer.gradient_memory.clone()
        y = tensors.layer(tensors.x.requires_grad_())
        torch.autograd.grad(y, tensors.x, tensors.grad)
        tensors.grad[2, 1, 3] = float("inf")
    moved = (tensors.layer.gradient_memory != before).all(0)
    assert moved.tolist() == [True, False, True]
    assert tensors.layer.gradient_memory.isfinite().all()


@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(prior=16, window=16), sn.Ghost(3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_are_the_references(layout, policy, gpu, monkeypatch):
    """They are taken from what the forward left: rows, sign bits, memory."""
    case = Case((7, 4, 12), policy, activation="relu", residual=True, **LAYOUTS[layout])
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    found = []
    for backend in (gpu, dispatch.REFERENCE):
        monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
        tensors = Tensors(case)
        inputs = tensors.inputs()
        y = tensors.layer(tensors.x, residual=tensors.residual)
        grads = torch.autograd.grad(y, inputs, tensors.grad, create_graph=True)
        torch.manual_seed(0)
        total = sum((g * torch.randn_like(g)).sum() for g in grads if g.requires_grad)
        found.append([*grads, *torch.autograd.grad(total, [tensors.x, tensors.layer.weight])])
    for a, b in zip(*found, strict=True):
        cases.close(a, numpy(b), 2e-6, "derivative")


# What the kernels do not decide -------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["batch", "steady", "ghost"])
def test_a_batch_that_is_kept_out_is_decided_by_the_call(policy):
    layer, other = (sn.BatchNorm1d(4, statistics=policy, nonfinite="skip") for _ in range(2))
    x = torch.randn(64, 4)
    with checked(5) as watch:
        y = layer(x)
    assert watch.launches == ["moments", "apply"]
    right = truth.train(numpy(x), layer.statistics, truth.Running(np.zeros(4), np.ones(4)),
                        truth.Setting(numpy(layer.weight), numpy(layer.bias)))  # fmt: skip
    cases.close(y, right.y, 1e-6, "y")
    cases.close(layer.running_var, right.running.var, 1e-6, "running variance")
    x[3, 2] = float("inf")
    other(x)
    assert torch.equal(other.running_mean, torch.zeros(4))
    assert int(other.num_batches_tracked) == 0


@pytest.mark.parametrize("policy", ["running", "steady", "renorm", "batch"])
@pytest.mark.parametrize("shape", [(8, 300), (40, 3, 24, 24)], ids=["whole", "in parts"])
def test_a_missing_count_beside_trained_statistics_reads_as_many(policy, shape, gpu, monkeypatch):
    """In this batch and in all that follow, as the reference has it."""
    torch.manual_seed(0)
    batches = [torch.randn(shape) for _ in range(3)]
    found = []
    for backend in (gpu, dispatch.REFERENCE):
        monkeypatch.setattr(dispatch, "BACKENDS", (backend,))
        kind = sn.BatchNorm1d if len(shape) == 2 else sn.BatchNorm2d
        layer = kind(shape[1], statistics=policy)
        layer.running_mean[-1] = 2.0  # in another program's channels
        outputs = [layer(x) for x in batches]
        found.append([*outputs, *layer.buffers()])
    for a, b in zip(*found, strict=True):
        cases.close(a, numpy(b), 2e-6, "output or buffer")
    counts = {"batch": 3}
    assert int(layer.num_batches_tracked) == counts.get(policy, 2**30 + 3)


def test_a_momentum_of_none_without_a_count_is_refused():
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="num_batches_tracked=None"):
        sn.functional.batch_norm(x, mean, var, training=True, momentum=None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [None, (2, 4, 1)], ids=str)
def test_the_stages_are_the_references(groups, layout):
    tensors = Tensors(Case((7, 4, 20), mean=1e5, residual=True, last=layout == "last"))
    x, grad, residual = tensors.x, tensors.grad, tensors.residual
    mask = torch.rand(7, 20) > 0.4
    found = stages.moments(x, mask=mask, groups=groups)
    right = reference.moments(x, mask=mask, groups=groups)
    assert torch.equal(found.count, right.count)
    torch.testing.assert_close(found.var, right.var, rtol=1e-6, atol=1e-6)
    means = [t.mean.double() + t.mean_low for t in (found, right)]
    torch.testing.assert_close(*means, rtol=0, atol=1e-6)
    shape = (4,) if groups is None else (3, 4)  # (G, C)
    maps = [x.mean() + torch.zeros(shape), *(torch.randn(shape) for _ in range(4))]
    options = {"residual": residual, "activation": "silu", "groups": groups}
    y = stages.apply(x, *maps[:3], **options)
    torch.testing.assert_close(y, reference.apply(x, *maps[:3], **options), rtol=2e-6, atol=2e-6)
    sums = stages.reduce_grad(grad, x, *maps[:3], **options)
    right = reference.reduce_grad(grad, x, *maps[:3], **options)
    torch.testing.assert_close(sums, right, rtol=1e-5, atol=1e-4)
    mapped = stages.apply_grad(grad, x, *maps, **options, mask=mask, want_residual=True)
    right = reference.apply_grad(grad, x, *maps, **options, mask=mask, want_residual=True)
    torch.testing.assert_close(mapped, right, rtol=2e-6, atol=5e-6)


def test_a_graph_capture_gets_a_workspace_of_its_own(monkeypatch):
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    capturing, made = [False], []

    def fresh(device, *sizes):
        made.append(sizes)
        return plans.Workspace(None, None, sizes, (0, 0))

    monkeypatch.setattr(plans, "_made", fresh)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(plans, "_workspaces", {})
    one = plans.workspace(x, 7, 5, 30)
    assert plans.workspace(x, 7, 9, 20) is one
    other = plans.workspace(x, 8, 5, 30)
    assert other is not one
    capturing[0] = True
    assert plans.workspace(x, 8, 5, 20) is not other
    capturing[0] = False
    assert plans.workspace(x, 8, 5, 30) is other
    assert plans.workspace(x, 8, 5000, 10).sizes == (5000, 30)
    assert plans.workspace(x, 8, 5, 31).sizes == (5000, 31)
    assert made == [(4096, 30), (4096, 30), (5, 20), (5000, 30), (5000, 31)]


def test_make_fx_records_operators_and_no_kernel_is_one():
    """What it recorded of a kernel was memory that nobody had written."""
    torch.manual_seed(0)
    layer = sn.BatchNorm2d(3, activation="relu").requires_grad_(False)

    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(layer(x).square().sum(), x)[0]

    recorded = make_fx(gradient)(torch.randn(4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    np.testing.assert_allclose(recorded(x.clone()), gradient(x.clone()), rtol=1e-4, atol=1e-5)
