"""Replicas that call a layer with different policies, channels, types or modes."""

import torch
import torch.distributed as dist
from tests.nn.replica_cases import Collectives, case, error_of

import steadynorm as sn
from steadynorm.nn.synchronize import DESCRIPTION


def odd_one_out(made: torch.nn.Module, x: torch.Tensor, *wanted: str) -> None:
    """Every rank raises, says who differs in what, and leaves its statistics as they were."""
    before = {key: value.clone() for key, value in made.state_dict().items()}
    error = error_of(lambda: made(x))
    assert isinstance(error, RuntimeError), error
    message = str(error)
    for words in wanted:
        assert words in message, message
    for key, value in made.state_dict().items():
        assert torch.equal(value, before[key]), key


def names(common: object, odd: object) -> str:
    """What the error says where the last rank is the odd one."""
    ranks = [str(rank) for rank in range(dist.get_world_size())]
    return f"{common} on rank {', '.join(ranks[:-1])} and {odd} on rank {ranks[-1]}"


@case
def replicas_that_disagree_at_first_all_raise() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return
    bare = {"affine": False, "track_running_stats": False}
    kinds = [
        ({}, {"statistics": "steady"}, names("statistics=Batch()", f"statistics={sn.Steady()!r}")),
        ({"statistics": "ghost"}, {"statistics": "batch"}, names(f"statistics={sn.Ghost()!r}",
                                                                 "statistics=Batch()")),
        ({}, {"num_features": 7}, names("4 channels", "7 channels")),
        ({}, {"dtype": torch.float64}, names("statistics in float32", "statistics in float64")),
        ({}, {"track_running_stats": False}, names("with running statistics",
                                                   "without running statistics")),
        ({}, {"nonfinite": "skip"}, names("nonfinite='propagate'", "nonfinite='skip'")),
        (bare, {**bare, "statistics": "ghost"}, names("statistics=Batch()",
                                                      f"statistics={sn.Ghost()!r}")),
    ]  # fmt: skip
    for common, odd, wanted in kinds:
        settings = {"num_features": 4, **(odd if rank == world - 1 else common)}
        for samples in (5, 0):
            made = sn.BatchNorm1d(synchronize=True, **settings)
            x = torch.randn(samples, settings["num_features"], dtype=settings.get("dtype"))
            odd_one_out(made, x, "BatchNorm1d: `synchronize`: the replicas must call", wanted)


@case
def a_replica_that_changes_alone_makes_all_raise() -> None:
    """Also where it changes later; once all have changed, or it is as before, they go on."""
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1:
        return
    odd = rank == world - 1
    for first, then in (("batch", "steady"), ("steady", "ghost"), ("ghost", "batch")):
        made = sn.BatchNorm1d(4, statistics=first, synchronize=True)
        for step in range(3):
            made(torch.randn(5 * (step != rank), 4))  # one is without samples
        before = made.statistics
        if odd:
            made.statistics = then
        odd_one_out(made, torch.randn(5, 4), f"rank {rank}" if odd else f"rank {world - 1}")
        made.statistics = before
        made(torch.randn(5, 4))
        made.statistics = then
        made(torch.randn(5, 4))
    made = sn.BatchNorm1d(4, synchronize=True)
    made(torch.randn(5, 4))
    if odd:
        made.double()
    x = torch.randn(5, 4, dtype=torch.float64 if odd else None)
    odd_one_out(made, x, names("statistics in float32", "statistics in float64"))
    made.double()
    with Collectives() as forward:
        made(x.double())
        made(x.double())
    # Those that had changed before announce it, and all compare; then nothing more is sent.
    assert forward.sizes == [14, DESCRIPTION, 14, 14], forward.sizes


@case
def an_agreement_ends_with_its_group() -> None:
    if dist.get_world_size() == 1:
        return
    made = sn.BatchNorm1d(4, synchronize=True)
    made(torch.randn(5, 4))
    made.synchronize = dist.new_group()
    with Collectives() as forward:
        made(torch.randn(5, 4))
        made(torch.randn(5, 4))
    assert forward.sizes == [DESCRIPTION, 14, 14], forward.sizes
