"""Results are ordinary tensors of PyTorch's: resizable, changeable in place, added up in place."""

from __future__ import annotations

import pytest
import torch

import steadynorm as sn

SHAPE = (16, 64, 32, 32)  # 4 MB: what glibc takes from the system, not from its heap


def result(layout=torch.contiguous_format, *, training=True):
    x = torch.randn(SHAPE).to(memory_format=layout)
    layer = sn.BatchNorm2d(64, activation="relu").train(training)
    with torch.no_grad():
        return layer(x, residual=x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_storage_is_resized_to_nothing_and_back(layout, training):
    """As FSDP does with what it gathers, and activation offloading with what it copies."""
    y = result(layout, training=training)
    size = y.untyped_storage().size()
    y.untyped_storage().resize_(0)
    assert y.untyped_storage().size() == 0
    y.untyped_storage().resize_(size)
    assert y.fill_(3.0).sum() == 3 * y.numel()


def test_a_result_grows():
    y = result()
    first = y[0].clone()
    y.resize_(2 * SHAPE[0], *SHAPE[1:])
    assert torch.equal(y[0], first)


def test_a_result_serves_as_an_out_argument_that_has_to_grow():
    y = result().resize_(0)
    torch.add(torch.ones(SHAPE), 1, out=y)
    assert torch.equal(y, torch.full(SHAPE, 2.0))


@pytest.mark.parametrize("residual", [True, False])
def test_input_gradients_are_resizable(residual):
    x = torch.randn(SHAPE, requires_grad=True)
    add = torch.randn(SHAPE, requires_grad=True) if residual else None
    layer = sn.BatchNorm2d(64, activation="relu")
    layer(x, residual=add).sum().backward()
    for grad in (t.grad for t in (x, add) if t is not None):
        grad.untyped_storage().resize_(0)
        assert grad.untyped_storage().size() == 0


def test_a_result_may_be_changed_in_place():
    """On a view returned by a Function, autograd would refuse."""
    x = torch.randn(SHAPE, requires_grad=True)
    weights = torch.randn(SHAPE)
    layer = sn.BatchNorm2d(64)
    (layer(x).mul_(2) * weights).sum().backward()
    in_place, x.grad = x.grad, None
    (layer(x) * (2 * weights)).sum().backward()
    assert torch.equal(in_place, x.grad)
