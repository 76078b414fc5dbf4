"""The GPU kernels compiled for devices that are not here, and what their machine code tells."""

import pytest
import torch
import triton
from benchmarks import gpu_static
from benchmarks.gpu_static import Config, compile_all, record
from benchmarks.machine_code import TARGETS, Report, releases_partials


@pytest.fixture(scope="module")
def rows():
    """The short list for every target, a process a core."""
    return compile_all(list(TARGETS), short=True)


def test_every_kernel_for_every_target(rows):
    kernels = {(row.report.kernel, row.report.target) for row in rows}
    names = ("moments", "apply", "reduce_grad", "apply_grad", "normalize", "normalize_grad")
    assert kernels == {(name, target) for name in names for target in TARGETS}


def test_no_kernel_misses_a_bar(rows):
    """No spills, accesses as wide as shapes allow, no barrier in a loop, issue below memory."""
    missed = [f"{row.what} {row.report.kernel} {row.report.target}: {row.complaints()}"
              for row in rows if row.complaints()]  # fmt: skip
    assert missed == []


@pytest.mark.parametrize(
    ("change", "word"),
    [({"spills": 8}, "spills 8"), ({"hot_barriers": 1}, "1 barriers"),
     ({"issue_share": 1.2}, "issue 1.20"), ({"loads": {128: 1, 32: 4}}, "accesses of [32] bits")],
    ids=str,
)  # fmt: skip
def test_a_bar_that_is_missed_is_said(change, word):
    report = Report("moments", "sm_90", 8, **change)
    assert any(word in said for said in gpu_static.Row("", report, 128).complaints())
    assert gpu_static.Row("", Report("moments", "sm_90", 8), 128).complaints() == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layout", ["first", "last"])
def test_what_programs_leave_is_released_before_the_last_reads_it(layout, target):
    launches = record(Config("fp32", layout))
    found = {k.name: k.compile(target).asm["ptx"] for k in launches}
    for name in ("moments", "reduce_grad"):
        assert releases_partials(found[name])
        relaxed = found[name].replace("bar.sync", "nop")
        assert not releases_partials(relaxed)


def test_a_launch_is_specialized_as_triton_does():
    launches = record(Config("bf16", "last", activation="relu", residual=True))
    assert [launch.name for launch in launches] == ["moments", "apply", "reduce_grad", "apply_grad"]
    apply = launches[1]
    assert apply.signature["x"] == "*bf16"
    assert apply.constants["SQ"] == 1
    assert "signs" not in apply.aligned
    assert "x" in apply.aligned
    assert apply.options == {"num_warps": 8, "enable_fp_fusion": False}
    assert launches[0].options == {**apply.options, "maxnreg": 80}


def test_what_was_pinned():
    assert triton.__version__ == "3.7.1", "the one that torch 2.13 ships with"
    assert torch.__version__.startswith("2.13")
