"""The checks fail when they should: faults planted in kernels, and in copies of our own."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from tests.kernels.gpu import cases
from tests.kernels.gpu.cases import Case, check
from tests.kernels.gpu.checked import checked

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu import stages

pytestmark = [
    pytest.mark.usefixtures("nan_in_fresh_memory"),
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning"
    ),  # NumPy's, of lanes that count for nothing
]


# Small kernels, each with one fault ---------------------------------------------------------------


@triton.jit
def past_the_end(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i), mask=i < n)


@triton.jit
def all_to_one_place(y, B: tl.constexpr):
    tl.store(y + tl.arange(0, B), tl.program_id(0) * 1.0)


@triton.jit
def twice_in_one_store(y, B: tl.constexpr):
    tl.store(y + tl.arange(0, B) // 2, tl.zeros((B,), tl.float32))


@triton.jit
def last_without_acquire(y, ticket, z, n):
    p = tl.program_id(0)
    tl.store(y + p, p * 1.0)
    if tl.atomic_add(ticket, 1, sem="relaxed") == n - 1:
        tl.store(z, tl.sum(tl.load(y + tl.arange(0, 4))))


@triton.jit
def sum_in_bfloat16(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def compares_bfloat16(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, (tl.load(x + i) > tl.load(x + B - 1 - i)).to(tl.float32))


@triton.jit
def reduces_bfloat16(x, y, B: tl.constexpr):
    tl.store(y, tl.sum(tl.load(x + tl.arange(0, B))).to(tl.float32))


@triton.jit
def offset_beyond_int32(x, y, stride):
    far = tl.program_id(0) * stride
    tl.store(y + tl.program_id(0), tl.load(x) + far.to(tl.float32))


X, Y, H = torch.randn(100), torch.zeros(100), torch.randn(64).bfloat16()
SMALL = {
    "outside of every tensor": lambda: past_the_end[(2,)](X, Y, 100, B=64),
    "two programs write": lambda: all_to_one_place[(2,)](Y, B=64),
    "writes twice": lambda: twice_in_one_store[(1,)](Y, B=64),
    "one program reads what another wrote": lambda: last_without_acquire[(4,)](
        Y, torch.zeros(1, dtype=torch.int32), torch.zeros(1), 4
    ),
    "or comparison on bfloat16": lambda: sum_in_bfloat16[(1,)](H, torch.zeros(64).bfloat16(), B=64),
    "arithmetic or comparison": lambda: compares_bfloat16[(1,)](H, Y, B=64),
    "widen first": lambda: reduces_bfloat16[(1,)](H, Y, B=64),
    "int32 product or sum overflows": lambda: offset_beyond_int32[(4,)](X, Y, 2**30),
}


@pytest.mark.parametrize("said", SMALL)
def test_the_interpreter_notices(said):
    with pytest.raises(Exception, match=said), checked():
        SMALL[said]()


def test_the_interpreter_lets_a_right_kernel_pass():
    with checked(x=X) as watch:
        past_the_end[(2,)](torch.zeros(128), torch.zeros(128), 100, B=64)
    assert watch.traffic["x"] == [512, 0]
    assert watch.traffic["y"] == [0, 400]


# Our own kernels, each with one line changed ------------------------------------------------------

PLAIN = Case((6, 4, 20), activation="relu", residual=True, mean=3.0, tile=(2, 16), split=2)
LAST = Case((6, 5, 20), mean=1e6, tile=(16, 8), split=3, last=True)
ODD = Case((5, 2, 20), tile=(2, 16), split=2, mean=3.0)
STEADY = Case((6, 3, 20), sn.Steady(prior=16, window=16), mean=3.0, steps=3)
RUNNING = Case((6, 3, 20), sn.Running(), mean=3.0, steps=2)
RENORM = Case((6, 3, 20), sn.Renorm(warmup=0, r_ramp=1, d_ramp=1), mean=3.0, steps=2)
GHOST = Case((7, 3, 20), sn.Ghost(3), activation="relu", residual=True, mean=3.0)
AVERAGED = Case((4, 3, 10), sn.Ghost(2), momentum=None)
MASKED = Case((6, 3, 20), mask="some", mean=3.0, tile=(2, 16), split=2)
HELD = Case((6, 3, 20), mask="some", mean=3.0, activation="relu", residual=True)
FAR = Case((64, 2, 16), mean=1e6, tile=(2, 16), split=1, spoil="first_far")
FAULTS = [
    # (file, what stands there, what stands there instead, the case that must notice)
    ("prepared", "ROWS + MAPS) * row", "ROWS) * row", PLAIN),
    ("tiles", "(columns < vectors * VEC)[None, :]", "(columns <= vectors * VEC)[None, :]", PLAIN),
    ("tiles", "(group_rows < length)[:, None] &", "(group_rows <= length)[:, None] &", ODD),
    ("tiles", 'sem="acq_rel"', 'sem="relaxed"', PLAIN),
    ("tiles", "== others\n", "== others - 1\n", PLAIN),
    ("tiles", "tl.atomic_xchg(ticket, 0,", "tl.atomic_xchg(ticket, 1,", PLAIN),
    ("tiles", "(group * row_blocks + row_block)", "(row_block)", GHOST),
    ("tiles", "wide = packed.to(tl.int32)[None, :, :, None] >> place",
     "wide = packed.to(tl.int32)[None, :, :, None] >> (7 - place)", PLAIN),
    ("lanes", "return total, (a - (total - part)) + (b - part)",
     "return total, (b - part) * 0.0", LAST),
    ("lanes", "tl.fma(count * off, off, m2)", "m2", PLAIN),
    ("lanes", "centered = value - first\n", "centered = value\n", FAR),
    ("stages", "WELFORD=plan.four", "WELFORD=False", FAR),
    ("forward", "if part == 0 and group == 0:", "if group == 0:", PLAIN),
    ("forward", "count += valid.to(tl.float32)", "count += in_bounds.to(tl.float32)", MASKED),
    ("forward", "tl.store(batches, seen)", "tl.store(batches, seen + 1)", PLAIN),
    ("policies", "tl.maximum(n - 1.0, 1.0)", "tl.maximum(n, 1.0)", PLAIN),
    ("policies", "gap = (mean - center) + mean_low", "gap = mean_low", RUNNING),
    ("policies", "share = tl.maximum(share, first)", "share = share", STEADY),
    ("policies", "between = away * away if POLICY == \"steady\" else 0.0", "between = 0.0", STEADY),
    ("policies", "left_xhat = g_xhat - share *", "left_xhat = g_xhat - 0.5 * share *", STEADY),
    ("policies", "tl.store(state + C + c, slope", "tl.store(state + C + c, constant", STEADY),
    ("policies", "return gain * rho * exact + offset * sum_grad, sum_grad",
     "return rho * exact, sum_grad", RENORM),
    ("policies", "seen += some.to(tl.float32)", "seen += 0.0", AVERAGED),
    ("backward", "lane_grad_x = tl.fma(g, centered, lane_grad_x)",
     "lane_grad_x = tl.fma(g, g, lane_grad_x)", PLAIN),
    ("backward", "flowing = tl.where(valid, flowing, 0.0)", "pass", MASKED),
    ("visit", "    flowing = tl.where(valid,", "    flowing = tl.where(in_bounds,", HELD),
    ("visit", "flowing = tl.where(valid, flowing, 0.0)", "pass", HELD),
    ("visit", "comes_last(tickets, tl.num_programs(0) - 1)", "(block == 0)", STEADY),
    ("backward", 'if KEPT == "signs":', 'if KEPT == "none":', PLAIN),
]  # fmt: skip
NOTICED = r"(?i)race|outside|error \d|error nan|ticket|assert"
SOURCE = Path(stages.__file__).parent


def mutated(folder, file, old, new):
    """The folder of kernels as a package of its own, with one line changed; its backend."""
    name = f"faulty_{abs(hash((file, old, new)))}"
    shutil.copytree(SOURCE, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / name / f"{file}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"nothing to change in {file}.py: {old}"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(
        name, folder / name / "__init__.py", submodule_search_locations=[str(folder / name)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.backend"), name


def run(case, backend, name, monkeypatch):
    """The case with that backend, and with the plans that the case asks for."""
    backend.GPU.on = backend.GPU.interpreted = backend.GPU.counted = True
    assert backend.GPU.load() is None
    theirs = sys.modules[f"{name}.stages"]
    monkeypatch.setattr(theirs, "planned", cases.cut(case))
    monkeypatch.setattr(stages, "planned", cases.cut(case))
    monkeypatch.setattr(dispatch, "BACKENDS", (backend.GPU,))
    for kept in ("_workspaces", "workspace", "starts"):
        monkeypatch.setattr(plans, kept, getattr(sys.modules[f"{name}.plan"], kept))
    check(case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1][:40]}")
def test_a_planted_fault_is_noticed(fault, tmp_path, monkeypatch):
    *change, case = fault
    backend, name = mutated(tmp_path, *change)
    with pytest.raises(Exception, match=NOTICED):
        run(case, backend, name, monkeypatch)


@pytest.mark.parametrize("case", {str(fault[3]): fault[3] for fault in FAULTS}.values(), ids=str)
def test_without_a_fault_the_same_cases_pass(case, tmp_path, monkeypatch):
    backend, name = mutated(tmp_path, "lanes", '"""Moments of', '"""The moments of')
    run(case, backend, name, monkeypatch)
