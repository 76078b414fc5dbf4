"""Each extra brings one framework, and what is missing says which extra brings it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steadynorm._extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
# Import names that differ from the distribution's, and what comes with another distribution.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "vl_convert": "vl-convert-python"}
BROUGHT_ALONG = {"scipy": "scikit-learn", "joblib": "scikit-learn", "h5py": "keras"}


def without(packages: tuple[str, ...], statements: str) -> subprocess.CompletedProcess[str]:
    """Run statements in an interpreter where `packages` cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", hide + statements],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "KERAS_BACKEND": "jax"},
    )


def requirements() -> tuple[list[str], dict[str, list[str]]]:
    """What pyproject.toml requires in any case, and by extra; names only."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(lines: list[str]) -> list[str]:
        return [line.partition(">")[0].partition("=")[0] for line in lines]

    extras = {name: names(lines) for name, lines in project["optional-dependencies"].items()}
    return names(project["dependencies"]), extras


def test_the_base_brings_no_framework() -> None:
    assert requirements()[0] == ["numpy", "rich", "typer", "jinja2", "safetensors"]


def test_an_extra_brings_its_framework_alone() -> None:
    _, extras = requirements()
    assert extras["torch"] == ["torch", "numba"]
    assert extras["gpu"] == ["torch"]
    assert extras["jax"] == ["jax", "flax"]
    assert extras["keras"] == ["keras"]


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_errors_say_it_brings(extra: str) -> None:
    brought = requirements()[1][extra]
    for package in EXTRAS[extra]:
        distribution = BROUGHT_ALONG.get(package, DISTRIBUTIONS.get(package, package))
        assert distribution in brought


def test_the_oldest_versions_claimed_are_those_that_are_tested() -> None:
    text = {
        name: (ROOT / name).read_text(encoding="utf-8")
        for name in ("pyproject.toml", "Makefile", "tests/pythons.sh")
    }
    claimed = set(re.findall(r'"torch>=([\d.]+)"', text["pyproject.toml"]))
    assert claimed == set(re.findall(r"'torch==([\d.]+)\.\*'", text["Makefile"]))
    (python,) = re.findall(r'requires-python = ">=([\d.]+)"', text["pyproject.toml"])
    tested = re.findall(r"for version in ([\d. ]+);", text["tests/pythons.sh"])[0].split()
    assert tested[0] == python


@pytest.mark.parametrize(
    ("packages", "statement", "owner", "extra"),
    [
        (("torch",), "steadynorm.BatchNorm2d", "steadynorm.BatchNorm2d", "torch"),
        (("torch",), "steadynorm.calibrate", "steadynorm.calibrate", "torch"),
        (("torch",), "steadynorm.functional", "steadynorm.functional", "torch"),
        (("torch",), "import steadynorm.nn", "steadynorm.nn", "torch"),
        (("torch",), "steadynorm.diagnose(3)", "steadynorm.diagnose", "torch"),
        (("keras",), "import steadynorm.keras", "steadynorm.keras", "keras"),
        (("jax",), "import steadynorm.jax", "steadynorm.jax", "jax"),
    ],
)
def test_what_is_missing_names_the_extra(
    packages: tuple[str, ...], statement: str, owner: str, extra: str
) -> None:
    done = without(packages, f"import steadynorm\n{statement}")
    assert done.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {owner} needs {packages[0]}, which is not installed: "
        f'pip install "steadynorm[{extra}]"'
    )


def test_keras_without_its_backend_says_so() -> None:
    pytest.importorskip("keras", reason="keras is not installed")
    done = without(("jax",), "import steadynorm.keras")
    assert 'needs jax, which is not installed: pip install "steadynorm[jax]"' in done.stderr


@pytest.mark.parametrize("statement", ["import no_such_package", "import steadynorm.no_such"])
def test_another_missing_module_is_left_alone(statement: str) -> None:
    told = "from steadynorm._extras import needed_by\nwith needed_by('it'):\n    "
    assert (
        without((), told + statement)
        .stderr.splitlines()[-1]
        .startswith("ModuleNotFoundError: No module named ")
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "convert torch.nn:Identity",
        "fold torch.nn:Identity",
        "calibrate torch.nn:Identity --data x.npy",
        "doctor torch.nn:Identity",
        "bench",
        "warmup",
    ],
)
def test_a_command_without_torch_ends_with_one_line(arguments: str) -> None:
    words = arguments.split()
    run = f"from steadynorm.cli import app\nsys.argv[1:] = {words!r}\napp()"
    done = without(("torch",), run)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"steadynorm {words[0]}: needs torch, which is not installed: "
        'pip install "steadynorm[torch]"'
    ]


def test_help_and_rules_need_no_framework() -> None:
    frameworks = ("torch", "numba", "keras", "jax", "flax", "sklearn", "altair")
    for words in (["--help"], ["--version"], ["doctor", "--list"]):
        run = f"from steadynorm.cli import app\nsys.argv[1:] = {words!r}\napp()"
        assert without(frameworks, run).returncode == 0


def test_a_checkpoint_is_diagnosed_without_torch(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.npz")
    ones, zeros = np.ones(3), np.zeros(3)
    layer = {"weight": ones, "bias": ones, "running_mean": zeros, "running_var": ones}
    np.savez(path, **{f"norm.{name}": value for name, value in layer.items()})
    report = without(
        ("torch",),
        f"import steadynorm\nprint([f.code for f in steadynorm.diagnose({path!r}).findings])",
    )
    assert report.stdout == "['SN101']\n", report.stderr
    run = f"from steadynorm.cli import app\nsys.argv[1:] = ['doctor', {path!r}]\napp()"
    done = without(("torch",), run)
    assert (done.returncode, "error SN101" in done.stdout) == (1, True), done.stderr


def test_the_package_runs_as_a_module() -> None:
    done: Any = subprocess.run(
        [sys.executable, "-m", "steadynorm", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip()


def test_without_numba_the_layers_work_and_say_why() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    done = without(
        ("numba", "llvmlite"),
        """
import torch, steadynorm as sn
from steadynorm.kernels.dispatch import explain
x = torch.randn(8, 32, 16, 16, requires_grad=True)
for statistics in ("batch", "steady"):
    layer = sn.BatchNorm2d(32, statistics=statistics, activation="relu")
    layer(x, residual=x).square().sum().backward()
print(explain(x).refusals["cpu"])
""",
    )
    assert done.stdout.strip() == (
        "the CPU kernels cannot be loaded (needs numba, which is not installed: "
        'pip install "steadynorm[torch]")'
    ), done.stderr


def test_without_rich_calibrate_and_diagnose_work() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    done = without(
        ("rich",),
        """
import torch, steadynorm as sn
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
batches = [torch.randn(8, 3) for _ in range(3)]
report = sn.calibrate(model, batches, progress=True)
print(report.batches, sn.diagnose(model, batches).to_json()[:1])
""",
    )
    assert done.stdout.split() == ["3", "{"], done.stderr
