"""The GPU kernels compiled for devices that are not here, and what their machine code tells."""

import pytest
import torch
import triton
from benchmarks import gpu_static
from benchmarks.gpu_static import Config, compile_all, record
from benchmarks.machine_code import TARGETS, Report, releases_partials
from benchmarks.no_device import no_device

import steadynorm as sn


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
    assert apply.constants["column_splits"] == 1
    assert "signs" not in apply.aligned
    assert "x" in apply.aligned
    assert apply.options == {"num_warps": 8, "enable_fp_fusion": False}
    assert launches[0].options == {**apply.options, "maxnreg": 96}


def test_what_was_pinned():
    assert triton.__version__ == "3.7.1", "the one that torch 2.13 ships with"
    assert torch.__version__.startswith("2.13")


# Launches, by a driver that notes them ------------------------------------------------------------


class Launched(list):
    """Every launch of this process since a test began: kernel, grid, arguments by name."""

    def note(self, *launch):
        self.append(launch)


LAUNCHED = Launched()  # Triton keeps launchers, and so what they note to, from test to test


@pytest.fixture
def launched():
    """What a driver that launches nothing was asked for, the kernels switched on."""
    LAUNCHED.clear()
    with no_device(LAUNCHED.note):
        yield LAUNCHED


@pytest.mark.parametrize("shape", [(8, 64, 16, 16), (2, 32, 7, 7)], ids=["in parts", "whole"])
@pytest.mark.parametrize("policy", [sn.Batch(), sn.Steady(), sn.Ghost(1)], ids=str)
def test_a_step_repeats_the_launches_of_the_first_with_its_own_addresses(launched, policy, shape):
    layer = sn.BatchNorm2d(shape[1], activation="relu", statistics=policy)
    steps = []
    for _ in range(3):
        x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
        grad = torch.randn(shape)
        y = layer(x, residual=residual)
        found = torch.autograd.grad(y, [x, residual, layer.weight, layer.bias], grad)
        given = {"x": x, "residual": residual, "grad": grad, "y": y, "weight": layer.weight}
        given |= dict(zip(("dx", "dresidual", "dweight", "dbias"), found, strict=True))
        given |= {"bias": layer.bias, "state": layer._buffers.get("gradient_memory")}
        given |= {n: getattr(layer, n) for n in ("running_mean", "running_var")}
        steps.append(({k: t for k, t in given.items() if t is not None}, launched[:]))
        launched.clear()
    assert all(isinstance(launch[2]["x"], torch.Tensor) for launch in steps[0][1])
    for given, noted in steps[1:]:
        for (kernel, grid, arguments), first in zip(noted, steps[0][1], strict=True):
            assert (kernel, grid) == first[:2]
            for name, value in arguments.items():
                before = first[2][name]
                if name in given and value is not None:
                    assert value == given[name].data_ptr(), f"{kernel}: {name}"
                elif isinstance(before, torch.Tensor):
                    assert value % 16 == 0
                else:
                    assert value == before, f"{kernel}: {name}"


def test_an_address_that_is_not_aligned_is_left_to_triton(launched):
    layer = sn.BatchNorm2d(32)
    layer(torch.randn(2, 32, 7, 7))
    x = torch.randn(2 * 32 * 49 + 1)[1:].view(2, 32, 7, 7)
    assert x.data_ptr() % 16
    for _ in range(2):
        layer(x)
    layer(torch.randn(2, 32, 7, 7))
    kinds = [type(launch[2]["x"]) for launch in launched]
    assert kinds == [torch.Tensor, torch.Tensor, torch.Tensor, int]


def test_a_tensor_that_is_two_arguments_is_told_apart_in_the_next_call(launched):
    layer = sn.BatchNorm2d(32, activation="relu")
    x, other = torch.randn(2, 2, 32, 7, 7)
    for residual in (x, x, other, other):
        layer(x, residual=residual)
        _, _, arguments = launched[-1]
        for name, right in (("x", x), ("residual", residual)):
            value = arguments[name]
            found = value.data_ptr() if isinstance(value, torch.Tensor) else value
            assert found == right.data_ptr()
    assert isinstance(launched[-1][2]["x"], int)
