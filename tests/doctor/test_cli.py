"""The command `steadynorm doctor`: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tests.doctor.fixtures.small import small
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.doctor.rules import all_rules
from steadynorm.models.files import read_tensors, write

SHOP = """
import torch
from torch import nn
from tests.doctor.fixtures.small import small

def network():
    torch.manual_seed(0)
    return nn.Sequential(small(), nn.Flatten(), nn.Linear(64, 3)).eval()

def untrained():
    model = network()
    model[0][1].reset_running_stats()
    return model

def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 64, 2, 8, 8, generator=generator)
    return [(x, network().train()(x).argmax(1)) for x in images]

shifted = [(3 * x + 1, y) for x, y in data()]

def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)

def breaks():
    raise RuntimeError("no such\\ndata set")

number = 3
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    write(small().state_dict(), tmp_path / "small.safetensors")
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


DATA = ("--data", "shop:data", "--loss", "torch.nn.functional:cross_entropy")


def codes(*arguments: str) -> list[str]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code in (0, 1), result.output
    return [finding["code"] for finding in json.loads(result.stdout)["findings"]]


def test_what_is_asked_is_looked_at(shop: Path) -> None:
    assert codes("small.safetensors") == []
    assert codes("shop:network") == []
    assert codes("shop:untrained") == ["SN101"]
    assert codes("shop:untrained", *DATA)[0] == "SN101"
    assert "SN202" in codes("shop:network", "--optimizer", "shop:optimizer")
    write(small().state_dict(), shop / "other.pt")
    loaded = codes("tests.doctor.fixtures.small:small", "--weights", "other.pt", "--exporting")
    assert loaded == []
    against = codes("shop:network", *DATA, "--against", "shop:shifted", "--select", "SN306")
    assert set(against) == {"SN306"}
    one = run("shop:network", "--data", "shop:data", "--max-batches", "1")
    assert "from a model and 1 batch\n" in one.stdout


def test_text(shop: Path) -> None:
    result = run("shop:untrained")
    assert result.exit_code == 1
    assert result.stdout.startswith("shop:untrained: 1 error\n")
    assert "error SN101 statistics never updated" in result.stdout
    assert "sn.calibrate(model, batches)" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_gets_the_whole_report(tmp_path: Path, encoding: str) -> None:
    """It ended at the first name that was not ASCII, with 2 for the exit code."""
    name = "b\u00fcro.\u65e5\u672c"
    state = {f"{name}.running_mean": torch.zeros(3), f"{name}.running_var": -torch.ones(3)}
    write(state, tmp_path / "odd.safetensors")
    printed = [
        subprocess.run(
            [sys.executable, "-m", "steadynorm", "doctor", "odd.safetensors", "--format", form],
            env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            cwd=tmp_path, capture_output=True, check=False,
        )
        for form in ("text", "json")
    ]  # fmt: skip
    assert [(p.returncode, p.stderr) for p in printed] == [(1, b"")] * 2
    text, record = (p.stdout for p in printed)
    shown = name.encode(encoding, "backslashreplace").replace(b"\\xfc", b"\\u00fc")
    assert shown in text
    assert b"Why: steadynorm doctor --explain" in text  # the last line
    assert json.loads(record.decode())["findings"][0]["layer"] == name


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("shop:network",), 0),
        (("shop:untrained",), 1),
        (("shop:untrained", "--fail-on", "error"), 1),
        (("shop:untrained", "--fail-on", "never"), 0),
        (("shop:untrained", "--ignore", "SN101"), 0),
        (("shop:untrained", "--select", "SN102,dead-scale", "--select", "SN2"), 0),
        (("shop:network", "--optimizer", "shop:optimizer"), 1),
        (("shop:network", "--optimizer", "shop:optimizer", "--fail-on", "error"), 0),
    ],
)
def test_exit_codes(shop: Path, arguments: tuple[str, ...], code: int) -> None:
    assert run(*arguments).exit_code == code


def test_information_fails_where_asked(shop: Path) -> None:
    (shop / "fresh.py").write_text(
        "from torch import nn\n"
        "def network(): return nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))\n"
    )
    assert run("fresh:network").exit_code == 0
    assert run("fresh:network", "--fail-on", "info").exit_code == 1


COULD_NOT = {
    ("shop:nothing",): "MODEL 'shop:nothing' cannot be found: module",
    ("nowhere:network",): "MODEL 'nowhere:network' cannot be found: No module named 'nowhere'.",
    ("shop:number",): "MODEL must make a torch.nn.Module; shop:number made int.",
    ("shop:breaks",): "RuntimeError: no such data set",
    ("nothing.pt",): "no such file: nothing.pt",
    ("shop.py",): "path must end in one of .safetensors, .pt, .pth, .pth.tar, .ckpt, .bin, ",
    (): "TARGET must name a model (package.module:factory) or a checkpoint file.",
    ("shop:network", "--weights", "small.safetensors"): "small.safetensors does not fit the model.",
    ("shop:network", "--data", "shop:nothing"): "--data 'shop:nothing' cannot be found: module ",
    ("shop:network", "--data", "shop"): "--data must be package.module:name; got 'shop'.",
    ("shop:network", "--data", "shop:number"): "diagnose: `batches` must be an iterable of batches",
    ("shop:network", "--loss", "shop:nothing"): "--loss 'shop:nothing' cannot be found: module ",
    (
        "shop:network",
        "--format",
        "xml",
    ): "--format must be one of text, json, sarif, html; got 'xml'.",
    (
        "shop:network",
        "--fail-on",
        "bad",
    ): "--fail-on must be info, warning, error or never; got 'bad'",
    ("shop:network", "--select", "SN9"): "diagnose: `select` names no rule: 'SN9'.",
    ("shop:network", "--out", "w.pt"): "--out writes what --fix mended; give --fix too.",
    (
        "small.safetensors",
        "--fix",
    ): "--fix needs a model (package.module:factory); 'small.safetenso",
    (
        "small.safetensors",
        "--max-batches",
        "3",
    ): "--max-batches needs a model (package.module:factory); 'small.safetenso",
    ("small.safetensors", *DATA): "--data, --loss needs a model (package.module:factory); 'small.",
    ("--explain", "SN999"): "no rule is called 'SN999'; `steadynorm doctor --list` names them.",
}


@pytest.mark.parametrize("arguments", COULD_NOT, ids=" ".join)
def test_could_not_run_is_one_line(shop: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"steadynorm doctor: {COULD_NOT[arguments]}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("text", "error SN101 statistics never updated"),
        ("json", '"code": "SN101"'),
        ("sarif", '"ruleId": "SN101"'),
        ("html", "<!doctype html>"),
    ],
)
def test_reports_go_to_a_file(shop: Path, form: str, words: str) -> None:
    result = run("shop:untrained", "--format", form, "--output", "deep/report")
    assert result.exit_code == 1
    assert result.stdout == "wrote deep/report\n"
    text = (shop / "deep" / "report").read_text(encoding="utf-8")
    assert words in text
    if form in ("json", "sarif"):  # text takes the terminal's width, the page names the minute
        assert run("shop:untrained", "--format", form).stdout.strip() == text.strip()
    assert [path.name for path in (shop / "deep").iterdir()] == ["report"]


def test_fix(shop: Path) -> None:
    result = run("shop:untrained", *DATA, "--fix", "--out", "mended.safetensors")
    assert result.exit_code == 0, result.output
    assert "calibrated  0.1 " in result.stdout
    assert "wrote mended.safetensors" in result.stdout
    mended = read_tensors(shop / "mended.safetensors")
    sys.path.insert(0, str(shop))
    import shop as source

    x = torch.cat([source.network()[0][0](x).detach() for x, _ in source.data()])
    torch.testing.assert_close(mended["0.1.running_mean"], x.mean((0, 2, 3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mended["0.1.running_var"], x.var((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_fix_keeps_standard_output_for_the_report(shop: Path) -> None:
    result = run("shop:untrained", *DATA, "--fix", "--format", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["findings"] == []
    assert "calibrated  0.1 " in result.stderr


def test_list_names_every_rule() -> None:
    result = run("--list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [[r.code, r.name] for r in all_rules()]
    assert lines[0] == (
        "SN101  statistics-never-updated       up to error    state  The running statistics are "
        "the 0 and 1 that the layer was made with."
    )


@pytest.mark.parametrize("asked", ["SN109", "half-precision-statistics"])
def test_explain(asked: str) -> None:
    result = run("--explain", asked)
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "SN109 half-precision-statistics\n\nThe running statistics are kept in float16 or bfloat16."
    )
    assert (
        "\nWhy it matters\nIn training a running average moves by momentum times" in result.stdout
    )
    assert "\nExplains: SN301 inference-differs, SN302 stale-statistics\n" in result.stdout
