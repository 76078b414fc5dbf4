"""The monitor: its figures against NumPy, and that a run under it is the run without it."""

from __future__ import annotations

import copy
import csv
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.doctor import monitoring

EPS = 1e-5


def network(norm=nn.BatchNorm1d, **how):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), norm(6, **how), nn.ReLU(inplace=True), nn.Linear(6, 6), norm(6, **how),
        nn.Linear(6, 2),
    )  # fmt: skip


def batches(count, size=16):
    torch.manual_seed(1)
    return [torch.randn(size, 4) * 2 + 1 for _ in range(count)]


def train(model, data, *, rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_figures_are_those_of_numpy():
    model, data = network().double(), [x.double() for x in batches(7)]
    with torch.no_grad():
        model[4].bias[:2] = -50.0  # dead
        model[4].bias[2] = 50.0  # far out
    seen = []

    def keep(layer, args, output):
        output.retain_grad()
        seen.append((args[0].detach().numpy(), output, *kept))

    def before(layer, args):
        kept[:] = [layer.running_mean.numpy().copy(), layer.running_var.numpy().copy()]

    kept = []
    model[4].register_forward_pre_hook(before)
    model[4].register_forward_hook(keep)
    with sn.monitor(model, every=3) as watch:
        train(model, data, rate=0.0)
    readings = [reading for reading in watch.readings if reading.layer == "4"]
    assert [reading.step for reading in readings] == [0, 3, 6]
    for reading in readings:
        x, output, mean, var = seen[reading.step]
        unit = np.sqrt(var + EPS)
        shift = (x.mean(0) - mean) / unit
        ratio = np.sqrt(x.var(0) + EPS) / unit
        nats = 0.5 * (ratio**2 + shift**2 - 1 - np.log(ratio**2))
        y = output.detach().numpy()
        assert reading.shift == pytest.approx(np.sqrt(np.mean(shift**2)), rel=1e-6)
        assert reading.ratio == pytest.approx(np.exp(np.mean(np.log(ratio))), rel=1e-6)
        assert reading.divergence == pytest.approx(nats.mean(), rel=1e-6)
        assert reading.dead == pytest.approx(np.mean(y.max(0) <= 0))
        assert reading.saturated == pytest.approx(np.mean(np.abs(y) > 4.36))
        assert reading.gradient == pytest.approx(np.linalg.norm(output.grad.numpy()), rel=1e-6)
        assert reading.nonfinite == 0
        assert reading.dead == 2 / 6
        assert reading.saturated == 3 / 6


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, sn.BatchNorm1d])
def test_the_run_is_the_run_without_it(norm):
    plain, watched = network(norm), network(norm)
    plain.insert(3, nn.Dropout(0.5))
    watched.insert(3, nn.Dropout(0.5))
    data = batches(9)
    seed()
    without = train(plain, data)
    state = random_state()
    seed()
    with sn.monitor(watched, every=2) as watch:
        under = train(watched, data)
    assert watch.steps == 9
    assert all(torch.equal(a, b) for a, b in zip(without, under, strict=True))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    assert random_state() == state


def seed():
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002  the global state is what is tested


def random_state():
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpy


def hooks(model):
    return sum(
        len(held)
        for module in model.modules()
        for held in (
            module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called, module._forward_pre_hooks_with_kwargs,
        )
    )  # fmt: skip


def test_hooks_are_on_layers_only_while_a_step_is_read_and_gone_afterwards():
    model, during = network(), []
    model[0].register_forward_hook(lambda *_: during.append(hooks(model[1])))
    mine = hooks(model)
    with sn.monitor(model, every=2):
        train(model, batches(4))
        assert hooks(model[1]) == 0
    assert [count > 0 for count in during] == [True, False, True, False]
    assert hooks(model) == mine


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("on purpose")


def test_an_exception_leaves_nothing_behind():
    model = network()
    model.insert(5, Broken())
    (x,) = batches(1)
    with sn.monitor(model, every=1) as watch:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on purpose"):
                model(x)
            assert hooks(model[1]) == 0
    assert hooks(model) == 0
    assert [(r.step, r.layer) for r in watch.readings] == [(0, "1"), (0, "4"), (1, "1"), (1, "4")]
    assert all(r.gradient == 0 for r in watch.readings)  # no backward was reached


def test_only_training_forwards_with_gradients_are_steps():
    model, (x, *_) = network(), batches(1)
    with sn.monitor(model, every=1) as watch:
        model.eval()
        model(x)
        model.train()
        with torch.no_grad():
            model(x)
        assert watch.steps == 0
        model(x).sum().backward()
    assert watch.steps == 1
    model(x)
    assert watch.steps == 1


def test_what_is_not_finite_is_counted_by_channel():
    model, data = network(), batches(4)
    data[2][5, 1] = float("inf")
    with sn.monitor(model, every=1) as watch, torch.no_grad():
        model[0].weight[3, 1] = 0.5
        with torch.enable_grad():
            for x in data:
                model(x).square().mean().backward()
    bad = [(r.step, r.layer, r.nonfinite) for r in watch.readings if r.nonfinite]
    assert bad[0] == (2, "1", 6)
    assert np.isnan(next(r for r in watch.readings if r.nonfinite).shift)


def test_a_layer_without_running_statistics_has_no_shift():
    with sn.monitor(network(track_running_stats=False), every=1) as watch:
        train(watch.model, batches(2))
    assert all(np.isnan(r.shift) and np.isfinite(r.gradient) for r in watch.readings)
    assert watch.run().trends == {}


def test_every_call_of_a_shared_layer_is_read():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.norm(x) * 3 + 1)

    with sn.monitor(Twice(), every=1) as watch:
        train(watch.model, batches(1))
    assert [r.layer for r in watch.readings] == ["norm", "norm"]
    assert watch.readings[0].gradient != watch.readings[1].gradient


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_another_reading(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    model = Checkpointed()
    with sn.monitor(model, every=1) as watch:
        train(model, [x.clone() for x in batches(3)])
    assert [(r.step, r.layer) for r in watch.readings] == [
        (step, name) for step in range(3) for name in ("inner.1", "inner.4")
    ]
    assert [finding for finding in watch.report().findings if finding.code == "SN404"] == []


def test_steps_by_hand_for_a_loop_that_never_calls_the_model():
    model, data = network(), batches(4)
    watch = sn.doctor.Monitor(model, every=2)
    for x in data:
        watch.begin_step()
        for part in model:
            x = part(x)  # noqa: PLW2901
        watch.end_step()
        x.square().mean().backward()
    watch.stop()
    assert [r.step for r in watch.readings] == [0, 0, 2, 2]
    assert all(r.gradient > 0 for r in watch.readings)


def test_a_wrapped_model_keeps_its_names():
    with sn.monitor(nn.DataParallel(network()), every=1) as watch:
        train(watch.model, batches(1))
    assert [r.layer for r in watch.readings] == ["1", "4"]
    assert [layer.name for layer in watch.report().evidence.layers] == ["1", "4"]


def test_a_mask_and_an_activation_inside_count():
    layer = sn.BatchNorm1d(3, activation="sigmoid")
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 9.0, -9.0]))

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    torch.manual_seed(0)
    x, mask = torch.randn(4, 3, 5), torch.ones(4, 5, dtype=torch.bool)
    x[:, :, 3:], mask[:, 3:] = 1e6, False
    with sn.monitor(Masked(), every=1) as watch:
        watch.model(x, mask)
    (reading,) = watch.readings
    valid = x[:, :, :3].double().numpy()
    mean, var = valid.mean((0, 2)), valid.var((0, 2))
    assert reading.shift == pytest.approx(np.sqrt(np.mean(mean**2 / (1 + EPS))), rel=1e-5)
    assert reading.ratio == pytest.approx(
        np.exp(np.mean(0.5 * np.log((var + EPS) / (1 + EPS)))), rel=1e-5
    )
    flat = (layer(x, mask=mask) - 0.5).abs() > 0.5 - 1 / (1 + np.exp(4.36))
    assert reading.saturated == pytest.approx(float(flat.double().mean()), abs=1e-6)


def test_a_long_run_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(monitoring, "STEPS_IN_MEMORY", 8)
    told = []
    with sn.monitor(network(), every=2, to=told.append) as watch:
        train(watch.model, batches(1) * 100)
    assert sorted({record["step"] for record in told}) == list(range(0, 100, 2))
    assert sorted({r.step for r in watch.readings}) == list(range(0, 100, 16))


def test_a_long_run_keeps_the_first_reading_that_is_not_finite(monkeypatch):
    monkeypatch.setattr(monitoring, "STEPS_IN_MEMORY", 8)
    model = nn.Sequential(sn.BatchNorm1d(4, nonfinite="skip"), nn.Linear(4, 2))
    with sn.monitor(model, every=1) as watch:
        for step in range(40):
            x = torch.randn(8, 4)
            x[0, 0] = float("nan") if step in (7, 9) else 0.0
            model(x).nansum().backward()
    assert [r.step for r in watch.readings] == [0, 7, 8, 16, 24, 32]
    (finding,) = watch.report(select=["SN401"]).findings
    assert finding.message.startswith("NaN or infinity in 1 channels at step 7 (not yet at step 0)")


def test_csv_holds_every_reading_and_survives_a_bad_end(tmp_path):
    path = tmp_path / "new" / "run.csv"
    model = network()
    watch = sn.monitor(model, every=2, to=path)

    def interrupted():
        with watch:
            train(model, batches(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks(model) == 0
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(int(row["step"]), row["layer"]) for row in rows] == [
        (step, name) for step in (0, 2, 4) for name in ("1", "4")
    ]
    assert [float(row["shift"]) for row in rows] == [r.shift for r in watch.readings]


def test_scalars_go_to_a_summary_writer(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer, sn.monitor(network(), every=2, to=[writer]) as watch:
        train(watch.model, batches(3))
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    shifts = [(event.step, event.value) for event in read.Scalars("steadynorm/4/shift")]
    expected = [
        (r.step, pytest.approx(r.shift, rel=1e-6)) for r in watch.readings if r.layer == "4"
    ]
    assert shifts == expected


def test_compiled_models_are_read_too():
    model = torch.compile(network(), backend="eager")
    train(model, batches(2))
    with sn.monitor(model, every=2) as watch:
        train(model, batches(4))
    assert [(r.step, r.layer) for r in watch.readings] == [(0, "1"), (0, "4"), (2, "1"), (2, "4")]
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_model_compiled_in_place_is_refused():
    model = network()
    model.compile(backend="eager")
    with pytest.raises(ValueError) as refusal:
        sn.monitor(model)
    assert str(refusal.value) == (
        "monitor: `model` was compiled in place by model.compile(), which compiles its hooks too. "
        "Use model = torch.compile(model) instead."
    )


@pytest.mark.parametrize("every", [0, -1, 2.0, True, None])
def test_every_must_count(every):
    with pytest.raises(
        ValueError, match=r"^monitor: `every` must be an integer of at least 1; got"
    ):
        sn.monitor(network(), every=every)


def test_what_is_no_model_and_no_place_for_readings_is_refused():
    with pytest.raises(TypeError, match=r"^monitor: `model` must be a torch.nn.Module; got"):
        sn.monitor([1])
    with pytest.raises(TypeError, match=r"^monitor: `to` must be a SummaryWriter"):
        sn.monitor(network(), to=3)


def test_a_watch_watches_once_and_stops_twice():
    watch = sn.monitor(network()).start()
    with pytest.raises(RuntimeError, match="is running already"):
        watch.start()
    watch.stop()
    watch.stop()
    with watch:
        train(watch.model, batches(1))
    assert watch.steps == 1


def test_report_record_and_page(tmp_path):
    pytest.importorskip("vl_convert", reason="charts need the extra lab")
    with sn.monitor(network(), every=2) as watch:
        train(watch.model, batches(4))
    report = watch.report()
    assert report.evidence.run.steps == 4
    assert "SN402" in report.codes
    record = watch.record()
    assert record["steps"] == 4
    assert record["readings"][0] == watch.readings[0]._asdict()
    assert "Over the run</h2>" in watch.to_html(tmp_path / "run.html").read_text("utf-8")


def test_a_run_without_a_training_forward_says_so():
    with sn.monitor(copy.deepcopy(network())) as watch:
        pass
    assert "No training forward of the model was seen" in str(watch.report())
