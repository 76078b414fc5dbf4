"""Independent runs spread over worker processes, with progress, ended cleanly by Ctrl-C.

Networks this small are ruled by the overhead of single operations, so one process with one thread
per core is faster than one process with many threads, and gives the same figures on any machine
with the same processor. A run that is timed is the exception: it comes after the others, alone,
with all threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any


class CancelledError(Exception):
    """Raised inside a worker whose run is no longer wanted."""


@dataclass(frozen=True)
class Job:
    """One run: `function(*arguments, tick=...)`, all of it picklable.

    `key` names it among the others of its `group`; `steps` is about how many steps it takes, for
    the order (longest first) and the progress. `alone`: it takes times, so it runs after all
    others, with nothing beside it, on as many threads as torch takes by itself.
    """

    group: str
    key: tuple[Any, ...]
    steps: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    alone: bool = False


Progress = Callable[[str, int], None]
"""Told the steps done so far in a group."""


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    jobs: Sequence[Job], *, workers: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Job, Any]]:
    """Run the jobs, longest first, and yield each with what it returned as soon as it is there.

    `workers` is the number of processes, all cores by default. What a job raises is raised here,
    after the others have been told to stop; so is KeyboardInterrupt.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"run: `workers` must be at least 1; got {workers!r}.")
    groups = sorted({job.group for job in jobs})
    context = multiprocessing.get_context("spawn")  # fork and OpenMP's threads do not mix
    done = context.Array("q", len(groups))
    finished = dict.fromkeys(groups, 0)
    together, alone = ([job for job in jobs if job.alone is kind] for kind in (False, True))
    for some, processes, threads in ((together, workers or cores(), 1), (alone, 1, None)):
        if some:
            yield from _spread(some, processes, threads, context, done, finished, progress)


def _spread(
    jobs: Sequence[Job],
    workers: int,
    threads: int | None,
    context: Any,
    done: Any,
    finished: dict[str, int],
    progress: Progress | None,
) -> Iterator[tuple[Job, Any]]:
    """Run the jobs in a pool of their own. `done` counts each group's steps as the workers tell
    them, `finished` those of the jobs that have ended.
    """
    groups = list(finished)
    stop = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin, (done, stop, threads))
    pending: dict[Future[Any], Job] = {}
    try:
        with _interrupts_held():
            for job in sorted(jobs, key=lambda job: -job.steps):
                pending[pool.submit(_work, job, groups.index(job.group))] = job
        while pending:
            ready, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
            if progress is not None:
                for index, group in enumerate(groups):
                    progress(group, done[index])
            for future in ready:
                job = pending.pop(future)
                yield job, future.result()
                finished[job.group] += job.steps
        if progress is not None:
            for group in groups:
                progress(group, finished[group])
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while the workers start. They inherit the mask, so that it never reaches
    them, not even between their start and `_begin`; the parent gets it afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_done: Any = None
_stop: Any = None


def _begin(done: Any, stop: Any, threads: int | None) -> None:
    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _end_with_parent() -> None:
    """A killed parent tells nobody: without this its workers would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(job: Job, group: int) -> Any:
    told = 0

    def tick(steps: int) -> None:
        nonlocal told
        if _stop.is_set():
            raise CancelledError
        steps = min(steps, job.steps - told)
        told += steps
        with _done.get_lock():
            _done[group] += steps

    tick(0)  # a run that was waiting when the others were stopped
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a refusal or a hint belongs in the result, not between bars
        result = job.function(*job.arguments, tick=tick)
    tick(job.steps - told)  # a run that ended early is done all the same
    return result
