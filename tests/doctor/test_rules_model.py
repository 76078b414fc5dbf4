"""What the rules of a model say besides their fixtures, and that their lines cure."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.doctor.fixtures.small import images, small
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.doctor import Finding, diagnose
from steadynorm.doctor.diagnosis import judge
from steadynorm.doctor.evidence.model import probe_model


def found(model: nn.Module, code: str, **given: Any) -> list[Finding]:
    return [f for f in diagnose(model, **given).findings if f.code == code]


def cured(model: nn.Module, code: str, **given: Any) -> nn.Module:
    """The model after a finding's own line of code, which leaves no such finding."""
    (finding,) = found(model, code, **given)
    names = {"sn": sn, "torch": torch, "model": model, "example_inputs": images()}
    exec(finding.line, names)
    changed: nn.Module = names["model"]  # type: ignore[assignment]
    assert found(changed, code, **given) == []
    return changed


# --- SN201 redundant bias


def test_the_line_drops_the_bias() -> None:
    model = small()
    model[3] = nn.Conv2d(4, 4, 3)
    changed = cured(model, "SN201")
    assert changed[3].bias is None  # type: ignore[index]
    torch.testing.assert_close(changed(images()), model(images()))


@pytest.mark.parametrize("policy", [sn.Steady(), sn.Running(), sn.Frozen()])
def test_a_bias_that_is_subtracted_in_part_is_needed(policy: Any) -> None:
    model, _ = sn.convert(small(), statistics=policy)
    model[3] = nn.Conv2d(4, 4, 3)
    assert found(model, "SN201") == []


# --- SN202 weight decay


def test_decay_of_parameters_that_are_not_trained_is_left_alone() -> None:
    model = small()
    model[1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    (finding,) = found(model, "SN202", optimizer=optimizer)
    assert finding.message == (
        "AdamW decays weight and bias of 1 of 2 batch norms by 0.05, first of '4'"
    )
    assert finding.line == "torch.optim.AdamW(sn.parameter_groups(model, weight_decay=0.05), ...)"
    model[4].bias.requires_grad_(False)
    (finding,) = found(model, "SN202", optimizer=optimizer)
    assert finding.message.startswith("AdamW decays weight of 1 of 2 batch norms")
    assert found(model, "SN202") == []


def test_the_line_names_an_optimizer_of_torch_or_none() -> None:
    class Own(torch.optim.SGD):
        pass

    model = small()
    optimizer = Own(model.parameters(), lr=0.1, weight_decay=0.05)
    several = [optimizer, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)]
    for given in (optimizer, several):
        (finding,) = found(model, "SN202", optimizer=given)
        assert finding.line == "groups = sn.parameter_groups(model, weight_decay=0.05)"


# --- SN203 frozen but moving


def test_the_line_freezes_the_layer_alone() -> None:
    model = small().train()
    model[:2].requires_grad_(False)
    cured(model, "SN203")
    before = model[1].running_mean.clone(), model[4].running_mean.clone()
    model(images())
    assert torch.equal(model[1].running_mean, before[0])
    assert not torch.equal(model[4].running_mean, before[1])


def test_several_layers_are_one_finding_whose_line_freezes_them_alone() -> None:
    model = nn.Sequential(small(), small(), small()).train()
    model[:2].requires_grad_(False)
    (finding,) = found(model, "SN203")
    assert finding.layer == "0.1"
    assert finding.message == (
        "weight and bias are frozen, but a training forward updates running_mean and running_var; "
        "4 layers are affected, this is the first"
    )
    assert finding.evidence == {
        "training": "yes", "parameters_held": 8, "layers": "0.1, 0.4, 1.1, 1.4",
        "layers_affected": 4,
    }  # fmt: skip
    assert finding.line == (
        "for name in ('0.1', '0.4', '1.1', '1.4'): sn.freeze(model.get_submodule(name))"
    )
    changed: Any = cured(model, "SN203")
    assert not changed[0][1].weight.requires_grad
    assert changed[2][1].weight.requires_grad
    (finding,) = found(small().train().requires_grad_(False), "SN203")
    assert finding.line == "sn.freeze(model)"


def test_a_layer_without_parameters_is_judged_by_what_feeds_it() -> None:
    model = small().train()
    model[1] = nn.BatchNorm2d(4, affine=False)
    assert found(model, "SN203") == []
    model[0].requires_grad_(False)
    (finding,) = found(model, "SN203")
    assert finding.message == (
        "the layer before is frozen, but a training forward updates running_mean and running_var"
    )
    assert finding.evidence == {
        "training": "yes", "parameters_held": 0, "layers": "1", "layers_affected": 1,
    }  # fmt: skip


def test_one_parameter_that_is_trained_is_enough() -> None:
    model = small().train()
    model[1].weight.requires_grad_(False)
    assert found(model, "SN203") == []


# --- SN204 no running statistics


def test_statistics_switched_off_afterwards() -> None:
    model = small()
    model[4].track_running_stats = False
    (finding,) = found(model, "SN204")
    assert finding.evidence == {"channels": 4, "buffers_kept": "yes"}
    assert finding.message == (
        "the running statistics of 4 channels are switched off, but kept: training no longer "
        "updates them, and inference normalizes with them as they are"
    )
    before = copy.deepcopy(model[4])
    torch.testing.assert_close(model(images())[:1], model(images()[:1]))  # whoever the others are
    model.train()(images())
    assert torch.equal(model[4].running_mean, before.running_mean)


# --- SN205 dropout, SN206 norm after norm


def test_a_little_dropout_is_information() -> None:
    model = small()
    model[2], model[3] = nn.Dropout2d(0.05), nn.Identity()
    (finding,) = found(model, "SN205")
    assert finding.severity.name == "INFO"
    assert finding.message.endswith("outputs in inference are up to 3% too small")


def test_the_factor_is_what_happens() -> None:
    """Half of the values of mean 0 are dropped, the others doubled: √½ is what inference shows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1, momentum=None)).train()
    for _ in range(20):
        model(torch.randn(4096, 1))
    (finding,) = found(model.eval(), "SN205")
    seen = float(model(torch.randn(1 << 16, 1)).detach().std())
    assert finding.evidence["smallest_factor"] == pytest.approx(seen, rel=0.01)


class Branch(nn.Module):
    """What the first norm gives goes to the second one and elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) + y


def test_a_norm_whose_output_is_used_elsewhere_too() -> None:
    assert found(Branch(), "SN206") == []
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    assert [f.layer for f in found(model, "SN206")] == ["1"]


def test_a_model_that_is_one_norm_stands_after_none() -> None:
    for batches in (None, [images()]):
        assert found(nn.BatchNorm2d(2), "SN206", batches=batches) == []


# --- SN208 recomputed norm


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.body, self.reentrant = body, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_statistics_do_move_twice(reentrant: bool) -> None:
    """And as the evidence says: momentum 0.1 acts as 0.19."""
    model = Checkpointed(small().train(), reentrant)
    findings = found(model, "SN208", batches=[images()])
    assert [f.layer for f in findings] == ["body.1", "body.4"]
    body, x = model.body, images().requires_grad_()
    with torch.no_grad():
        batch = body[0](x).mean((0, 2, 3))  # type: ignore[index]
    before = body[1].running_mean.clone()  # type: ignore[index]
    model(x).square().sum().backward()
    moved = (body[1].running_mean - before) / (batch - before)  # type: ignore[index]
    torch.testing.assert_close(moved, torch.full((4,), findings[0].evidence["acts_as"]))


# --- SN209 replicas


@pytest.fixture
def four_replicas() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model.train())


@pytest.mark.usefixtures("four_replicas")
def test_replicas_without_a_batch_are_information() -> None:
    (finding,) = found(parallel(small()), "SN209")
    assert finding.severity.name == "INFO"
    assert finding.message == (
        "2 of 2 batch norms on 4 replicas (DistributedDataParallel) normalize each by itself; give "
        "batches to see by how many samples"
    )


@pytest.mark.usefixtures("four_replicas")
@pytest.mark.parametrize(
    "pooled",
    [
        lambda model: sn.convert(model, synchronize=True)[0],
        lambda model: sn.convert(model, statistics="frozen")[0],
    ],
    ids=["synchronized", "frozen"],
)
def test_replicas_that_pool_or_do_not_move(pooled: Any) -> None:
    assert found(parallel(pooled(small())), "SN209") == []


def test_data_parallel_splits_the_batch() -> None:
    """Two devices share a process's batch of 20: ten each."""
    evidence = probe_model(small().train(), [images(20)])
    assert evidence.model is not None
    model = replace(evidence.model, wrapper="DataParallel", replicas=2)
    report = judge(replace(evidence, model=model), select=["SN209"])
    assert [f.evidence["samples"] for f in report.findings] == [10]
    assert judge(evidence, select=["SN209"]).findings == ()


# --- SN210 export, SN211 mixed modes


def test_frozen_layers_may_be_in_training_mode() -> None:
    model, _ = sn.freeze(small())
    assert found(model.train(), "SN210", exporting=True) == []
    model.eval()
    model[1].train()
    assert found(model, "SN211") == []


def test_the_lines_put_the_model_into_inference() -> None:
    assert not cured(small().train(), "SN210", exporting=True).training
    model = small()
    model[3:].train()
    assert not cured(model, "SN211")[4].training  # type: ignore[index]


def test_one_layer_that_is_a_model_itself() -> None:
    """Its name is empty, and the lines still are code."""
    model = nn.BatchNorm2d(2, momentum=0.99).train()
    (finding,) = found(model, "SN107")
    exec(finding.line, {"model": model})
    assert model.momentum == pytest.approx(0.01)
    model.requires_grad_(False)
    (finding,) = found(model, "SN203")
    assert finding.line == "sn.freeze(model)"
