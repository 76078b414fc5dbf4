"""The stop in another framework: what it runs, and what it says."""

from importlib.util import find_spec
from typing import Any

import pytest
from typer.testing import CliRunner

from steadynorm.cli import app
from steadynorm.evidence.tour.demo import TourOptions
from steadynorm.evidence.tour.demos.frameworks import ARMS, FrameworkRun, demo, execute

OPTIONS = TourOptions(None, (0,), short=True)


@pytest.mark.parametrize("framework", ["keras", "jax"])
def test_it_says_what_its_runs_show(framework: str) -> None:
    shown = demo(framework)
    keys = [job.key for job in shown.jobs(OPTIONS)]
    assert sorted(keys) == sorted((arm, size, 0) for arm in ARMS for size in (64, 2))
    outcomes: dict[tuple[Any, ...], FrameworkRun] = {
        key: FrameworkRun(float(key[1]), 0.5) for key in keys
    }
    result = shown.result(OPTIONS, outcomes)
    assert "batch 64: 64.0 % error with its own layer, 64.0 % with ours." in result.sentence
    assert "Batch 2: 2.0 % and 2.0 %, and 2.0 % with Steady." in result.sentence
    assert len(result.tables[0].rows) == len(result.figures["runs"]) == 6


@pytest.mark.skipif(find_spec("flax") is None, reason="flax is not installed")
def test_a_run_in_jax_learns() -> None:
    run = execute("jax", ARMS[2], 64, 60, None, 0)
    assert run.error < 25
    assert run.loss < 1.2
    assert run == execute("jax", ARMS[2], 64, 60, None, 0)


def test_an_unknown_framework_is_refused() -> None:
    result = CliRunner().invoke(app, ["tour", "--framework", "mxnet"])
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "steadynorm tour: --framework must be torch, keras or jax; got mxnet"
    )
