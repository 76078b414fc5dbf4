"""DistributedDataParallel and FSDP2 around our layers, on one gloo process."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import steadynorm as sn

POLICIES = {
    "batch": sn.Batch(),
    "steady": sn.Steady(),
    "two-way": sn.Steady(prior=16, window=16),
    "running": sn.Running(),
    "renorm": sn.Renorm(warmup=0, r_ramp=2, d_ramp=2),
    "ghost": sn.Ghost(4),
    "frozen": sn.Frozen(),
}
everywhere = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network(policy: sn.Batch) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6, bias=False),
        sn.BatchNorm1d(6, statistics=policy, activation="relu", synchronize=True),
        torch.nn.Linear(6, 2),
    )


def full(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def assert_same(made: Any, truth: Any) -> None:
    for name, parameter in truth.named_parameters():
        found = full(made.get_parameter(name).grad)
        torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-6)
    for name, buffer in truth.named_buffers():
        torch.testing.assert_close(full(made.get_buffer(name)), buffer, rtol=1e-6, atol=1e-6)


@everywhere
def test_ddp_two_forwards_one_backward(policy: sn.Batch) -> None:
    """DDP copies buffers before each forward, and the second forward moves them once more."""
    truth = network(policy)
    wrapped = DistributedDataParallel(copy.deepcopy(truth))
    x, other = torch.randn(8, 4), torch.randn(8, 4)
    for model in (truth, wrapped):
        (model(x) - model(other)).square().mean().backward()
    assert_same(wrapped.module, truth)


@everywhere
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp2(policy: sn.Batch) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    truth = network(policy)
    sharded = copy.deepcopy(truth)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
    for _ in range(2):
        x = torch.randn(8, 4)
        for model in (truth, sharded):
            model.zero_grad()
            model(x).square().mean().backward()
        assert_same(sharded, truth)
