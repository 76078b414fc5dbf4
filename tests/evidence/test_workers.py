"""Runs in worker processes: results, progress, failure, interruption."""

from __future__ import annotations

import os
import time

import pytest
import torch

from steadynorm.evidence import workers


def square(value, *, tick):
    tick(4)
    return value * value, os.getpid()


def fails(*, tick):
    raise ValueError("no digits here")


def endless(path, *, tick):
    path.write_text("started")
    try:
        while True:
            tick(1)
            time.sleep(0.01)
    finally:
        path.write_text("told to stop")


def times(*, tick):
    started = time.time()
    time.sleep(0.2)
    return started, time.time(), torch.get_num_threads()


def after(path, value, *, tick):
    while not path.exists():
        time.sleep(0.01)
    return value


def test_results_and_progress():
    planned = [workers.Job("odd" if n % 2 else "even", (n,), 10, square, (n,)) for n in range(5)]
    progress = {}
    found = {
        job.key: result
        for job, result in workers.run(planned, workers=2, progress=progress.__setitem__)
    }
    assert {key: result[0] for key, result in found.items()} == {(n,): n * n for n in range(5)}
    assert os.getpid() not in {result[1] for result in found.values()}
    assert progress == {"even": 30, "odd": 20}, "a run that ends early counts as done"


def test_what_a_job_raises_is_raised_and_the_others_are_stopped(tmp_path):
    note = tmp_path / "note"
    planned = [
        workers.Job("a", (0,), 10**9, endless, (note,)),
        workers.Job("a", (1,), 1, fails),
    ]
    with pytest.raises(ValueError, match="no digits here"):
        list(workers.run(planned, workers=2))
    assert not note.exists() or note.read_text() == "told to stop"


def test_leaving_early_stops_the_workers(tmp_path):
    note = tmp_path / "note"
    planned = [
        workers.Job("a", (0,), 10**9, endless, (note,)),
        workers.Job("a", (1,), 1, after, (note, 9)),
    ]
    running = workers.run(planned, workers=2)
    job, result = next(running)
    assert (job.key, result) == ((1,), 9)
    running.close()  # what Ctrl-C does: GeneratorExit or KeyboardInterrupt inside the loop
    assert note.read_text() == "told to stop"


def test_timed_jobs_run_after_all_others_one_by_one_on_all_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what torch takes by itself, in the workers
    planned = [workers.Job("a", (n,), 1, times, alone=n < 2) for n in range(4)]
    told = []
    found = {
        job.key[0]: outcome
        for job, outcome in workers.run(
            planned, workers=2, progress=lambda _, done: told.append(done)
        )
    }
    others_end = max(found[2][1], found[3][1])
    (first, first_end, _), (second, _, _) = sorted((found[0], found[1]))
    assert others_end <= first
    assert first_end <= second
    assert [found[n][2] for n in range(4)] == [2, 2, 1, 1]
    assert told == sorted(told), "progress goes on where the first pool left it"
    assert told[-1] == 4


def test_no_jobs():
    assert list(workers.run([])) == []


def test_workers_are_counted_from_one():
    with pytest.raises(ValueError, match=r"^run: `workers` must be at least 1; got 0\.$"):
        list(workers.run([], workers=0))
