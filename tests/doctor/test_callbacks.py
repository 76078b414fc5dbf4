"""The monitor inside Lightning's and Hugging Face's Trainer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steadynorm.doctor.callbacks import lightning_callback, trainer_callback

DATA = [{"x": torch.full((4,), float(n)), "labels": torch.tensor(n % 2)} for n in range(48)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x=None, labels=None):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(autouse=True)
def _their_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about their own dependencies
        yield


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="its Trainer needs accelerate")
    callback = trainer_callback(2, to=tmp_path / "run.csv", page=tmp_path / "run.html")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=8, report_to=[],
        disable_tqdm=True, save_strategy="no", use_cpu=True,
    )  # fmt: skip
    model = Net()
    transformers.Trainer(model, arguments, train_dataset=DATA, callbacks=[callback]).train()
    assert callback.watch.steps == 6
    assert [(r.step, r.layer) for r in callback.watch.readings] == [
        (step, "layers.1") for step in (0, 2, 4)
    ]
    assert all(r.gradient > 0 for r in callback.watch.readings)
    assert (tmp_path / "run.csv").read_text().count("\n") == 4
    assert "Over the run" in (tmp_path / "run.html").read_text("utf-8")
    assert not model._forward_pre_hooks


def lightning():
    try:
        import lightning.pytorch as found
    except ModuleNotFoundError:
        found = pytest.importorskip("pytorch_lightning", reason="needs lightning")
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_lightning(tmp_path, fails):
    pl = lightning()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):  # never calls self(...)
            if fails and index == 3:
                raise RuntimeError("on purpose")
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)

    callback = lightning_callback(2, page=tmp_path / "run.html")
    trainer = pl.Trainer(
        max_steps=6, callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    model = Module()
    data = torch.utils.data.DataLoader(DATA, 8)
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(model, data)
    else:
        trainer.fit(model, data)
    steps = (0, 2) if fails else (0, 2, 4)
    assert [(r.step, r.layer) for r in callback.watch.readings] == [
        (step, "net.layers.1") for step in steps
    ]
    assert not any(module._forward_hooks for module in model.modules())
    assert (tmp_path / "run.html").is_file()
    assert "SN202" in [finding.code for finding in callback.watch.report().findings]
