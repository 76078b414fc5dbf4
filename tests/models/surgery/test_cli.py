"""The commands, from a factory to files, and the ONNX they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models.surgery.zoo import ZOO, disturb
from torch import nn
from typer.testing import CliRunner

import steadynorm as sn
from steadynorm.cli import app
from steadynorm.models.files import read_tensors, write
from steadynorm.models.fold import fold
from steadynorm.models.onnx import export_onnx

FACTORY = """
import torch
from torch import nn


def batches():
    return [(torch.randn(2, 3, 6, 6), "label") for _ in range(2)]


def no_batches():
    raise KeyError("split")


def touches():
    open("was_read", "w").close()
    return network()


def disagrees():
    assert 1 == 2


def sized(channels, bias=True):
    return nn.Sequential(nn.Conv2d(3, channels, 1, bias=bias), nn.BatchNorm2d(channels))


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


@pytest.mark.parametrize("data", ["x.npy", "shop:batches"])
def test_convert(folder: Path, data: str) -> None:
    given = ("--weights", "weights.safetensors", "--data", data)
    output = run("convert", "shop:network", *given, "--statistics", "steady")
    policy = repr(sn.Steady())
    assert f"converted  1      BatchNorm2d(4)  BatchNorm2d(4)  {policy}" in output
    assert "fused      1      relu after it   one call        by (model)" in output


def test_json(folder: Path) -> None:
    given = ("--weights", "weights.safetensors", "--data", "x.npy", "--json")
    rows = json.loads(run("convert", "shop:network", *given))
    assert [(row["what"], row["where"]) for row in rows] == [("converted", "1"), ("fused", "1")]
    result = CliRunner().invoke(app, ["fold", "shop:network", *given, "--out", "folded.pt"])
    assert [row["what"] for row in json.loads(result.stdout)] == ["folded"]
    assert "wrote folded.pt" in result.stderr
    calibrated = json.loads(run("calibrate", "shop:network", *given))
    assert [layer["name"] for layer in calibrated["layers"]] == ["1"]
    arguments = ("weights.safetensors", "bn.npz", "--source", "torch", "--target", "keras")
    found = json.loads(run("convert-weights", *arguments, "--json"))
    assert (found["arrays"], found["file"]) == (4, "bn.npz")
    report = json.loads(run("doctor", "shop:network", *given, "--fail-on", "never"))
    assert report["target"] == "shop:network"


def test_calls_with_literals(folder: Path) -> None:
    assert "BatchNorm2d(7)" in run("convert", "shop.sized(7, bias=False)")
    assert "BatchNorm2d(7)" in run("convert", "shop:sized(7)")
    run("doctor", "shop.sized(7)", "--fail-on", "never")
    wrong = (
        "shop.sized(len('7777777'))", "shop.sized(*[7])", "shop.sized(**{'channels': 7})",
        "shop.sized(7).eval()", "shop.sized(7", "shop.sized(__import__('os').getpid())",
    )  # fmt: skip
    for spec in wrong:
        result = CliRunner().invoke(app, ["convert", spec])
        assert result.exit_code == 2
        assert "MODEL: a call must hold literals alone" in result.stderr


def test_double_precision_of_numpy_becomes_the_models(folder: Path) -> None:
    np.save("wide.npy", np.load("x.npy").astype(np.float64))
    assert "folded" in run("fold", "shop:network", "--data", "wide.npy")
    assert "calibrated" in run("calibrate", "shop:network", "--data", "wide.npy")


def test_prefixes_of_wrappers_are_left_out(folder: Path) -> None:
    held = read_tensors("weights.safetensors")
    wrapped = {f"_orig_mod.module.{name}": value for name, value in held.items()}
    torch.save({"model": wrapped, "epoch": 3}, "wrapped.pt")
    run("fold", "shop:network", "--weights", "wrapped.pt", "--out", "a.pt")
    run("fold", "shop:network", "--weights", "weights.safetensors", "--out", "b.pt")
    a, b = read_tensors("a.pt"), read_tensors("b.pt")
    assert all(torch.equal(a[name], value) for name, value in b.items())
    mixed = {f"module.{name}" if n else name: v for n, (name, v) in enumerate(held.items())}
    torch.save(mixed, "mixed.pt")
    result = CliRunner().invoke(app, ["fold", "shop:network", "--weights", "mixed.pt"])
    assert result.exit_code == 2
    assert "does not fit the model" in result.stderr


@pytest.mark.parametrize("first", [True, False])
def test_verbose_shows_the_traceback(folder: Path, first: bool) -> None:
    command = ["convert", "shop:network", "--to", "keras"]
    command.insert(0 if first else 2, "--verbose")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("steadynorm convert: convert: `to` must be")


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
        (("convert", "shop:disagrees"), "steadynorm convert: AssertionError\n"),
        (
            ("calibrate", "shop:network", "--data", "shop:no_batches"),
            "calibrate: KeyError: 'split'",
        ),
    ],
)
def test_errors_are_one_line(folder: Path, arguments: tuple[str, ...], why: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2
    assert why in result.output
    assert "Traceback" not in result.output
    assert not (folder / "m.onnx").exists()


@pytest.mark.parametrize("option", ["--out", "--onnx"])
@pytest.mark.parametrize("target", ["x.npy/w.pt", ".", "w.txt"])
@pytest.mark.parametrize("command", ["fold", "calibrate", "doctor"])
def test_what_cannot_be_written_is_said_before_the_work(
    folder: Path, command: str, option: str, target: str
) -> None:
    if option == "--onnx" and (command != "fold" or target == "w.txt"):
        option = "--out"
    more = ["--fix"] if command == "doctor" else []
    arguments = [command, "shop:touches", "--data", "x.npy", option, target, *more]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not (folder / "was_read").exists()


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
