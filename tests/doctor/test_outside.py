"""The doctor on networks that others wrote: no cure called safe harms, no alarm is false."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.doctor.outside import accuracy, build, by_class, data, norms, shifted, trained
from torch import Tensor, nn
from torch.nn import functional as F

import steadynorm as sn
from steadynorm.doctor import Finding, Report, Severity
from steadynorm.doctor.fixes import fix


def of(report: Report, code: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == code]


def worst(report: Report, *codes: str) -> Severity | None:
    return max((f.severity for code in codes for f in of(report, code)), default=None)


def pale(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5


# --- no cure called safe harms


def fine_tuned(by: Callable[[Tensor], Tensor]) -> nn.Module:
    """Trained on with its batch norms in inference mode, on data of another contrast."""
    model = trained()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for x, y in shifted(data(40), by) * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("loss", [None, F.cross_entropy])
def test_fine_tuning_with_frozen_norms_is_left_as_it_is(loss: Any) -> None:
    model, batches = fine_tuned(pale), shifted(data(), pale)
    report = sn.diagnose(model, batches, loss=loss)
    if loss is None:
        (finding,) = of(report, "SN302")
        assert finding.safe is False
        assert finding.cure.startswith(
            "Were these batch norms frozen while the network was trained"
        )
    fixed = fix(model, report, batches, loss=loss)
    assert {change.what for change in fixed.changes} <= {"left"}
    assert accuracy(fixed.model, pale) == accuracy(model, pale) > 0.8


def test_a_momentum_encoder_keeps_its_moving_statistics() -> None:
    encoder = trained().train().requires_grad_(False)
    report = sn.diagnose(encoder, data())
    assert {finding.safe for finding in of(report, "SN203")} == {False}
    fixed = fix(encoder, report, data())
    before = norms(fixed.model)[0].running_mean.clone()
    fixed.model.train()(data()[0][0])
    assert not torch.equal(norms(fixed.model)[0].running_mean, before)


def test_statistics_that_were_lost_are_measured_where_a_loss_shows_it() -> None:
    model = trained()
    for norm in norms(model):
        norm.reset_running_stats()
    bad, batches = accuracy(model), data(16)
    without = fix(model, sn.diagnose(model, batches), batches)
    assert [change.what for change in without.changes] == ["left"]
    report = sn.diagnose(model, batches, loss=F.cross_entropy)
    fixed = fix(model, report, batches, loss=F.cross_entropy)
    assert accuracy(fixed.model) > bad + 0.2


# --- two sets of data


def test_two_draws_of_one_distribution_do_not_differ() -> None:
    model = trained("RegNet")
    alarms = 0
    for seed in range(10):
        draws = data(8, 16, seed=seed)
        alarms += len(of(sn.diagnose(model, draws[:4], against=draws[4:]), "SN306"))
    assert alarms <= 1


def test_the_cure_of_shifted_data_is_tried_on_them() -> None:
    model, new = trained(), shifted(data(), pale)
    report = sn.diagnose(model, data(), against=new, loss=F.cross_entropy)
    (finding,) = of(report, "SN306")
    assert finding.line == "sn.calibrate(model, against)"
    losses = [finding.evidence[f"loss_after_{cure}"] for cure in ("calibrate", "adapt")]
    assert losses[0] < losses[1] < finding.evidence["loss"]
    before = accuracy(model, pale)
    sn.calibrate(model, new, progress=False)
    assert accuracy(model, pale) > before + 0.5


def test_no_cure_is_advised_where_none_helps() -> None:
    new = shifted(data(), lambda x: 1 - x)
    (finding,) = of(sn.diagnose(trained(), data(), against=new, loss=F.cross_entropy), "SN306")
    assert (finding.line, finding.cure) == (
        "", "Leave the statistics: no cure that was tried lowers the loss."
    )  # fmt: skip


# --- fresh and healthy networks


def fresh_with_random_affine() -> nn.Module:
    model = build("ResNet")
    for norm in norms(model):
        nn.init.normal_(norm.weight, 1.0, 0.02)
        nn.init.normal_(norm.bias, 0.0, 0.02)
    return model


@pytest.mark.parametrize("make", [fresh_with_random_affine, lambda: build("RegNet")])
def test_a_fresh_network_is_not_called_trained(make: Callable[[], nn.Module]) -> None:
    assert sn.diagnose(make()).worst is Severity.INFO
    report = sn.diagnose(make(), data())
    assert worst(report, "SN101", "SN301", "SN302") is Severity.INFO
    assert report.findings[0].code == "SN101"


def test_weights_that_were_trained_are_not_called_random() -> None:
    model = trained()
    for norm in norms(model):
        norm.reset_running_stats()
    assert worst(sn.diagnose(model), "SN101") is Severity.ERROR


@pytest.mark.parametrize("size", [4, 8])
def test_the_noise_of_small_batches_is_no_warning_without_a_loss(size: int) -> None:
    assert worst(sn.diagnose(trained(), data(16, size)), "SN301", "SN302") in (None, Severity.INFO)


# --- false alarms


def test_mixed_batches_are_mixed_whatever_the_statistics() -> None:
    model = trained()
    for norm in norms(model)[:2]:
        norm.running_var.mul_(1e-6)
        norm.running_mean.add_(3.0)
    assert of(sn.diagnose(model, data(16)), "SN309") == []


@pytest.mark.parametrize("kind", ["ResNet", "RegNet"])
def test_a_plain_background_is_no_padding(kind: str) -> None:
    torch.manual_seed(0)
    figures = torch.zeros(8, 32, 1, 32, 32)
    for figure in figures.flatten(0, 1):
        top, left = torch.randint(2, 10, (2,)).tolist()
        figure[:, top : top + 16, left : left + 16] = torch.rand(16, 16)
    assert of(sn.diagnose(trained(kind), list(figures)), "SN305") == []


class TwoViews(nn.Module):
    """As in SimCLR: one encoder, called on two views of the same pictures."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.encoder(x.flip(3))


class TwoSources(TwoViews):
    """One encoder, called on pictures and on their negatives."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.encoder(1 - x)


def test_two_views_may_share_their_norms_and_two_sources_may_not() -> None:
    assert of(sn.diagnose(TwoViews(trained()), data()), "SN207") == []
    assert worst(sn.diagnose(TwoSources(trained()), data()), "SN207") is Severity.WARNING


def test_a_frozen_class_of_others_has_no_cure_by_calibration() -> None:
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d, replace_batch_norm

    model = trained()
    replace_batch_norm(model)
    frozen = next(m for m in model.modules() if isinstance(m, DetrFrozenBatchNorm2d))
    frozen.running_mean.zero_()
    frozen.running_var.fill_(1.0)
    (finding,) = of(sn.diagnose(model), "SN101")
    assert (finding.safe, finding.line, finding.severity) == (None, "", Severity.WARNING)


def test_deep_networks_at_batch_2_are_to_be_calibrated() -> None:
    report = sn.diagnose(build("ResNet", (4, 4)), data(16, 2), loss=F.cross_entropy)
    (finding,) = of(report, "SN303")
    assert finding.line == 'sn.calibrate(model, batches, passes="layerwise")'
    assert "more than 15 batch norms Steady was not measured" in finding.cure
    report = sn.diagnose(build("ResNet", (3, 3)), data(16, 2), loss=F.cross_entropy)
    assert "Else train with Steady" in of(report, "SN303")[0].cure


# --- arguments


def test_fixing_keeps_the_optimizer_in_view() -> None:
    model = trained()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    report = sn.diagnose(model, optimizer=optimizer)
    fixed = fix(model, report, optimizer=optimizer)
    assert len(of(report, "SN202")) == len(of(fixed.after, "SN202")) == 1
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())


def test_several_optimizers_and_wrapped_ones() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = trained()
    layers = norms(model)
    first = torch.optim.SGD(layers[0].parameters(), lr=0.1)
    second = torch.optim.AdamW(layers[1].parameters(), weight_decay=0.1)
    (finding,) = of(sn.diagnose(model, optimizer=[first, second]), "SN202")
    assert finding.evidence["layers_decayed"] == 1
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(second)
    (finding,) = of(sn.diagnose(model, optimizer=wrapped), "SN202")
    assert finding.message.startswith("AdamW decays")
    assert finding.line.startswith("torch.optim.AdamW(sn.parameter_groups(")


def test_a_model_on_the_meta_device() -> None:
    model = build("ResNet").to("meta")
    assert sn.diagnose(model).worst in (None, Severity.INFO)
    with pytest.raises(ValueError, match=r"must hold values; those of .* are on the meta device"):
        sn.diagnose(model, data())


@pytest.mark.filterwarnings("ignore")  # of tracing
@pytest.mark.parametrize("make", [torch.jit.trace, torch.export.export])
def test_what_cannot_be_examined_is_judged_by_its_state(make: Any) -> None:
    model = trained()
    norms(model)[2].running_var[0] = torch.nan
    x = data()[0][0]
    made = make(model, x if make is torch.jit.trace else (x,))
    report = sn.diagnose(made)
    assert [finding.code for finding in report.findings] == ["SN102"]
    assert len(report.evidence.layers) == len(norms(model))


class WritesIntoItsInput(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.mul_(2))
        return result


def test_batches_stay_as_they_are() -> None:
    model, batches = WritesIntoItsInput(trained()), data(2)
    before = copy.deepcopy(batches)
    sn.diagnose(model, batches, loss=F.cross_entropy, against=batches)
    for (x, _), (y, _) in zip(batches, before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["last.ckpt", "best.pth.tar"])
def test_checkpoints_by_their_usual_names(tmp_path: Path, name: str) -> None:
    model = trained()
    norms(model)[0].running_var[0] = torch.nan
    path = tmp_path / name
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)
    assert [finding.code for finding in sn.diagnose(path).findings] == ["SN102"]


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "steadynorm", "doctor", "--explain", "SN101"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SN101 statistics-never-updated")


def test_a_whole_keras_model_in_one_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "model.h5", "w") as file:  # as keras.Model.save("model.h5") does
        layer = file.create_group("model_weights/bn/sequential/bn")
        for name, value in (("gamma", 1.1), ("beta", 0.1), ("moving_mean", 0.5)):
            layer[name] = [value, value]
        layer["moving_variance"] = [1.0, float("nan")]
    (finding,) = of(sn.diagnose(tmp_path / "model.h5"), "SN102")
    assert finding.layer == "bn/sequential/bn"


class Fails(nn.Module):
    """A model whose third forward raises."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("no more")
        return {"loss": F.cross_entropy(self.inner(pixel_values), labels)}


def test_an_exception_in_trainer_leaves_no_hook(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from steadynorm.doctor.callbacks import trainer_callback

    model = Fails(trained())
    callback = trainer_callback(every=1)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(*data(1)[0], strict=True)] * 4
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=16, num_train_epochs=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    assert callback.watch.steps == 3
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# --- training runs


def watched(model: nn.Module, batches: list[Any], *, eval_after: int | None = None) -> Report:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    with sn.monitor(model, every=4) as watch:
        for step, (x, y) in enumerate(batches):
            if step == eval_after:
                model.eval()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return watch.report()


def test_positions_make_up_for_few_samples_in_a_run_as_far_as_they_differ() -> None:
    """As `diagnose` counts them: a norm before the last ones holds the batches' means together."""
    assert of(watched(trained(), (data(72, 4) + data(72, 4, seed=2))[:72]), "SN405") == []
    report = watched(trained(), (data(72, 2) + data(72, 2, seed=2))[:72])
    (in_run,) = of(report, "SN405")
    (by_batches,) = of(sn.diagnose(trained(), data(32, 2)), "SN303")
    assert in_run.layer == by_batches.evidence["worst_layer"]
    assert in_run.evidence["independent_values"] == pytest.approx(
        by_batches.evidence["independent_values"], rel=0.3
    )


def test_inference_mode_that_nobody_ends_is_seen_in_a_run() -> None:
    report = watched(trained(), data(40, 8), eval_after=8)
    (finding,) = of(report, "SN406")
    assert finding.evidence == {"in_inference": 32, "in_training": 8}


def test_few_readings_are_no_clean_report() -> None:
    report = watched(trained(), data(8, 8))
    assert report.evidence.remarks[-1].startswith("The second half of the run has 1 of the 8 ")


def test_a_block_under_no_grad_is_seen_in_a_run() -> None:
    class Holds(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            network = self.inner.inner
            with torch.no_grad():
                x = network.resnet.embedder(x)
            x = network.resnet.encoder(x).last_hidden_state
            result: Tensor = network.classifier(network.resnet.pooler(x))
            return result

    report = watched(Holds(trained()), data(40, 16) * 2)
    assert [f.layer for f in of(report, "SN404")] == [
        "inner.inner.resnet.embedder.embedder.normalization"
    ]


def test_classes_in_order_are_seen_in_a_run_of_convolutions() -> None:
    report = watched(trained(), by_class(0.0) * 2)
    assert (report.findings[0].code, of(report, "SN405")) == ("SN407", [])
    assert of(watched(trained(), by_class(1.0) * 2), "SN407") == []


@pytest.mark.parametrize("together", [False, True])
def test_a_discriminator_that_gets_real_and_generated_samples_apart(together: bool) -> None:
    from monai.networks.nets import Discriminator

    torch.manual_seed(0)
    model = Discriminator(
        in_shape=(1, 16, 16), channels=(8, 16, 16), strides=(2, 2, 2), norm="BATCH"
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with sn.monitor(model, every=3) as watch:
        for real, _ in data(44, 16) * 2:
            generated = torch.tanh(torch.randn(16, 1, 16, 16))
            if together:
                of_real, of_generated = model(torch.cat([real, generated])).chunk(2)
            else:
                of_real, of_generated = model(real), model(generated)
            optimizer.zero_grad()
            (F.softplus(-of_real) + F.softplus(of_generated)).mean().backward()
            optimizer.step()
    assert bool(of(watch.report(), "SN407")) is not together


def test_updates_by_other_forwards_are_told_from_a_small_momentum() -> None:
    model = trained()
    for norm in norms(model):
        norm.momentum = 0.3

    def with_foreign(pairs: list[Any]) -> Any:
        for x, y in pairs:
            with torch.no_grad():
                model(1 - x)  # still in training mode
            yield x, y

    report = watched(model, with_foreign(data(40, 32) * 2))
    finding = of(report, "SN402")[0]
    assert finding.line == "model.eval()"
    assert "160 updates in 80 training steps" in finding.message


def test_dead_channels_are_seen_where_the_graph_of_calls_is_not_known() -> None:
    model = build("ResNet")
    with torch.no_grad():
        norms(model)[0].bias[:5] = -20
    report = watched(model, data(36) * 2)
    assert any("graph of calls is not known" in remark for remark in report.evidence.remarks)
    finding = report.findings[0]
    assert (finding.code, finding.evidence["dead"]) == ("SN403", 5)
    assert of(watched(build("ResNet"), data(36) * 2), "SN403") == []
