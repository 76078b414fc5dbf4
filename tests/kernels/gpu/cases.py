"""Training steps in the checked interpreter, against float64 NumPy, with what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tests import truth
from tests.kernels.gpu.checked import Watch, checked
from tests.tolerances import BAR, TABLE, error
from torch.utils._python_dispatch import TorchDispatchMode

import steadynorm as sn
from steadynorm.kernels.gpu import plan as plans
from steadynorm.kernels.gpu import stages
from steadynorm.kernels.gpu.backend import GPU
from steadynorm.kernels.spec import Keep

GRADIENT_BAR = 1e-6
NO_LAUNCH = {
    "empty", "empty_strided", "empty_like", "new_empty", "detach", "view", "slice", "expand",
    "alias", "permute",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layer and its input; `tile` and `split` set how the work is cut."""

    shape: tuple[int, ...]
    policy: Any = field(default_factory=sn.Batch)
    last: bool = False
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    activation: str | None = None
    residual: bool = False
    mask: str | None = None
    spoil: str | None = None
    affine: bool = True
    momentum: float | None = 0.1
    parameters: torch.dtype = torch.float32
    tile: tuple[int, int] | None = None
    split: int | None = None
    steps: int = 1

    def __str__(self) -> str:
        parts = [f"{'x'.join(map(str, self.shape))}{'-last' if self.last else ''}"]
        for name in ("policy", "dtype", "mean", "activation", "residual", "mask", "spoil",
                     "affine", "momentum", "parameters", "tile", "split"):  # fmt: skip
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and repr(value) != "Batch()":
                parts.append(str(value).removeprefix("torch.") if value is not True else name)
        return ",".join(parts)


class Tensors:
    """A case's tensors."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=draw, dtype=torch.float64)

        def laid(t: torch.Tensor) -> torch.Tensor:
            t = t.to(case.dtype)
            return t.movedim(1, -1).contiguous().movedim(-1, 1) if case.last else t.contiguous()

        n, c = case.shape[:2]
        x = normal(*case.shape) + case.mean
        if case.spoil == "first_far":  # a blank image first, 50 standard deviations from the rest
            x[: max(1, n // 64)] -= 50
        if case.spoil == "one_zero":
            x[0, :, ..., 0] = 0
        if case.spoil == "drift":
            x += torch.linspace(0, 100, n, dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
        self.x, self.grad = laid(x), laid(normal(*case.shape))
        self.residual = laid(normal(*case.shape)) if case.residual else None
        self.mask = None
        if case.mask is not None:
            self.mask = normal(n, *case.shape[2:]) > (-9 if case.mask == "first" else -0.2)
            if case.mask == "first":  # zeros where pivots would come from
                self.mask[0] = False
                self.x[0] = 0
            if case.mask == "none":
                self.mask[:] = False
        kinds = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}
        self.layer = kinds[len(case.shape)](
            c, statistics=case.policy, activation=case.activation, affine=case.affine,
            momentum=case.momentum,
        )  # fmt: skip
        if case.affine:
            with torch.no_grad():
                self.layer.weight.copy_(normal(c).abs() + 0.5)
                self.layer.bias.copy_(normal(c))
            self.layer.weight.data = self.layer.weight.data.to(case.parameters)
            self.layer.bias.data = self.layer.bias.data.to(case.parameters)

    def setting(self, case: Case) -> truth.Setting:
        parts = (self.layer.weight, self.layer.bias) if case.affine else (None, None)
        weight, bias = (None if t is None else numpy(t) for t in parts)
        return truth.Setting(weight, bias, case.activation, case.momentum)

    def inputs(self) -> list[torch.Tensor]:
        """What gradients are taken of."""
        own = [self.x, self.residual, self.layer.weight, self.layer.bias]
        return [t.requires_grad_() for t in own if t is not None]


def numpy(t: torch.Tensor) -> np.ndarray:
    return t.detach().double().numpy()


class Counter(TorchDispatchMode):
    """Operations of PyTorch that would be launches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self) -> Any:
        GPU.counted = True
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        GPU.counted = False
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        name = function.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def cut(case: Case) -> Any:
    """`stages.planned` with this case's tile and split."""

    def planned(x: torch.Tensor, groups: Any = None) -> Any:
        sizes = (x.shape, x.stride(), x.element_size(), groups, 1)
        return plans.plan(*sizes, tile=case.tile, split=case.split)

    return planned


class Step:
    """What one training step gave, and what it cost each way."""

    def __init__(self, case: Case, tensors: Tensors, seed: int = 0) -> None:
        inputs = tensors.inputs()
        size = getattr(case.policy, "size", None)
        groups = None if size is None else tuple(case.policy.lengths(case.shape[0]))
        self.plan = stages.plan_of(tensors.x, groups)
        plans.starts(self.plan.groups, tensors.x.device)  # made once
        named = {"x": tensors.x, "residual": tensors.residual, "grad": tensors.grad}
        named["mask"] = tensors.mask
        extras = {"residual": tensors.residual, "mask": tensors.mask}
        with (
            self._fresh_workspace(tensors.x, 4),
            checked(seed, **named) as self.forward,
            Counter() as forward,
        ):
            self.y = tensors.layer(tensors.x, **extras)
        with (
            self._fresh_workspace(tensors.x, 2),
            checked(seed + 1, **named) as self.backward,
            Counter() as backward,
        ):
            self.gradients = torch.autograd.grad(self.y, inputs, tensors.grad)
        self.operations = forward.seen + backward.seen

    @contextmanager
    def _fresh_workspace(self, x: torch.Tensor, number: int) -> Iterator[None]:
        """One no larger than the launches need, NaN at first; afterwards its tickets are 0."""
        plans._workspaces.clear()
        stages.workspace_for(x, self.plan, number)
        yield
        used = plans._workspaces.values()
        assert not any(w.tickets.any() for w in used), "a ticket is not back at 0"


def check(case: Case, seed: int = 0) -> None:
    """Steps of a case: values, gradients, buffers, launches, bytes."""
    tensors = Tensors(case, seed)
    layer, c = tensors.layer, case.shape[1]
    running: Any = truth.Running(np.zeros(c), np.ones(c), 0)
    window = getattr(case.policy, "window", None)
    memory = None if window is None else np.zeros((2, c))
    extra = {"residual": None if tensors.residual is None else numpy(tensors.residual)}
    extra["mask"] = None if tensors.mask is None else tensors.mask.numpy()
    for number in range(case.steps):
        if number:  # another mean and variance than the running ones
            with torch.no_grad():
                tensors.x.sub_(case.mean).mul_(1.5).add_(case.mean + number)
            # The statistics as float32 holds them: their rounding is no error of this step.
            running = truth.Running(
                numpy(layer.running_mean), numpy(layer.running_var), int(layer.num_batches_tracked)
            )
        x = numpy(tensors.x)
        step = Step(case, tensors, seed + 7 * number)
        expected = truth.train(
            x, case.policy, running, tensors.setting(case), grad=numpy(tensors.grad),
            memory=memory, **extra,
        )  # fmt: skip
        running, memory = expected.running, expected.memory
        compare(case, step, expected)
        close(layer.running_mean, running.mean, 1e-6, "running mean")
        close(layer.running_var, running.var, 1e-6, "running variance")
        groups = len(truth.ghost_lengths(len(x), getattr(case.policy, "size", len(x))))
        empty = case.mask == "none"
        assert int(layer.num_batches_tracked) == (number + 1) * groups * (not empty)
        if memory is not None:
            close(layer.gradient_memory, memory, 1e-6, "memory of the gradient")
        check_cost(case, step, tensors)


def close(actual: torch.Tensor, expected: Any, limit: float, what: str) -> None:
    found = error(actual, expected)
    assert found <= limit, f"{what}: error {found:.3g} above {limit:.3g}"


def compare(case: Case, step: Step, expected: truth.Result) -> None:
    exact = case.dtype is torch.float32
    forward = BAR if exact else TABLE[case.dtype, "forward"].limit
    backward = GRADIENT_BAR if exact else TABLE[case.dtype, "backward"].limit
    close(step.y, expected.y, forward, "y")
    wanted = [expected.dx] + [expected.dresidual] * case.residual
    wanted += [expected.dweight, expected.dbias] * case.affine
    for name, found, right in zip(
        ["dx"] + ["dresidual"] * case.residual + ["dweight", "dbias"], step.gradients, wanted,
        strict=False,
    ):  # fmt: skip
        half = found.dtype is not torch.float32
        limit = TABLE[found.dtype, "backward"].limit if half else backward
        close(found, right, limit, name)


def check_cost(case: Case, step: Step, tensors: Tensors) -> None:
    """The passes of the design's table, two launches each way, and no operation beside them."""
    fused = case.mask is None or not case.policy.counts_samples
    once = step.plan.whole and fused
    if fused:
        assert step.operations == []
        one, two = ["normalize"], ["moments", "apply"]
        assert step.forward.launches == (one if once else two)
        one, two = ["normalize_grad"], ["reduce_grad", "apply_grad"]
        assert step.backward.launches == (one if once else two)
    kept = Keep.needed(case.activation, residual=case.residual, compiled=True)
    size = tensors.x.numel() * tensors.x.element_size()
    bits = 0
    if kept is Keep.SIGNS:
        plan = step.plan
        row_blocks = sum(-(-rows // plan.tile_rows) for rows in plan.groups or (plan.rows,))
        bits = (
            row_blocks * plan.blocks * plan.column_splits * plan.tile_rows * plan.tile_columns // 8
        )
    forward = {"x": (2, 0), "y": (0, 1), "residual": (1, 0), "signs": (0, 1)}
    backward = {"x": (2, 0), "grad": (2, 0), "dx": (0, 1), "dresidual": (0, 1), "signs": (2, 0)}
    backward |= {"residual": (2, 0), "extra": (2, 0)}  # where z is rebuilt, or y read
    for watch, table in ((step.forward, forward), (step.backward, backward)):
        for name, times in table.items():
            unit = bits if name == "signs" else size
            if watch.traffic.get(name, [0, 0]) != [0, 0]:
                assert watch.traffic[name] == [unit * min(k, 1) if once else unit * k
                                               for k in times], name  # fmt: skip
    moved = passes(step.forward, size), passes(step.backward, size)
    expected = (3 + case.residual, 5 + (case.residual and case.activation is not None))
    if kept is Keep.OUTPUT or (kept is Keep.REBUILT and case.residual):
        expected = (expected[0], expected[1] + 2)
    if once:  # x, the residual, and what the derivative is taken from are read once
        expected = (expected[0] - 1, expected[1] - 2 - (expected[1] > 6))
    assert moved == expected


def passes(watch: Watch, size: int) -> float:
    """Tensors of x's size that were read or written."""
    sized = ("x", "residual", "y", "grad", "dx", "dresidual", "extra")
    return sum(sum(watch.traffic.get(name, (0, 0))) for name in sized) / size
