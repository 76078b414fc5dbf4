"""The command line: help, version, what is missing, interruption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from steadynorm.cli import app

runner = CliRunner()


def test_without_a_command_it_shows_the_help():
    result = runner.invoke(app, [])
    assert "Usage" in result.output
    assert "tour" in result.output


def test_version():
    result = runner.invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, version("steadynorm"))


def test_help_loads_no_framework():
    code = (
        "import sys; from typer.testing import CliRunner; from steadynorm.cli import app\n"
        "CliRunner().invoke(app, ['tour', '--help'])\n"
        "print(sorted({'torch', 'numba', 'sklearn', 'altair', 'jax', 'keras'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("absent", "arguments", "named"),
    [
        ({"altair", "vl_convert", "sklearn"}, [], "altair"),
        ({"sklearn"}, [], "sklearn"),
        ({"altair", "sklearn"}, ["--data-dir", "."], "altair"),
    ],
)
def test_says_in_one_line_what_to_install(monkeypatch, absent, arguments, named):
    monkeypatch.setattr(
        "steadynorm._extras.find_spec", lambda name: None if name in absent else True
    )
    result = runner.invoke(app, ["tour", *arguments])
    assert result.exit_code == 2
    assert result.output == (
        f'steadynorm tour: needs {named}, which is not installed: pip install "steadynorm[lab]"\n'
    )


def test_a_folder_without_digits(tmp_path):
    pytest.importorskip("altair", reason="the tour needs the extra lab")
    pytest.importorskip("vl_convert", reason="the tour needs the extra lab")
    out = tmp_path / "out"
    result = runner.invoke(app, ["tour", "--data-dir", str(tmp_path), "--out", str(out)])
    assert result.exit_code == 2
    assert result.output.startswith("steadynorm tour: data_dir must hold t10k-images-idx3-ubyte")
    assert result.output.count("\n") == 1
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent differently there")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    pytest.importorskip("sklearn", reason="the tour needs the extra lab")
    out = tmp_path / "tour"
    out.mkdir()
    (out / "report.json").write_text("old")
    command = [sys.executable, "-m", "steadynorm.cli", "tour", "--out", str(out)]
    # A process group of its own, so that the signal reaches the workers too, as in a terminal.
    # Tests that run in the background ignore the signal, and a child would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 120
    while len(children(running.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = children(running.pid)
    assert workers, "no worker was started"
    os.killpg(running.pid, signal.SIGINT)
    _, complaint = running.communicate(timeout=60)
    assert running.returncode == 130
    assert complaint == "steadynorm tour: interrupted; nothing was written.\n"
    assert [entry.name for entry in out.iterdir()] == ["report.json"]
    assert (out / "report.json").read_text() == "old"
    deadline = time.monotonic() + 30  # the resource tracker ends when it sees its parent gone
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in workers if alive(pid)]


def children(pid):
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = re.findall(r"(\d+)\s+(\d+)", found.stdout)
    return [int(child) for child, parent in pairs if int(parent) == pid]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
