"""The commands, from a factory to files, and the ONNX they write."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from tests.models.surgery.zoo import ZOO, disturb
from torch import nn
from typer.testing import CliRunner

from steadynorm.models import _cli
from steadynorm.models.files import read_tensors, write
from steadynorm.models.fold import fold
from steadynorm.models.onnx import export_onnx

app = typer.Typer()
app.command()(_cli.convert)
app.command()(_cli.fold)

FACTORY = """
from torch import nn


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    model = network()
    write(model.state_dict(), tmp_path / "weights.safetensors")
    np.save(tmp_path / "x.npy", torch.randn(2, 3, 6, 6).numpy())
    return tmp_path


def network() -> nn.Sequential:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    disturb(layers)
    return layers


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_convert(folder: Path) -> None:
    given = ("--weights", "weights.safetensors", "--data", "x.npy", "--out", "ours.safetensors")
    output = run("convert", "shop:network", *given, "--statistics", "steady")
    assert (
        "converted  1      BatchNorm2d(4)  BatchNorm2d(4)  Steady(prior=16, horizon=640, window=16)"
        in output
    )
    assert "fused      1      relu after it   one call        by (model)" in output
    before, after = (read_tensors(folder / f"{n}.safetensors") for n in ("weights", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_fold_and_onnx(folder: Path) -> None:
    given = ("--weights", "weights.safetensors", "--data", "x.npy", "--out", "folded.pt")
    output = run("fold", "shop:network", *given, "--onnx", "folded.onnx")
    assert "folded  1      BatchNorm2d(4)  Identity  into 0" in output
    assert "wrote folded.onnx; onnxruntime answers the same" in output
    model = network().eval()
    model.load_state_dict(read_tensors(folder / "weights.safetensors"))
    expected, _ = fold(model)
    weights = read_tensors(folder / "folded.pt")
    assert all(torch.equal(weights[key], value) for key, value in expected.state_dict().items())

    import onnx

    graph = onnx.load(folder / "folded.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert sorted(path.name for path in folder.glob("*.onnx*")) == ["folded.onnx"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("fold", "shop"), "MODEL must be package.module:name"),
        (("fold", "shop:network", "--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("fold", "shop:network", "--onnx", "m.onnx"), "--onnx needs --data"),
        (("convert", "shop:network", "--statistics", "median"), "statistics must be one of"),
        (("convert", "shop:network", "--to", "keras"), "`to` must be 'steadynorm' or 'torch'"),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: tuple[str, ...], why: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert why in result.output
    assert "Traceback" not in result.output
    assert not (folder / "m.onnx").exists()


@pytest.mark.parametrize("name", ["transformers ResNet (basic)", "MONAI UNet 2d"])
def test_real_networks_to_onnx(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, inputs = disturb(ZOO[name].build()).eval(), ZOO[name].inputs()
    folded, _ = fold(model, inputs)
    export_onnx(folded, inputs, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size > 1000


def test_a_wrong_export_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network().eval(), torch.randn(2, 3, 6, 6)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    right = torch.onnx.export

    def wrong(model: nn.Module, *args: object, **kwargs: object) -> object:
        with torch.no_grad():
            model[0].weight.mul_(2)
        return right(model, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match="onnx: output 0 of the changed model differs by"):
        export_onnx(model, x, path)
    assert path.read_bytes() == b"old"
