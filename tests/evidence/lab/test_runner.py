"""The runner: nothing is run twice, a kill loses nothing, replicas give one process's figures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evidence.lab import tiny
from tests.evidence.lab.tiny import TINY
from tests.evidence.test_digits import write_pair

from steadynorm.evidence.lab import runner
from steadynorm.evidence.lab.store import Store, read

SCRIPT = Path(tiny.__file__)


def environment(notes=None):
    return os.environ | {"OMP_NUM_THREADS": "1"} | ({"NOTES": str(notes)} if notes else {})


def started(out, notes):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out)], env=environment(notes),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def alive(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a lab that nobody interrupts."""
    out = tmp_path_factory.mktemp("whole")
    paths = runner.run([TINY], out=out, workers=1)
    assert paths == [out / "results" / "tiny.json"]
    return paths[0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_lab_goes_on_and_ends_with_the_same_bytes(tmp_path, whole):
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    moments = random.Random(6)
    cut = 0
    for _ in range(2):
        running = started(out, notes)
        before = len(list(out.glob("runs/tiny/*.json")))
        deadline = time.monotonic() + 60
        while len(list(out.glob("runs/tiny/*.json"))) <= before + cut:
            assert running.poll() is None, running.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
        cut += 2
        while any(alive(int(path.name)) for path in notes.iterdir()):
            assert time.monotonic() < deadline, "workers must end with a killed parent"
            time.sleep(0.01)
    assert not (out / "results").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("runs/tiny/*.json")}
    assert 2 < len(kept) < 24
    running = started(out, notes)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished runs stay"
    assert (out / "results" / "tiny.json").read_bytes() == whole.read_bytes()
    ran = [line for path in notes.iterdir() for line in path.read_text().splitlines()]
    # At each kill two runs may have been under way, or finished and not yet stored.
    assert 24 <= len(ran) <= 24 + 2 * 4


def test_a_finished_lab_runs_nothing(tmp_path, whole, monkeypatch):
    steps = {}
    again = replace(TINY, run=None)  # would fail
    out = whole.parents[1]
    before = whole.read_bytes()
    paths = runner.run(
        [again], out=out, begin=lambda name, total, done: steps.update({name: (total, done)})
    )
    assert paths == [whole]
    assert steps == {"tiny": (24, 24)}
    assert whole.read_bytes() == before


def test_the_profile_and_the_seeds_say_what_is_run(whole):
    head, runs = read(whole)
    assert head["profile"] == "quick"
    assert head["verdict"]["seeds"] == 6
    assert [(r["policy"], r["batch"], r.seed) for r in runs] == [
        (s["policy"], s["batch"], seed) for s in tiny.SETTINGS for seed in range(6)
    ]
    assert len(TINY.planned("full")) == 28
    assert len(TINY.planned("full", 2)) == 8


def test_what_changes_a_run_changes_its_key():
    planned = TINY.planned("quick")[0]
    keys = {
        planned.key(TINY, "digits"),
        planned.key(TINY, "other digits"),
        planned.key(replace(TINY, revision=2), "digits"),
        planned.key(replace(TINY, name="other"), "digits"),
        replace(planned, seed=9).key(TINY, "digits"),
        replace(planned, setting={**planned.setting, "batch": 8}).key(TINY, "digits"),
    }
    assert len(keys) == 6
    turned = replace(planned, setting=dict(reversed(planned.setting.items())))
    assert turned.key(TINY, "digits") in keys, "the order of factors means nothing"


def test_timed_results_have_a_name_of_their_own(tmp_path):
    store = Store(tmp_path, "digits")
    timed = replace(TINY, timed=True)
    runs = timed.planned("quick", 2)
    for run in runs:
        store.put(timed, run, {"accuracy": 0.5 + run.seed / 10})
    assert store.finish(timed, "quick", runs) == tmp_path / "results" / "tiny.timed.json"


def test_runs_on_other_files_of_the_same_size_are_not_taken_for_these(tmp_path):
    labels = np.arange(20) % 10
    for name, images in (("a", 9 * np.eye(4)), ("b", 9 * np.eye(4)[::-1])):
        (tmp_path / name).mkdir()
        write_pair(tmp_path / name, "t10k", np.tile(images, (20, 1, 1)), labels)
    planned = TINY.planned("quick")[0]
    stores = [runner._store(tmp_path, str(tmp_path / name)) for name in "aab"]
    first, again, other = (store.path(TINY, planned) for store in stores)
    assert first == again != other
    assert len({store.data for store in stores}) == 1, "the words are the same"


def fails(setting, seed, digits, tick):
    raise ValueError("no such layer")


def does_not_fit(setting, seed, digits, tick):
    torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_an_error_of_torchs_names_its_run():
    planned = TINY.planned("quick")[0]
    with pytest.raises(RuntimeError, match=r"^tiny: {.*}, seed 0: RuntimeError: mat1 and mat2 "):
        runner.execute(replace(TINY, run=does_not_fit), planned, None)


def test_an_error_names_its_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"tiny: {.*'batch': 9.*}, seed 0: ValueError: no such"):
        runner.run([replace(TINY, run=fails)], out=tmp_path, workers=1, seeds=1)


def test_seeds_are_counted_from_one(tmp_path):
    with pytest.raises(ValueError, match=r"^run: `seeds` must be at least 1; got 0\.$"):
        runner.run([TINY], out=tmp_path, seeds=0)


def torchrun(out, notes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(out)], env=environment(notes), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def close(first, second):
    """Equal but for rounding, which differs where sums over a batch are split."""
    if isinstance(first, list):
        return len(first) == len(second) and all(map(close, first, second))
    if isinstance(first, float):
        return first == pytest.approx(second, rel=2e-4, abs=2e-6)
    return first == second


def test_two_processes_give_the_figures_of_one(tmp_path, whole):
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    torchrun(out, notes)
    head, together = read(out / "results" / "tiny.json")
    assert all(text.endswith(", 2 processes") for text in head["made_with"])
    _, alone = read(whole)
    assert len(together) == 8
    for run in together:
        (same,) = [one for one in alone.where(**run.setting) if one.seed == run.seed]
        for name in same.result:
            assert close(run[name], same[name]), (run.setting, run.seed, name)
    lines = [sorted(path.read_text().splitlines()) for path in notes.iterdir()]
    assert len(lines) == 2, "both processes take part in every run"
    assert lines[0] == lines[1]
    assert len(lines[0]) == 8
    assert {path.name for path in out.glob("told-*")} == {"told-0-8", "told-1-0"}


def test_the_comparison_sees_a_difference():
    assert not close([0.5, 0.1], [0.5, 0.1001])
    assert not close(["a"], ["a", "b"])


def test_timed_experiments_need_the_machine_to_themselves(tmp_path):
    with pytest.raises(ValueError, match=r"must not be timed; got tiny\. Run those without torch"):
        runner.run_together([replace(TINY, timed=True)], out=tmp_path)


def test_a_run_is_stored_as_strict_json(whole):
    for path in whole.parents[1].glob("runs/tiny/*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
