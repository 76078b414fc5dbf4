"""Saved-tensor hooks, default devices and dispatch modes: others' hands on what kernels read."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
import steadynorm.nn.functional as F

SHAPES = {"small": (4, 16, 5, 7), "kernel": (8, 32, 20, 20)}
POLICIES = ["batch", sn.Steady(), sn.Running(), sn.Ghost(2)]


def gradients(layer, tensors, mask, hooks=None):
    x, residual, grad = (t.clone(memory_format=torch.preserve_format) for t in tensors)
    x.requires_grad_(), residual.requires_grad_()
    context = torch.autograd.graph.saved_tensors_hooks(*hooks or (lambda t: t, lambda t: t))
    with context:
        y = layer(x, residual=residual, mask=mask)
    y.backward(grad)
    return x.grad, residual.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "silu"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_hooks_that_give_back_another_layout(policy, shape, activation, masked):
    """As `torch.autograd.graph.save_on_cpu(pin_memory=True)` does with channels-last tensors."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
    layer = sn.BatchNorm2d(shape[1], statistics=policy, activation=activation)
    other = copy.deepcopy(layer)
    wanted = gradients(layer, tensors, mask)
    packed = (lambda t: t.contiguous().clone(), lambda t: t)
    for found, truth in zip(gradients(other, tensors, mask, packed), wanted, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_default_device_is_not_where_kernels_take_memory(policy, shape, training):
    torch.manual_seed(0)
    layer = sn.BatchNorm2d(shape[1], statistics=policy, activation="relu").train(training)
    other = copy.deepcopy(layer)
    x, residual, grad = (torch.randn(shape) for _ in range(3))
    wanted = gradients(layer, (x, residual, grad), None)
    with torch.device("meta"):
        found = gradients(other, (x, residual, grad), None)
    for mine, truth in zip(found, wanted, strict=True):
        assert torch.equal(mine, truth)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lengths", [None, [5, 5, 2, 3]], ids=["whole", "lengths"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_nor_is_it_where_a_recurrent_network_computes(policy, lengths, training):
    torch.manual_seed(0)
    lstm = sn.BatchNormLSTM(2, 3, 2, bidirectional=True, max_length=5, statistics=policy)
    lstm(torch.randn(5, 4, 2))
    other = copy.deepcopy(lstm.train(training))
    x = torch.randn(5, 4, 2)
    wanted, _ = lstm(x, lengths=lengths)
    with torch.device("meta"):
        found, _ = other(x, lengths=lengths)
        found.square().sum().backward()
    assert torch.equal(found, wanted)
    torch.testing.assert_close(other.state_dict(), lstm.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_nor_where_a_recomputation_is_recognized(reentrant):
    layer, x = sn.BatchNorm2d(4, statistics="running"), torch.randn(3, 4, 2, 2, requires_grad=True)
    before = layer.num_batches_tracked + 1
    with torch.device("meta"):
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert layer.num_batches_tracked == before
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("policy", [*POLICIES, sn.Renorm()], ids=str)
def test_fake_tensors_have_shapes_and_no_values(policy):
    layer = sn.BatchNorm2d(32, statistics=policy)
    x = torch.randn(SHAPES["kernel"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(x)
    assert y.shape == x.shape
    with FakeTensorMode():
        layer = sn.BatchNorm2d(32, statistics=policy)
        x = torch.randn(SHAPES["kernel"], requires_grad=True)
        layer(x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_zero_tensor_has_no_memory_to_read():
    layer = sn.BatchNorm2d(32)
    x = torch._efficientzerotensor(SHAPES["kernel"])
    assert torch.equal(layer(x), torch.zeros(SHAPES["kernel"]))


@pytest.mark.parametrize("training", [True, False])
def test_a_scale_that_is_a_zero_tensor_is_zero(training):
    """Its address is 0, which tells a kernel that there is no scale."""
    x, zero, one = torch.randn(SHAPES["kernel"]), torch._efficientzerotensor(32), torch.ones(32)
    y = F.batch_norm(x, torch.zeros(32), torch.ones(32), zero, one, training=training)
    assert torch.equal(y, torch.ones_like(x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("policy", ["batch", "running", sn.Steady(window=None)], ids=str)
def test_make_fx_records_operators_and_no_kernel_is_one(policy, training, masked):
    """What it recorded of a kernel was memory that nobody had written."""
    torch.manual_seed(0)
    layer = sn.BatchNorm2d(32, statistics=policy, activation="relu").train(training)
    layer.requires_grad_(False)
    start = copy.deepcopy(layer.state_dict())
    mask = torch.rand(SHAPES["kernel"][0], *SHAPES["kernel"][2:]) > 0.3 if masked else None

    def value(x):
        return layer(x, mask=mask)

    def gradient(x):
        x = x.requires_grad_()
        return torch.autograd.grad(value(x).square().sum(), x)[0]

    for run in (value, gradient):
        recorded = make_fx(run)(torch.randn(SHAPES["kernel"]))
        x = torch.randn(SHAPES["kernel"])
        layer.load_state_dict(start)
        found = recorded(x.clone())
        layer.load_state_dict(start)
        torch.testing.assert_close(found, run(x.clone()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "policy", ["batch", "frozen", "running", "renorm", sn.Steady(window=None)], ids=str
)
@pytest.mark.parametrize("shape", [(7, 5), (64, 16, 16, 16)], ids=str)
def test_several_gradients_at_once(policy, shape):
    kind = sn.BatchNorm1d if len(shape) == 2 else sn.BatchNorm2d
    torch.manual_seed(0)
    layer = kind(shape[1], statistics=policy).double()
    layer(torch.randn(shape).double())
    x = torch.randn(shape).double().requires_grad_()
    y = torch.tanh(layer(x))
    grads = torch.randn(3, *shape).double()
    (found,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in grads]
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)


def test_several_gradients_cannot_move_one_memory():
    layer = sn.BatchNorm1d(5, statistics="steady")
    x = torch.randn(7, 5, requires_grad=True)
    y = layer(x)
    with pytest.raises(NotImplementedError, match=r"use sn\.Steady\(window=None\)"):
        torch.autograd.grad(y, x, torch.randn(3, 7, 5), is_grads_batched=True)
    assert not layer.gradient_memory.any()
