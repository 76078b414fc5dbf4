"""Large results on recycled memory: used again when dead, never while anything refers to them."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading

import pytest
import torch

from steadynorm.kernels.cpu import allocator as memory
from steadynorm.kernels.cpu.allocator import POOLED_FROM, empty_like

LARGE = POOLED_FROM // 4  # float32 values

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the pool works on Linux only")


@pytest.fixture(autouse=True)
def emptied():
    gc.collect()
    memory.empty_cache()
    yield
    memory.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_strides_and_type_are_those_of_the_original(dtype):
    x = torch.randn(4, 64, 128, 129).to(dtype).contiguous(memory_format=torch.channels_last)
    y = empty_like(x)
    assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
    y.copy_(x)
    assert torch.equal(y, x)
    assert not y.requires_grad


def test_memory_is_used_again_once_the_last_tensor_on_it_is_gone():
    x = torch.zeros(LARGE)
    y = empty_like(x)
    address = y.data_ptr()
    part = y.view(-1)[10:20]
    del y
    assert empty_like(x).data_ptr() != address, "a view still lived there"
    memory.empty_cache()
    del part
    gc.collect()
    assert empty_like(x).data_ptr() == address


def test_a_small_result_comes_from_pytorch():
    x = torch.zeros(LARGE - 1)
    assert empty_like(x).untyped_storage().resizable()
    assert not empty_like(torch.zeros(LARGE)).untyped_storage().resizable()


def test_what_waits_can_be_given_back():
    x = torch.zeros(LARGE)
    y, z = empty_like(x), empty_like(x)
    assert memory.empty_cache() == 0, "both are in use"
    del y, z
    assert memory.empty_cache() == 2 * memory.HUGE_PAGE
    assert memory.empty_cache() == 0


def test_a_result_is_no_view_so_it_may_be_changed_in_place():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return empty_like(x).copy_(x).mul_(2)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(LARGE, requires_grad=True)
    y = Twice.apply(x)
    y.add_(1)  # on a view returned by a Function, autograd would refuse
    y.backward(torch.ones(LARGE))
    assert torch.equal(x.grad, torch.full((LARGE,), 2.0))


def test_what_waits_is_bounded_by_what_is_in_use_or_a_quarter_of_memory(monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda: 0)
    for extra in range(6):
        size = LARGE + extra * memory.HUGE_PAGE // 4
        y = empty_like(torch.zeros(size))
        del y
    # Five other sizes waited in turn; at every new block they may hold no more than is in use.
    assert memory.empty_cache() <= 2 * (LARGE * 4 + 5 * memory.HUGE_PAGE)


def test_fresh_memory_is_filled_when_pytorch_is_asked_to_be_deterministic():
    x = torch.zeros(LARGE)
    before = empty_like(x).fill_(3.0)
    del before
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.isnan(empty_like(x)).all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_never_share_a_block():
    x = torch.zeros(LARGE)
    faults = []

    def work(mark):
        for _ in range(60):
            held = [empty_like(x).fill_(mark) for _ in range(3)]
            for tensor in held:
                if not bool((tensor == mark).all()):
                    faults.append(mark)
            del held, tensor

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_autograd_adds_up_gradients_in_place():
    """A Python handle on the storage would keep it from doing so, at 2 copies' cost a sum."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return empty_like(grad).copy_(grad)

    x = torch.zeros(LARGE, requires_grad=True)
    twice = 2 * x
    y = Same.apply(twice) + Same.apply(twice)
    with torch.profiler.profile() as profile:
        y.backward(torch.ones(LARGE))
    sums = [event.name for event in profile.events() if event.name.startswith("aten::add")]
    assert sums == ["aten::add_"]


FORK = """
import os, torch
torch.set_num_threads(1)  # of its OpenMP threads a forked child has none
from steadynorm.kernels.cpu.allocator import POOLED_FROM, empty_like
x = empty_like(torch.zeros(POOLED_FROM // 4)).fill_(1.0)
child = os.fork()
if child == 0:
    x.fill_(2.0)
    os._exit(0 if bool((x == 2).all()) else 1)
assert os.waitpid(child, 0)[1] == 0
assert bool((x == 1).all()), "the child wrote to its parent's tensor"
"""


def test_a_forked_child_writes_to_memory_of_its_own():
    """Blocks are private: to share them would let a data loader change its parent's tensors."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120)


def test_what_waits_is_marked_as_free_when_another_block_is_made(monkeypatch):
    """The system knows of private memory only: it counts what of ours it may take."""
    advised = []
    advise = memory._Block.advise

    def watched(block, how):
        advised.append((block.size, how))
        advise(block, how)

    monkeypatch.setattr(memory._Block, "advise", watched)
    y = empty_like(torch.zeros(LARGE)).fill_(1.0)
    del y
    z = empty_like(torch.zeros(LARGE)).fill_(1.0)  # the same block: nothing is marked
    assert advised == [(memory.HUGE_PAGE, memory.MADV_HUGEPAGE)]
    del z
    larger = empty_like(torch.zeros(3 * memory.HUGE_PAGE // 4))
    assert advised[1:] == [
        (memory.HUGE_PAGE, memory.MADV_FREE),
        (larger.nbytes, memory.MADV_HUGEPAGE),
    ]


def test_the_system_takes_both_pieces_of_advice():
    """It did not for shared memory, and said nothing."""
    block = memory._Block(memory.HUGE_PAGE)
    madvise = memory._madvise()
    for how in (memory.MADV_HUGEPAGE, memory.MADV_FREE):
        assert madvise(ctypes.c_void_p(block._address), ctypes.c_size_t(block.size), how) == 0
