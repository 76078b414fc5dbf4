"""Evidence of a model: right, and nothing of the model changed by gathering it."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.doctor.fixtures.small import images, small
from tests.models.surgery.zoo import ZOO
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.doctor import diagnose
from steadynorm.doctor.evidence.model import probe_model
from steadynorm.doctor.evidence.records import Neighbour, NormEvidence


def layer(model: nn.Module, name: str, **given: Any) -> NormEvidence:
    found = {layer.name: layer for layer in probe_model(model, **given).layers}
    return found[name]


# --- nothing changes


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a probe could change, by identity and by bits."""
    held: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002  the global one is what loaders use
        "grad": torch.is_grad_enabled(),
    }
    for name, module in model.named_modules():
        held[f"{name} mode"] = module.training
        held[f"{name} attributes"] = sorted(vars(module))
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            held[f"{name} {table}"] = list(getattr(module, table).items())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        held[f"{name} value"] = (id(tensor), tensor.dtype, tensor.detach().numpy().tobytes())
        held[f"{name} grad"] = (
            tensor.requires_grad, id(tensor.grad), None if tensor.grad is None
            else tensor.grad.numpy().tobytes(),
        )  # fmt: skip
    return held


def in_use() -> nn.Sequential:
    """A model in the middle of training: gradients, hooks, mixed modes, dropout, noisy forward."""
    model = nn.Sequential(*small(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 16, 3)).train()
    model[4].eval()
    model[1].register_forward_hook(lambda module, args, output: None)
    model(images(8)).square().sum().backward()
    return model


class Batches:
    """Shuffled and augmented by every random state there is."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(4):
            if number == self.fail_at:
                raise OSError("the disk is gone")
            scale = random.random() + np.random.rand()  # noqa: NPY002
            yield scale * torch.randn(8, 2, 8, 8)


def test_nothing_changes() -> None:
    model, batches = in_use(), Batches()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    before = everything(model)
    report = diagnose(model, batches, optimizer=optimizer, against=Batches())
    assert {"SN202"} <= {finding.code for finding in report.findings}
    assert report.evidence.data is not None
    assert everything(model) == before
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_nothing_changes_when_data_fails(fail_at: int) -> None:
    model = in_use()
    before = everything(model)
    with pytest.raises(OSError, match="the disk is gone"):
        diagnose(model, Batches(fail_at))
    assert everything(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_changes_when_the_model_fails(error: type[BaseException]) -> None:
    model = in_use()
    calls: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        calls.append(1)
        answer = model(batch)
        if len(calls) == 3:
            raise error("no more")
        return answer

    before = everything(model)
    with pytest.raises(error):
        diagnose(model, Batches(), forward=forward)
    assert everything(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.add_(1),
        lambda model: model[1].running_mean.add_(1),
        lambda model: model[1].eval(),
        lambda model: model[1].register_forward_hook(print),
        lambda model: setattr(model[1], "extra", 1),
        lambda model: model[0].weight.grad.add_(1),
        lambda model: model[0].zero_grad(),
        lambda model: torch.rand(1),
        lambda model: random.random(),
        lambda model: np.random.rand(),  # noqa: NPY002
    ],
)
def test_a_change_would_be_seen(change: Callable[[Any], Any]) -> None:
    model = in_use()
    before = everything(model)
    change(model)
    assert everything(model) != before


# --- evidence is right


def test_state() -> None:
    model = small()
    model[1].momentum, model[4].momentum = None, 0.25
    model[4] = model[4].double()
    state = layer(model, "1").state
    assert (state.num_features, state.framework, state.eps) == (4, "torch", 1e-5)
    assert (state.momentum, state.num_batches_tracked) == (None, 100)
    for name, array in state.arrays().items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, getattr(model[1], name).detach().double().numpy())
    assert state.dtypes == dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), "float32"
    )
    second = layer(model, "4").state
    assert (second.momentum, set(second.dtypes.values())) == (0.25, {"float64"})
    model[1].running_mean.add_(1)  # evidence is a copy
    assert state.running_mean == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_layers_of_every_make() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(2, affine=False),
        nn.BatchNorm2d(2, track_running_stats=False),
        sn.BatchNorm2d(2, statistics="steady", activation="relu"),
        sn.BatchNorm2d(2, statistics=sn.Frozen()),
        nn.SyncBatchNorm(2),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(2),
    )
    layers = probe_model(model).layers
    assert [item.kind for item in layers] == [
        "BatchNorm2d", "BatchNorm2d", "BatchNorm2d", "BatchNorm2d", "SyncBatchNorm",
        "LazyBatchNorm2d",
    ]  # fmt: skip
    places = [item.usage for item in layers]
    assert all(place is not None for place in places)
    assert [place.policy for place in places if place] == [
        "Batch", "Batch", "Steady", "Frozen", "Batch", "Batch",
    ]  # fmt: skip
    assert [place.moves for place in places if place] == [True, False, True, False, True, False]
    assert [place.ours for place in places if place] == [False, False, True, True, False, False]
    assert [place.synchronized for place in places if place] == [False] * 4 + [True, False]
    assert layers[0].state.arrays().keys() == {"running_mean", "running_var"}
    assert layers[1].state.arrays().keys() == {"weight", "bias"}
    assert layers[5].state.arrays() == {}


def test_layers_without_values_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LazyBatchNorm1d(), nn.BatchNorm1d(3, device="meta"))
    report = diagnose(model)
    assert report.evidence.remarks[-1] == (
        "Lazy or on the meta device, so without values to judge: '1', '2'."
    )
    assert [item.state.arrays() for item in report.evidence.layers] == [{}, {}]
    with pytest.raises(ValueError, match="'1' is lazy and has not seen an input yet"):
        diagnose(model, [torch.zeros(4, 2)])


@pytest.mark.parametrize(
    "host", [nn.Linear(2, 3, device="meta"), nn.LazyLinear(3), nn.Linear(2, 3)]
)
def test_the_layer_before_may_be_without_values(host: nn.Module) -> None:
    report = diagnose(nn.Sequential(host, nn.BatchNorm1d(3)))
    usage = report.evidence.layers[0].usage
    assert usage is not None
    assert (usage.host_peak is None) == (type(host) is nn.LazyLinear or host.weight.is_meta)
    assert usage.calls == 1


def test_what_is_of_no_use_without_batches_is_named() -> None:
    report = diagnose(small(), against=[images()], loss=torch.nn.functional.mse_loss)
    assert report.evidence.remarks == ("No batches were given, so not used: `loss`, `against`.",)
    assert diagnose(small()).evidence.remarks == ()


class Tangled(nn.Module):
    """One of everything that the graph of calls is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1)
        self.first = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.25)
        self.second = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.conv(x))
        return self.second(self.drop(y)) + self.second(y.flatten(2).view_as(y))


@pytest.mark.parametrize("batches", [None, [images()]], ids=["traced", "run"])
def test_places(batches: Any) -> None:
    model = Tangled()
    first, second = layer(model, "first", batches=batches), layer(model, "second", batches=batches)
    assert first.usage is not None
    assert second.usage is not None
    assert first.usage.before == (Neighbour("conv", "Conv2d", trained=True),)
    assert (first.usage.calls, first.usage.inputs) == (1, 1)
    assert first.usage.redundant_bias == "conv.bias"
    peak = model.conv.weight.detach().double().flatten(1).abs().amax(1)
    np.testing.assert_array_equal(first.usage.host_peak, peak.numpy())
    assert (second.usage.calls, second.usage.inputs) == (2, 2)
    assert second.usage.before is not None
    drop = Neighbour("drop", "Dropout", None, 0.25)
    assert drop in second.usage.before
    assert second.usage.redundant_bias is None
    assert first.usage.trained == {"weight": True, "bias": True}
    ran = (None, None) if batches is None else (False, 4)
    assert (first.usage.recomputed, first.usage.samples) == ran


def test_a_model_that_cannot_be_traced_is_judged_by_the_rest() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if x.sum() > 0 else self.body(-x)

    evidence = probe_model(Branching())
    assert evidence.remarks == (
        "The graph of calls is not known: torch.fx cannot follow Branching; give batches to run it "
        "on.",
    )
    assert [item.usage.calls for item in evidence.layers if item.usage] == [None, None]
    evidence = probe_model(Branching(), [images()])
    assert evidence.remarks == ()
    assert [item.usage.calls for item in evidence.layers if item.usage] == [1, 1]


def test_a_batch_that_training_refuses_leaves_the_graph_of_inference() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    evidence = probe_model(model, [torch.zeros(1, 3)])
    assert evidence.remarks == (
        "The model cannot run in training on the first batch: Expected more than 1 value per "
        "channel when training, got input size torch.Size([1, 4])",
    )
    place = evidence.layers[0].usage
    assert place is not None
    assert place.before == (Neighbour("0", "Linear", trained=True),)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_told_from_saved_tensor_hooks_and_no_grad(reentrant: bool) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.BatchNorm2d(2) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.one, x, use_reentrant=reentrant)
            with torch.no_grad():
                x = self.two(x)
            with torch.autograd.graph.save_on_cpu():
                return self.three(x)

    layers = probe_model(Mixed(), [images()]).layers
    assert [item.usage.recomputed for item in layers if item.usage] == [True, False, False]


def test_wrappers_are_seen_through() -> None:
    model = nn.DataParallel(small())
    report = diagnose(model)
    assert [item.name for item in report.evidence.layers] == ["1", "4"]
    assert report.evidence.model is not None
    assert (report.evidence.model.wrapper, report.evidence.model.replicas) == ("DataParallel", 1)
    assert report.evidence.target == "Sequential"


def test_an_iterator_of_batches_is_read_once_and_whole() -> None:
    batches = [images() + number for number in range(3)]
    once, again = probe_model(small(), iter(batches)), probe_model(small(), batches)
    assert once.data is not None
    assert again.data is not None
    assert once.data.batches == again.data.batches == 3
    np.testing.assert_array_equal(once.layers[0].data.mean, again.layers[0].data.mean)


@pytest.mark.parametrize("name", ["transformers ResNet (basic)", "MONAI DenseNet"])
def test_real_networks(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    evidence = probe_model(model, [inputs])
    assert evidence.remarks == ()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert [item.name for item in evidence.layers] == names
    assert all(item.usage.calls == 1 for item in evidence.layers if item.usage)
    assert all(item.usage.before and item.usage.after for item in evidence.layers if item.usage)


# --- arguments


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"`target` must be a torch\.nn\.Module, a checkpoint's "):
        diagnose(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`batches` must hold at least one batch; got none"):
        diagnose(small(), [])
    with pytest.raises(TypeError, match="diagnose: `batches` must be an iterable of batches"):
        diagnose(small(), images())
    with pytest.raises(TypeError, match=r"a torch\.optim\.Optimizer or several of them; got str"):
        diagnose(small(), optimizer="sgd")
    with pytest.raises(ValueError, match="`loss` needs a model to go with it; got a checkpoint"):
        diagnose(small().state_dict(), loss=copy.copy)


def test_a_keras_model_is_diagnosed_alive_and_by_its_file(tmp_path: Path) -> None:
    """In a process of its own: Keras chooses its backend once."""
    pytest.importorskip("keras")
    source = f"""
import keras
import steadynorm as sn

model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=0.1)])
for finding in sn.diagnose(model).findings:
    print(finding.code, finding.layer)
model.save(r"{tmp_path / "model.keras"}")
for finding in sn.diagnose(r"{tmp_path / "model.keras"}").findings:
    print(finding.code, finding.layer)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False,
        env={**os.environ, "KERAS_BACKEND": "torch"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "SN107 sequential/batch_normalization",
        "SN101 sequential/batch_normalization",
        "SN107 layers/batch_normalization",
        "SN101 layers/batch_normalization",
    ]
