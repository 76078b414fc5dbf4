"""Inputs for the CPU kernels' tests, and the forward checked against float64 NumPy."""

from itertools import pairwise

import numpy as np
import torch
from tests import truth
from tests.tolerances import close

from steadynorm.kernels.cpu import stages as cpu
from steadynorm.kernels.cpu.kernels import SCALARS

EPS = 1e-5
F32, F64 = torch.float32, torch.float64
HALVES = [dtype for dtype in SCALARS if dtype.itemsize == 2]  # float16 where the processor has it

# Strips, planes and rows together; odd, prime, single samples, channels and positions.
SHAPES = [
    (2, 16, 4, 4), (5, 7, 3), (3, 3, 40, 40), (1, 3, 5, 5), (7, 1, 11, 13), (4, 130, 9, 11),
    (64, 1030), (20, 2500), (301, 6), (2, 3, 5, 7, 11), (9, 4, 1), (33, 40, 7, 7), (2, 2, 71, 73),
    (1, 5, 2), (2, 43, 24, 24), (3, 41, 13, 11),
]  # fmt: skip
# Planes, several together, also of odd length, strips.
EDGES = [(3, 3, 40, 40), (3, 20, 24, 24), (3, 41, 13, 11), (4, 50, 9, 11)]
LAYOUTS = ["first", "last"]


def laid(t, layout):
    return t.contiguous() if layout == "first" else t.movedim(1, -1).contiguous().movedim(-1, 1)


class Case:
    """Inputs in their type and layout, and the same values in float64 NumPy."""

    def __init__(self, shape, layout="first", dtype=F32, *, mean=0.0, groups=None, seed=0):
        draw = torch.Generator().manual_seed(seed)

        def normal(*size):
            return torch.randn(size, generator=draw, dtype=F64)

        self.x = laid((normal(*shape) + mean).to(dtype), layout)
        self.residual = laid(normal(*shape).to(dtype), layout)
        self.grad = laid(normal(*shape).to(dtype), layout)
        real = F64 if dtype == F64 else F32
        self.weight = (torch.rand(shape[1], generator=draw, dtype=F64) + 0.5).to(real)
        self.bias = normal(shape[1]).to(real)
        self.groups = groups
        self.sizes = groups or (shape[0],)

    def split(self, t):
        """The groups of an x-sized tensor in float64 NumPy."""
        whole, starts = t.to(F64).numpy(), np.cumsum((0, *self.sizes))
        return [whole[a:b] for a, b in pairwise(starts)]

    def rows(self, per_group):
        """What the kernels return per channel: one row for each group, or no row axis."""
        return np.stack(per_group) if self.groups else per_group[0]

    def moments(self):
        return [truth.moments(x) for x in self.split(self.x)]


def seen(t):
    return t.to(F64).numpy()


def beside(values, x):
    return np.reshape(values, (1, -1) + (1,) * (x.ndim - 2))


def mean_of(moments):
    return seen(moments.mean) + seen(moments.mean_low)


def check_moments(case, found):
    right = case.moments()
    kind = found.mean.dtype
    close(torch.from_numpy(mean_of(found)).to(kind), case.rows([m.mean for m in right]),
          "statistics", "mean")  # fmt: skip
    close(found.var, case.rows([m.var for m in right]), "statistics", "var")
    counts = np.asarray(found.count).reshape(-1)
    assert counts.tolist() == [m.count for m in right]


def normalized(case, activation, add):
    forward, _ = truth.ACTIVATIONS[activation]
    parts = []
    for x, r, m in zip(case.split(case.x), case.split(case.residual), case.moments(), strict=True):
        gain = seen(case.weight) / np.sqrt(m.var + EPS)
        z = (x - beside(m.mean, x)) * beside(gain, x) + beside(seen(case.bias), x)
        parts.append(forward(z + r if add else z))
    return np.concatenate(parts)


def check_forward(case, activation=None, add=False):
    residual = case.residual if add else None
    y, moments = cpu.normalize(
        case.x, case.weight, case.bias, EPS, residual=residual, activation=activation,
        groups=case.groups,
    )  # fmt: skip
    check_moments(case, moments)
    assert y.dtype == case.x.dtype
    assert y.stride() == case.x.stride()
    close(y, normalized(case, activation, add), "forward", "normalize")
    scale = case.weight / (moments.var + EPS).sqrt()
    shift = case.bias - moments.mean_low * scale
    same = cpu.apply(
        case.x, moments.mean, scale, shift, residual=residual, activation=activation,
        groups=case.groups,
    )  # fmt: skip
    close(same, normalized(case, activation, add), "forward", "apply")
    return y, moments, scale, shift
