"""One replica of a process group: runs every case, compares with one process that saw everything.

Started by tests/replicas.py with the folder for results as its only argument. Every replica holds
the whole batch, normalizes its own part of it in the group, and the whole of it alone.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests import replicas
from tests.nn import replica_disagreements  # noqa: F401 - its cases, too
from tests.nn.replica_cases import CASES, Collectives, case, error_of
from torch.nn.parallel import DistributedDataParallel

import steadynorm as sn
from steadynorm.kernels.cpu import operators
from steadynorm.kernels.cpu.backend import CPU
from steadynorm.nn.synchronize import DESCRIPTION

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=4, d_ramp=4),
    "ghost": sn.Ghost(size=3),
    "frozen": sn.Frozen(),
}
# Beside the others, in float64 alone: its memory is small where gradients cancel.
TWO_WAY = sn.Steady(prior=16, window=16)
# Samples of each replica, by the number of replicas. Ghost groups of 3 lie across replicas.
COUNTS = {1: [(9,)], 2: [(4, 5), (9, 0)], 4: [(3, 0, 5, 1), (0, 0, 2, 7)]}
SHAPES = {"vectors": (5,), "images": (3, 4, 2)}
# Sums in float32 depend on the order of their terms; in float64 that hides nothing else.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}


def layer(policy: sn.Batch, shape: tuple[int, ...], **settings: Any) -> torch.nn.Module:
    """A layer whose parameters and statistics are not the initial ones; the same on all ranks."""
    kind = sn.BatchNorm1d if len(shape) == 1 else sn.BatchNorm2d
    made = kind(shape[0], statistics=policy, **settings)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean, made.running_var):
            tensor.copy_(torch.rand(shape[0], generator=random) + 0.5)
        made.num_batches_tracked.fill_(3)
    return made


def data(counts: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Any:
    """Input, residual, mask, upstream gradient of the whole batch, and the slice that is ours."""
    random = torch.Generator().manual_seed(seed)
    full = (sum(counts), *shape)
    x, residual, grad = (torch.randn(full, generator=random, dtype=dtype) for _ in range(3))
    mask = torch.rand((full[0], *full[2:]), generator=random) > 0.3
    mask[::4] = mask[1::4] = mask[2::4] = True  # two values or more in every ghost group
    start = sum(counts[: dist.get_rank()])
    return 2 * x + 3, residual, mask, grad, slice(start, start + counts[dist.get_rank()])


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, what
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    error = (actual - expected).abs().max().item() / scale if expected.numel() else 0.0
    assert error <= TOLERANCE.get(expected.dtype, 0), f"{what}: relative error {error:.3g}"


def assert_same_state(ours: torch.nn.Module, truth: torch.nn.Module) -> None:
    for name, buffer in truth.named_buffers():
        assert_near(ours.get_buffer(name), buffer, name)
        everywhere = [torch.empty_like(buffer) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, ours.get_buffer(name))
        assert all(torch.equal(other, everywhere[0]) for other in everywhere), name


def added_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def compare(
    ours: Any, truth: Any, counts: tuple[int, ...], shape: tuple[int, ...], *, masked: bool
) -> list[list[int]]:
    """Three training steps of both; values, gradients and buffers agree. Returns collectives."""
    sizes = []
    dtype = truth.weight.dtype
    for seed in range(3):
        x, residual, mask, grad, own = data(counts, shape, dtype, seed)
        x_own, x_all = x[own].clone().requires_grad_(), x.clone().requires_grad_()
        r_own, r_all = residual[own].clone().requires_grad_(), residual.clone().requires_grad_()
        ours.zero_grad()
        truth.zero_grad()
        y_all = truth(x_all, residual=r_all, mask=mask if masked else None)
        y_all.backward(grad)
        with Collectives() as forward:
            y_own = ours(x_own, residual=r_own, mask=mask[own] if masked else None)
        with Collectives() as backward:
            y_own.backward(grad[own])
        sizes.append([forward.sizes, backward.sizes])
        assert_near(y_own, y_all[own], "output")
        assert_near(x_own.grad, x_all.grad[own], "gradient of input")
        assert_near(r_own.grad, r_all.grad[own], "gradient of residual")
        assert_near(added_over_ranks(ours.weight.grad), truth.weight.grad, "gradient of weight")
        assert_near(added_over_ranks(ours.bias.grad), truth.bias.grad, "gradient of bias")
        assert_same_state(ours, truth)
    return sizes


def equals_one_process(name: str, kind: str, masked: str, dtype: torch.dtype) -> None:
    """Values, gradients and buffers are those of one process; one small collective each way."""
    shape, policy = SHAPES[kind], POLICIES.get(name, TWO_WAY)
    channels = shape[0]
    for counts in COUNTS[dist.get_world_size()]:
        settings = {"activation": "silu", "dtype": dtype}
        ours = layer(policy, shape, synchronize=True, **settings)
        truth = layer(policy, shape, **settings)
        steps = compare(ours, truth, counts, shape, masked=masked == "masked")
        if name != "frozen" and dist.get_world_size() > 1:
            assert steps[0][0].pop(0) == DESCRIPTION, "replicas first compare what they call"
        for forward, backward in steps:
            if name == "frozen" or dist.get_world_size() == 1:
                assert (forward, backward) == ([], []), (forward, backward)
            elif name == "ghost":
                assert (forward, backward) == ([1, 3 * (2 + 3 * channels)], [3 * 2 * channels]), (
                    forward,
                    backward,
                )
            else:
                assert (forward, backward) == ([2 + 3 * channels], [2 * channels]), (
                    forward,
                    backward,
                )


for _name in POLICIES:
    for _kind in SHAPES:
        case(equals_one_process, _name, _kind, "plain", torch.float32)
        case(equals_one_process, _name, _kind, "masked", torch.float32)
    case(equals_one_process, _name, "images", "masked", torch.float64)
for _kind in SHAPES:
    case(equals_one_process, "two_way", _kind, "masked", torch.float64)


@case
def large_means_keep_their_precision() -> None:
    """At mean 1e6 the replicas' means must not be rounded to float32 before they are pooled."""
    counts = COUNTS[dist.get_world_size()][0]
    x, _, _, _, own = data(counts, (4,), torch.float64, 0)
    x = (x + torch.tensor([0.0, 1e3, 1e5, 1e6])).float()
    wide = x.double()
    truth = (wide - wide.mean(0)) / (wide.var(0, correction=0) + 1e-5).sqrt()
    y = sn.BatchNorm1d(4, synchronize=True)(x[own])
    assert not y.numel() or (y - truth[own]).abs().max() < 2e-6


@case
def an_empty_batch_everywhere_updates_nothing() -> None:
    for name, policy in POLICIES.items():
        ours = layer(policy, (3, 4, 2), synchronize=True)
        before = {key: value.clone() for key, value in ours.state_dict().items()}
        x = torch.randn(0, 3, 4, 2, requires_grad=True)
        y = ours(x)
        y.sum().backward()
        assert y.shape == x.shape, name
        assert x.grad is not None, name
        assert x.grad.shape == x.shape, name
        for key, value in ours.state_dict().items():
            assert torch.equal(value, before[key]), (name, key)


@case
def one_value_in_all_raises_everywhere() -> None:
    """All replicas refuse together, nothing moves, and the next call works."""
    world, rank = dist.get_world_size(), dist.get_rank()
    alone = torch.ones(1 if rank == world - 1 else 0, 4)
    for policy in (sn.Batch(), sn.Ghost(4)):
        ours = layer(policy, (4,), synchronize=True)
        before = {key: value.clone() for key, value in ours.state_dict().items()}
        error = error_of(lambda made=ours: made(alone))
        group = f" in a group of {policy!r}" if isinstance(policy, sn.Ghost) else ""
        assert isinstance(error, ValueError), error
        assert str(error) == (
            f"BatchNorm1d: training needs more than one value per channel{group}; got input of "
            f"shape {tuple(alone.shape)}. Use a larger batch, or statistics=sn.Steady(), "
            f"sn.Running() or sn.Frozen(), which work with one value."
        )
        for key, value in ours.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert ours(torch.randn(3, 4)).shape == (3, 4)
    for policy in (sn.Steady(), sn.Running()):
        truth = layer(policy, (4,))
        expected = truth(torch.ones(1, 4))
        ours = layer(policy, (4,), synchronize=True)
        assert_near(ours(alone), expected[: len(alone)], repr(policy))
        assert_same_state(ours, truth)


@case
def a_group_of_some_replicas() -> None:
    """`synchronize=group` pools over that group alone."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world < 4:
        return
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    counts = [(2, 0, 4, 0), (0, 3, 0, 4)][rank % 2]
    x, _, _, grad, own = data(counts, (5,), torch.float64, rank % 2)
    for policy in POLICIES.values():
        ours = layer(policy, (5,), dtype=torch.float64, synchronize=groups[rank % 2])
        truth = layer(policy, (5,), dtype=torch.float64)
        x_own, x_all = x[own].clone().requires_grad_(), x.clone().requires_grad_()
        y_own, y_all = ours(x_own), truth(x_all)
        y_own.backward(grad[own])
        y_all.backward(grad)
        assert_near(y_own, y_all[own], "output")
        assert_near(x_own.grad, x_all.grad[own], "gradient of input")
        for name, buffer in truth.named_buffers():
            assert_near(ours.get_buffer(name), buffer, name)


@case
def second_derivatives() -> None:
    """A penalty on the gradient, as in WGAN-GP, differentiates through all replicas."""
    counts = COUNTS[dist.get_world_size()][0]
    x, _, _, grad, own = data(counts, (3,), torch.float64, 0)
    for policy in POLICIES.values():
        found = []
        for synchronize, part in ((True, own), (False, slice(None))):
            made = layer(policy, (3,), dtype=torch.float64, synchronize=synchronize)
            start = x[part].clone().requires_grad_()
            y = made(start).tanh()
            (first,) = torch.autograd.grad(y, start, grad[part], create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), start)
            found.append((first.detach(), second))
        for ours, truth, what in zip(*found, ("first", "second"), strict=True):
            assert_near(ours, truth[own], f"{policy!r}: {what} derivative")


@case
def not_finite_batches_are_skipped_everywhere() -> None:
    ours = layer(sn.Batch(), (3,), synchronize=True, nonfinite="skip")
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    x = torch.randn(4, 3)
    if dist.get_rank() == 0:
        x[1, 1] = float("inf")
    ours(x)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


def compiled_equals_one_process(name: str) -> None:
    if dist.get_world_size() != 2:
        return
    settings = {"activation": "relu", "dtype": torch.float64}
    torch._dynamo.reset()
    policy = POLICIES.get(name, TWO_WAY)
    ours = layer(policy, (3, 4, 2), synchronize=True, **settings)
    truth = layer(policy, (3, 4, 2), **settings)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed, counts in enumerate([(4, 5), (6, 2)]):
        x, _, mask, grad, own = data(counts, (3, 4, 2), torch.float64, seed)
        x_own, x_all = x[own].clone().requires_grad_(), x.clone().requires_grad_()
        y_own, y_all = compiled(x_own, mask=mask[own]), truth(x_all, mask=mask)
        y_own.backward(grad[own])
        y_all.backward(grad)
        assert_near(y_own.detach(), y_all[own].detach(), "output")
        assert_near(x_own.grad, x_all.grad[own], "gradient of input")
        assert_near(added_over_ranks(ours.weight.grad), truth.weight.grad, "gradient of weight")
        assert_same_state(ours, truth)


for _name in ("batch", "steady", "running", "renorm", "two-way"):
    case(compiled_equals_one_process, _name)


@case
def ddp_broadcasts_the_memory_with_the_buffers() -> None:
    """Without `synchronize` every replica starts a forward with the memory of rank 0."""
    made = layer(TWO_WAY, (3,), dtype=torch.float64)
    wrapped = DistributedDataParallel(made)
    for seed in range(3):
        before = [torch.empty_like(made.gradient_memory) for _ in range(dist.get_world_size())]
        dist.all_gather(before, made.gradient_memory)
        random = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        x = torch.randn(4, 3, generator=random, dtype=torch.float64)
        y = wrapped(x.requires_grad_())
        assert torch.equal(made.gradient_memory, before[0]), "not that of rank 0"
        y.backward(torch.randn(4, 3, generator=random, dtype=torch.float64))
        assert not torch.equal(made.gradient_memory, before[0]), "the backward moves it"
    everywhere = [torch.empty_like(made.gradient_memory) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, made.gradient_memory)
    assert all(not torch.equal(other, everywhere[0]) for other in everywhere[1:])


@case
def ghost_does_not_compile_into_one_graph() -> None:
    if dist.get_world_size() != 2:
        return
    torch._dynamo.reset()
    x, _, _, _, own = data((4, 5), (3, 4, 2), torch.float64, 0)
    made = layer(sn.Ghost(3), (3, 4, 2), synchronize=True, dtype=torch.float64)
    error = error_of(lambda: torch.compile(made, fullgraph=True, backend="aot_eager")(x[own]))
    wanted = (  # the compiler wraps it in an error of its own
        "BatchNorm2d: statistics=Ghost(3) with `synchronize` does not compile into one graph: "
        "where groups are cut depends on the other replicas' sample counts. Compile without "
        "fullgraph=True, or choose another policy."
    )
    assert wanted in str(error), error
    truth = layer(sn.Ghost(3), (3, 4, 2), dtype=torch.float64)
    y = torch.compile(made, backend="aot_eager")(x[own])
    assert_near(y.detach(), truth(x)[own].detach(), "output")
    assert_same_state(made, truth)


def main(results: Path) -> None:
    replicas.join(results)
    outcome = {}
    for name, run in CASES.items():
        try:
            run()
            outcome[name] = ""
        except Exception:  # noqa: BLE001 - the test shows it
            outcome[name] = traceback.format_exc()
            sys.stderr.write(f"{name}: {outcome[name]}\n")  # also if the others go no further
        failed = torch.tensor([outcome[name] != ""])
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)  # stay in step also after a failure
    (results / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Every kernel would first be compiled in every process; which one runs is not the matter here.
    CPU.refusal = "replicas are tested in plain PyTorch"
    operators.HAS_NUMBA = False
    main(Path(sys.argv[1]))
