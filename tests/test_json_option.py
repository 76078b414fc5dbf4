"""`--json`: every command has it, and then prints JSON and nothing else to stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from steadynorm.cli import app

cli = CliRunner()


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_it() -> None:
    found = dict(commands(get_command(app)))
    assert {("tour",), ("bench",), ("doctor",), ("lab", "run"), ("lab", "list")} <= set(found)
    without = [
        words
        for words, command in found.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []


def printed(*arguments: str) -> Any:
    """What a command prints to stdout, all of it JSON."""
    result = cli.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_rules_of_the_doctor() -> None:
    rules = printed("doctor", "--list")
    assert {"code", "name", "severity", "needs", "summary"} == set(rules[0])
    first = rules[0]["code"]
    page = printed("doctor", "--explain", first)
    assert (page["code"], page["name"]) == (first, rules[0]["name"])
    assert rules[0]["name"] in page["page"]


def test_experiments() -> None:
    pytest.importorskip("altair", reason="the lab needs the extra lab")
    listed = printed("lab", "list")
    assert "small-batches" in [row["name"] for row in listed]
    assert all(row["claim"] for row in listed)


def test_warmup() -> None:
    pytest.importorskip("numba", reason="the CPU kernels need numba")
    done = printed("warmup", "--activations", "none")
    assert done["kernels"] >= done["from_cache"] >= 0
    assert done["seconds"] >= 0


def test_bench(tmp_path: Path) -> None:
    for needed in ("altair", "vl_convert", "numba"):
        pytest.importorskip(needed, reason="the bench needs the extra lab")
    short = "--suites small --cases bn --layouts nchw --modes inference --rounds 3 --shapes 0"
    done = printed("bench", *short.split(), "--contenders", "ours,eager", "--out", str(tmp_path))
    assert done == json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert {row["contender"] for row in done["measurements"]} == {"ours", "eager"}
