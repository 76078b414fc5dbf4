"""Gradients: numerically in double, first and second order, and against float64 autograd."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import tolerances, truth
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

import steadynorm as sn
from steadynorm.statistics import Context, Moments, Normalizer, Policy, RunningStatistics

# The compiled kernels' own tests take every activation in double; compiling them here too is slow.
EAGER = pytest.mark.parametrize("route", ["reference"], indirect=True)
SHAPE = (5, 2, 3)
ACTIVATIONS = tuple(truth.ACTIVATIONS)


class Fixed(Policy):
    """The normal form with constants that stay, so that a numerical derivative sees what the
    documents define: m and u move with the batch by the share alone, r and d not at all."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        share, mean, var = 0.3, (0.2, -0.4), (0.5, 0.8)
        like = batch.var
        return Normalizer(
            share * batch.mean + like.new_tensor(mean),
            share * batch.mean_low,
            share * batch.var + like.new_tensor(var),
            like.new_tensor((1.3, 0.7)),
            like.new_tensor((-0.2, 0.5)),
            share,
        )


POLICIES = {
    "batch": sn.Batch(),
    "ghost": sn.Ghost(size=2),  # groups of 2 and 3 samples
    "running": sn.Running(),
    "frozen": sn.Frozen(),
    "fixed": Fixed(),  # for `Steady` and `Renorm`
    "inference": sn.Batch(),
}
MASK = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 0, 1]]).bool()


def double_inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    return {"x": draw(*SHAPE), "weight": draw(2), "bias": draw(2), "residual": draw(*SHAPE)}


def function(policy: str, **settings: Any) -> Any:
    """The layer as a function of its differentiable inputs; every call starts alike."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        like = {"dtype": x.dtype}
        return sn.functional.batch_norm(
            x,
            torch.tensor([0.3, -0.1], **like),
            torch.tensor([1.5, 0.7], **like),
            weight,
            bias,
            policy != "inference",
            0.2,
            num_batches_tracked=torch.tensor(100),
            statistics=POLICIES[policy],
            residual=residual,
            **settings,
        )

    return run


def check(policy: str, *, residual: bool, second: bool = True, **settings: Any) -> None:
    inputs = tuple(double_inputs().values())[: 4 if residual else 3]
    run = function(policy, **settings)
    assert gradcheck(run, inputs)
    if second:
        assert gradgradcheck(run, inputs, atol=1e-4)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_policies(policy: str, masked: bool) -> None:
    check(policy, residual=False, mask=MASK if masked else None)


@EAGER
@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_activations_with_residual(activation: str) -> None:
    check("batch", residual=True, activation=activation)


@EAGER
@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("activation", ["relu", "gelu", "elu"])
@pytest.mark.parametrize("policy", ["ghost", "running", "fixed", "inference"])
def test_policies_with_everything(policy: str, activation: str) -> None:
    mask = None if policy == "inference" else MASK
    check(policy, residual=True, second=activation == "gelu", mask=mask, activation=activation)


@EAGER
@pytest.mark.usefixtures("route")
def test_the_numerical_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the terms through mean and variance it must fail."""
    from steadynorm.kernels.reference import closed_form
    from steadynorm.statistics import GradientCoefficients

    def nothing(factors: Any, *sums: Tensor) -> GradientCoefficients:
        return GradientCoefficients(factors.constant * 0, factors.constant * 0)

    monkeypatch.setattr(closed_form, "gradient_coefficients", nothing)
    inputs = tuple(double_inputs().values())[:3]
    with pytest.raises(GradcheckError):
        gradcheck(function("fixed", mask=MASK), inputs)


# The policies as they are, against float64 autograd of the plain definition -----------------------

CONSTANT_POLICIES = {
    **{name: policy for name, policy in POLICIES.items() if name not in {"fixed", "inference"}},
    "steady": sn.Steady(prior=9.0, horizon=20.0, window=None),
    "renorm": sn.Renorm(warmup=0, r_ramp=10, d_ramp=10),
    "ghost": sn.Ghost(size=3),
    "renorm_clipped": sn.Renorm(r_max=1.05, d_max=0.05, warmup=0, r_ramp=10, d_ramp=10),
}
SIZES = {"nc": (33, 2), "ncl": (7, 2, 5), "nchw": (7, 2, 4, 5)}


def defined(
    x: Tensor, policy: Policy, running: truth.Running, setting: truth.Setting, mask: Tensor | None
) -> Tensor:
    """γ·x̂ + β in float64 from plain operations, its constants the truth's."""
    parts = []
    ghost = isinstance(policy, sn.Ghost)
    sizes = truth.ghost_lengths(len(x), policy.size) if ghost else [len(x)]
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        rows = x[start : start + size]
        flat = rows.movedim(1, 0).flatten(1)
        if mask is not None:
            flat = flat[:, mask[start : start + size].flatten()]
        mean = flat.mean(1)
        var = (flat - mean[:, None]).square().mean(1)
        batch = truth.Moments(flat.shape[1], mean.detach().numpy(), var.detach().numpy())
        n = truth.normal(policy, batch, running, len(x), setting)
        m = torch.as_tensor(n.m) + n.share * (mean - mean.detach())
        u = torch.as_tensor(n.u) + n.share * (var - var.detach())
        beside = (1, -1) + (1,) * (x.ndim - 2)
        hat = (rows - m.reshape(beside)) / (u + setting.eps).sqrt().reshape(beside)
        r, d = (torch.as_tensor(v * np.ones(2)).reshape(beside) for v in (n.r, n.d))
        parts.append(hat * r + d)
    return torch.cat(parts)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("policy", CONSTANT_POLICIES)
def test_float32_against_float64_autograd_and_the_closed_form(
    policy: str, activation: str | None
) -> None:
    """Two independent routes to the truth: PyTorch's derivative and the documents' formula."""
    statistics = CONSTANT_POLICIES[policy]
    running = truth.Running(np.array([0.25, 2.5]), np.array([1.5, 0.75]), 100)
    for layout, masked in [(layout, masked) for layout in SIZES for masked in (False, True)]:
        said = f"{layout} {'masked' if masked else 'plain'} "
        generator = torch.Generator().manual_seed(7)
        shape = SIZES[layout]
        x, residual, grad = (torch.randn(shape, generator=generator) for _ in range(3))
        weight, bias = (torch.randn(2, generator=generator) for _ in range(2))
        mask = None
        if masked:
            mask = torch.rand((shape[0], *shape[2:]), generator=generator) < 0.8
            mask[::3] = mask[1::3] = True
        setting = truth.Setting(weight.numpy(), bias.numpy(), activation, 0.2)

        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        y = sn.functional.batch_norm(
            leaves[0],
            torch.tensor(running.mean, dtype=torch.float32),
            torch.tensor(running.var, dtype=torch.float32),
            leaves[1],
            leaves[2],
            True,
            0.2,
            num_batches_tracked=torch.tensor(running.batches),
            statistics=statistics,
            activation=activation,
            residual=leaves[3],
            mask=mask,
        )
        y.backward(grad)

        doubles = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
        hat = defined(doubles[0], statistics, running, setting, mask)
        beside = (1, -1) + (1,) * (x.ndim - 2)
        z = doubles[1].reshape(beside) * hat + doubles[2].reshape(beside) + doubles[3]
        plain = {None: z, "relu": z.relu(), "gelu": torch.nn.functional.gelu(z)}[activation]
        plain.backward(grad.double())

        closed = truth.train(
            x.numpy(),
            statistics,
            running,
            setting,
            mask=None if mask is None else mask.numpy(),
            residual=residual.numpy(),
            grad=grad.numpy(),
        )
        tolerances.close(y, closed.y, "forward", said + "y")
        for name, leaf, wide in zip(
            ("dx", "dweight", "dbias", "dresidual"), leaves, doubles, strict=True
        ):
            right = getattr(closed, name)
            tolerances.close(wide.grad, right, "backward", f"{said}autograd, {name}")
            tolerances.close(leaf.grad, right, "backward", said + name)


@EAGER
@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
def test_only_what_is_asked_for(needed: str) -> None:
    """One input needs its gradient, the others none; the value is the same."""
    inputs = double_inputs()
    run = function("batch", activation="silu")
    grad = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    everything = torch.autograd.grad(run(**inputs), list(inputs.values()), grad)
    alone = {name: t.detach() for name, t in inputs.items()}
    alone[needed].requires_grad_()
    (found,) = torch.autograd.grad(run(**alone), alone[needed], grad)
    torch.testing.assert_close(found, everything[list(inputs).index(needed)], rtol=0, atol=1e-14)
