"""`steadynorm calibrate`: a model and its data by name, weights in and out as files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from steadynorm.cli import app

MODULE = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))

def batches():
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 2, generator=generator), "label") for _ in range(3)]

ready = batches()
broken = [torch.full((4, 2), float("nan"))]

def interrupted():
    yield torch.ones(4, 2)
    raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop_of_calibration.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*arguments: str, data: str = "batches") -> Result:
    named = ["calibrate", "shop_of_calibration:network", "--data", f"shop_of_calibration:{data}"]
    return CliRunner().invoke(app, [*named, *arguments])


def source(folder: Path) -> tuple[nn.Sequential, torch.Tensor]:
    import shop_of_calibration as shop

    torch.manual_seed(1)
    network = shop.network()
    save_file(network.state_dict(), folder / "in.safetensors")
    return network, torch.cat([x for x, _ in shop.batches()])


@pytest.mark.parametrize("out", ["out.safetensors", "new/out.pt"])
@pytest.mark.parametrize("data", ["batches", "ready"])
def test_weights_in_and_out(folder: Path, out: str, data: str) -> None:
    network, x = source(folder)
    options = ("--weights", "in.safetensors", "--out", out, "--passes", "layerwise")
    result = run(*options, data=data)
    assert result.exit_code == 0, result.output
    assert [line.split()[:3] for line in result.output.splitlines()[1:3]] == [
        ["1", "BatchNorm1d", "calibrated"],
        ["3", "BatchNorm1d", "calibrated"],
    ]
    assert result.output.splitlines()[3] == f"wrote {out}"
    path = folder / out
    kept = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert set(kept) == set(network.state_dict())
    inner = network[0](x)
    torch.testing.assert_close(kept["1.running_mean"], inner.mean(0))
    torch.testing.assert_close(kept["1.running_var"], inner.var(0))
    normal = ((inner - inner.mean(0)) / (inner.var(0) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(kept["3.running_mean"], normal.mean(0))
    torch.testing.assert_close(kept["0.weight"], network[0].weight)


def test_prior_adapts_and_max_batches_stops(folder: Path) -> None:
    network, x = source(folder)
    options = ("--weights", "in.safetensors", "--out", "o.safetensors")
    result = run(*options, "--prior", "12", "--max-batches", "1")
    assert result.exit_code == 0, result.output
    assert "adapted" in result.output
    kept = load_file(folder / "o.safetensors")
    torch.testing.assert_close(kept["1.running_mean"], network[0](x[:4]).mean(0) * 4 / 16)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ((), "broken", "the input of '1' must be finite; got NaN or infinity in some batch."),
        (("--passes", "two"), "batches", "`passes` must be 'one' or 'layerwise'; got 'two'."),
        ((), "nothing", "--data 'shop_of_calibration:nothing' cannot be found:"),
        (("--weights", "none.safetensors"), "batches", "none.safetensors"),
    ],
)
def test_refusals_are_one_line_and_leave_the_old_file(
    folder: Path, options: tuple[str, ...], data: str, message: str
) -> None:
    (folder / "out.safetensors").write_bytes(b"old")
    result = run(*options, "--out", "out.safetensors", data=data)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("steadynorm calibrate: ")
    assert (folder / "out.safetensors").read_bytes() == b"old"


def test_data_must_be_a_name(folder: Path) -> None:
    result = CliRunner().invoke(app, ["calibrate", "torch.nn:Identity", "--data", "batches"])
    assert result.exit_code == 2
    assert result.stderr == (
        "steadynorm calibrate: --data must be package.module:name; got 'batches'.\n"
    )


def test_ctrl_c_writes_nothing(folder: Path) -> None:
    result = run("--out", "out.safetensors", data="interrupted")
    assert result.exit_code == 130
    assert result.stderr == "steadynorm calibrate: interrupted; nothing was written.\n"
    assert not (folder / "out.safetensors").exists()
