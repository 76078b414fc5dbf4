"""Independent runs in worker processes, with progress and a clean end on Ctrl-C.

Networks this small are dominated by the overhead of single operations: one process with one thread
per core is faster than one process with many threads, and gives the same figures on any machine
with the same processor. A run that takes times is the exception: it comes after the others, alone,
with all threads.

The pool is the standard library's. joblib's does not fit: its workers outlive a killed parent,
print tracebacks on Ctrl-C, and leave no place for an initializer that could prevent both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run: `function(*arguments, tick=...)`, all of it picklable.

    `key` identifies it within its `group`. `steps`: roughly how many steps it takes, for the order
    (longest first) and the progress. `alone`: it takes times, so it runs after all others, with
    nothing beside it, on as many threads as torch takes by default.
    """

    group: str
    key: tuple[Any, ...]
    steps: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    alone: bool = False


Progress = Callable[[str, int], None]
"""Called with a group and the steps done in it so far."""


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    jobs: Sequence[Job], *, workers: int | None = None, progress: Progress | None = None
) -> Iterator[tuple[Job, Any]]:
    """Run the jobs, longest first, and yield each with what it returned as soon as it is there.

    `workers` is the number of processes, by default one per core. What a job raises is raised here,
    after the others have been told to stop; so is KeyboardInterrupt.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"run: `workers` must be at least 1; got {workers!r}.")
    context = multiprocessing.get_context("spawn")  # forking a process with OpenMP threads hangs
    done = context.RawArray("q", len(jobs))  # steps of each job; only its own worker writes there

    def report() -> None:
        steps = Counter[str]()
        for job, count in zip(jobs, done, strict=True):
            steps[job.group] += count
        for group, count in steps.items():
            if progress is not None:
                progress(group, count)

    order = sorted(range(len(jobs)), key=lambda index: -jobs[index].steps)
    for alone, processes, threads in ((False, workers or cores(), 1), (True, 1, None)):
        chosen = [index for index in order if jobs[index].alone is alone]
        if not chosen:
            continue
        stop = context.Event()
        pool = ProcessPoolExecutor(
            min(processes, len(chosen)), context, _initialize, (done, stop, threads)
        )
        try:
            with _interrupts_blocked():
                pending = {pool.submit(_work, index, jobs[index]): index for index in chosen}
            while pending:
                ready, _ = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in ready:
                    index = pending.pop(future)
                    yield jobs[index], future.result()
                    done[index] = jobs[index].steps  # also where it ended early
                report()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT while workers start: they inherit the mask, so that Ctrl-C never reaches them,
    not even before `_initialize`. The parent receives it afterwards.
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


def _initialize(done: Any, stop: Any, threads: int | None) -> None:
    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _exit_with_parent() -> None:
    """Without this the workers of a killed parent would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(index: int, job: Job) -> Any:
    def tick(steps: int) -> None:
        if _stop.is_set():
            raise CancelledError
        _done[index] = min(_done[index] + steps, job.steps)

    tick(0)  # it may have waited while the others were told to stop
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # would be printed between the progress bars
        return job.function(*job.arguments, tick=tick)
