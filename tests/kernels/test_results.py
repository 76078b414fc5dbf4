"""Results are ordinary tensors of PyTorch's: resizable, changeable in place, added up in place."""

from __future__ import annotations

import mmap

import pytest
import torch

import steadynorm as sn
from steadynorm.kernels.cpu import results

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


# Huge pages ---------------------------------------------------------------------------------------

HUGE = 2 << 20


@pytest.fixture
def asked(monkeypatch):
    """The ranges that huge pages are asked for, as (address, bytes)."""
    ranges = []

    def advise(address, size, advice):
        assert advice == mmap.MADV_HUGEPAGE
        ranges.append((address, size))
        return -1  # refused: nothing depends on it

    monkeypatch.setattr(results, "_huge_pages", lambda: (advise, HUGE))
    return ranges


@pytest.mark.parametrize("activation", ["relu", "gelu"])  # a plan and the stages under a mask
@pytest.mark.parametrize("masked", [False, True])
def test_huge_pages_are_asked_for_inside_of_large_results(asked, activation, masked):
    shape = (32, 64, 32, 32)  # 8 MB
    x = torch.randn(shape, requires_grad=True)
    mask = torch.ones(32, 32, 32, dtype=torch.bool) if masked else None
    y = sn.BatchNorm2d(64, activation=activation)(x, mask=mask)
    dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
    for t in (y, dx):
        first, last = t.data_ptr(), t.data_ptr() + t.nbytes
        inside = [(a, n) for a, n in asked if first <= a and a + n <= last]
        assert inside
        for address, size in inside:
            assert address % HUGE == size % HUGE == 0
            assert size > t.nbytes - 2 * HUGE


def test_huge_pages_are_not_asked_for_small_results(asked):
    x = torch.randn(16, 16, 32, 32, requires_grad=True)
    sn.BatchNorm2d(16)(x).sum().backward()
    assert asked == []


@pytest.mark.parametrize(
    ("setting", "asks"),
    [("always [madvise] never", True), ("[always] madvise never", False),
     ("always madvise [never]", False), (None, False)],
)  # fmt: skip
def test_huge_pages_are_asked_for_where_linux_gives_them_to_who_asks(
    setting, asks, tmp_path, monkeypatch
):
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    monkeypatch.setattr(results, "SETTINGS", tmp_path)
    monkeypatch.setattr(results.sys, "platform", "linux")
    results._huge_pages.cache_clear()
    found = results._huge_pages()
    results._huge_pages.cache_clear()
    assert (found is not None) == asks
    if found is not None:
        assert found[1] == HUGE
