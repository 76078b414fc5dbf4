"""When the GPU kernels serve a call, and the reason where they do not. No device, no Triton.

tests/kernels/gpu/ has the kernels themselves.
"""

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import steadynorm as sn
from steadynorm.kernels import dispatch
from steadynorm.kernels.gpu import backend
from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu.backend import GPU, NOT_ON_A_GPU, NOT_SWITCHED_ON, GpuKernels
from steadynorm.kernels.reference.closed_form import RECORDED
from steadynorm.kernels.spec import Call
from steadynorm.statistics import Batch

SHAPE = (8, 64, 16, 16)


class Planned:
    """In place of the stages, which need Triton: plans alone."""

    @staticmethod
    def planned(x, groups=None):
        return plans.plan(x.shape, x.stride(), x.element_size(), groups, 132)


@pytest.fixture
def ready(monkeypatch):
    """As on a machine with a GPU and Triton, for tensors in this machine's memory."""
    for name, value in (("on", True), ("interpreted", True), ("stages", Planned)):
        monkeypatch.setattr(GPU, name, value)
    monkeypatch.setattr(GPU, "load", lambda: None)


def call(x=None, **settings):
    x = torch.empty(SHAPE) if x is None else x
    return Call(x, policy=Batch(), momentum=0.1, **settings)


def why(*arguments, **settings):
    return GPU.supports(call(*arguments, **settings))


def test_without_a_device():
    said = dispatch.explain(torch.empty(SHAPE))
    assert said.refusals["gpu"] == NOT_ON_A_GPU == "the input is not on a GPU"
    assert dispatch.explain(torch.empty(SHAPE, device="meta")).refusals["gpu"] == NOT_ON_A_GPU
    sn.kernels.use("gpu")
    try:
        assert dispatch.explain(torch.empty(SHAPE)) == said
    finally:
        sn.kernels.use("gpu", on=False)


def test_a_mode_that_records_operators_gets_operators(ready):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    asked = call()
    with Mode():
        assert GPU.supports(asked) == RECORDED
    assert GPU.supports(asked) is None


def test_not_switched_on():
    assert not GPU.on
    with FakeTensorMode():
        said = dispatch.explain(torch.empty(SHAPE, device="cuda"))
    assert said.refusals["gpu"] == NOT_SWITCHED_ON
    assert said.kernel == "reference", "a fake tensor; a real one is given to aten"


def test_switching():
    sn.kernels.use("gpu")
    assert GPU.on
    sn.kernels.use("gpu", on=False)
    assert not GPU.on
    with pytest.raises(ValueError) as caught:
        sn.kernels.use("tpu")
    assert str(caught.value) == "kernels.use: `backend` must be 'gpu'; got 'tpu'."


def test_a_device_without_triton(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("stages", "prepared", "forward", "backward", "lanes", "tiles", "policies"):
        monkeypatch.delitem(sys.modules, f"steadynorm.kernels.gpu.{name}", raising=False)
    backend = GpuKernels("gpu", None, compiled=True)
    backend.on = backend.counted = True
    with FakeTensorMode():
        said = backend.supports(call(torch.empty(SHAPE, device="cuda")))
    assert said is not None
    assert said.startswith("the GPU kernels cannot be loaded (")
    assert "pip install triton" in said
    assert backend.stages is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (8, 64, 5), SHAPE, (2, 3, 4, 5, 6)], ids=str)
def test_what_it_serves(shape, dtype, ready):
    x = torch.empty(shape, dtype=dtype)
    for t in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        assert why(t) is None
        assert why(t, residual=t, activation="gelu", mask=torch.ones(shape[0], *shape[2:])) is None
        assert dispatch.explain(t).kernel == "gpu"
        assert dispatch.explain(t, statistics="renorm", numerics="exact").kernel == "gpu"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"x": torch.empty(SHAPE, dtype=torch.float64)},
         "the input is float64, not float32, float16 or bfloat16"),
        ({"x": torch.empty(0, 64)}, "the input is empty"),
        ({"x": torch.empty(SHAPE)[::2, ::2]},
         "the input is contiguous neither channels-first nor channels-last"),
        ({"x": torch._neg_view(torch.empty(SHAPE))},
         "`x` is a view whose values are not in memory"),
        ({"residual": torch.empty(SHAPE).bfloat16()},
         "the residual is bfloat16, the input float32"),
        ({"weight": torch.empty(64, dtype=torch.float64)},
         "`weight` is float64, or not contiguous"),
        ({"bias": torch.empty(128)[::2]}, "`bias` is float32, or not contiguous"),
        ({"running_mean": torch.empty(64).half()}, "`running_mean` is float16, or not contiguous"),
        ({"num_batches_tracked": torch.tensor(0, dtype=torch.int32)},
         "`num_batches_tracked` is int32, not int64"),
        ({"weight": torch.empty(64, device="meta")}, "`weight` is on meta, not on cpu"),
        ({"mask": torch.empty(SHAPE)}, "every channel has its own valid positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_it_refuses(settings, expected, ready):
    assert why(**settings) == expected


def test_a_subclass_is_named(ready):
    class Own(torch.Tensor):
        pass

    assert why(torch.empty(SHAPE).as_subclass(Own)) == "the input is a Own"
    assert why(torch.nn.Parameter(torch.empty(SHAPE))) is None


def test_autocast_changes_nothing(ready):
    """Batch normalization keeps its input's type under autocast, in torch as here."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why() is None
        assert why(torch.empty(SHAPE, dtype=torch.bfloat16)) is None


def test_an_old_device(monkeypatch):
    monkeypatch.setattr(GPU, "on", True)
    monkeypatch.setattr(GPU, "load", lambda: None)
    monkeypatch.setattr(GPU, "stages", Planned)
    monkeypatch.setattr(backend, "unreadable_argument", lambda *_: None)  # the tensor is fake
    monkeypatch.setattr(backend, "PLAIN", {FakeTensor})
    monkeypatch.setattr(GPU, "counted", True)  # under a mode
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "_capability", lambda device: (7, 5))  # past its cache
    with FakeTensorMode():
        said = why(torch.empty(SHAPE, device="cuda"))
    assert said == "the device has compute capability 7.5, less than 8.0"


def test_what_pytorch_looks_at_is_not_its_own(ready):
    """Inductor fuses the operations that it is given."""
    compiled = torch.compile(sn.BatchNorm2d(64), backend="eager", fullgraph=True)
    assert compiled(torch.randn(SHAPE)).shape == SHAPE


# Plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 4, 49), (64, 2048, 7, 7), (2, 3, 224, 224)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_the_input(shape, itemsize):
    for last in (False, True):
        like = torch.empty(shape, device="meta")
        like = like.movedim(1, -1).contiguous().movedim(-1, 1) if last else like
        plan = plans.plan(like.shape, like.stride(), itemsize, None, 132)
        across = (
            plan.blocks * plan.tile_columns if plan.last else plan.column_splits * plan.tile_columns
        )
        assert (
            across
            >= plan.columns
            > across - plan.tile_columns * (1 if plan.last else plan.column_splits)
        )
        assert plan.rows <= plan.row_blocks * plan.tile_rows
        assert 1 <= plan.row_splits <= plan.row_blocks
        assert plan.columns % plan.VEC == 0
        assert plan.VEC * itemsize <= 16
        assert plan.tile_rows * plan.tile_columns <= 16384
        assert plan.sign_bytes * 8 >= like.numel()


def test_a_grid_that_no_device_has():
    said = plans.plan(torch.Size((2**31, 1)), (1, 1), 4, None, 132)
    assert "larger grid" in said


def test_the_count_of_groups_is_kept_on_the_device_once():
    device = torch.device("cpu")
    assert plans.starts((2, 4, 1), device).tolist() == [0, 2, 6, 7]
    assert plans.starts((2, 4, 1), device) is plans.starts((2, 4, 1), device)
    assert plans.starts(None, device) is None
